import keras
import pytest
import rich.console
from keras import layers

import keras_spectral as ks
from keras_spectral.model.counting import count_weights

pytestmark = pytest.mark.once


def _quiet(model):
    return ks.adapter_summary(model, rich.console.Console(quiet=True))


def _text_model():
    """Odd sizes, so that packed kernels have a spare half byte."""
    inputs = keras.Input((3,), dtype="int32")
    x = layers.Embedding(101, 33, name="table")(inputs)
    x = layers.EinsumDense(
        "abc,cde->abde", (3, 3, 5), bias_axes="de", name="heads"
    )(x)
    x = layers.Reshape((3, 15))(x)
    return keras.Model(inputs, layers.Dense(7, name="out")(x))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_kernels_count_as_their_numbers(mode):
    model = _text_model()
    count = model.count_params()
    assert count_weights(model) == count
    model.quantize(mode)
    assert count_weights(model) == count
    ks.wrap_model(model, "lora", target=["heads", "out"], rank=2)
    added = 2 * (33 + 15) + 2 * (15 + 7)
    summary = _quiet(model)
    assert summary.trainable == added
    assert summary.total == count + added + 4  # scales and strengths
    heads, out = summary.rows
    assert heads.total == 33 * 15 + 15 + 2 * 48 + 1
    assert out.total == 15 * 7 + 7 + 2 * 22 + 1


def test_only_what_trains():
    model = _text_model()
    model.get_layer("table").trainable = False
    assert count_weights(model, trainable=True) == (33 + 1) * 15 + 16 * 7
