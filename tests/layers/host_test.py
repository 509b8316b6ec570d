"""How a host calls its base."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks


def _model(layer, shape=(6,)):
    return keras.Sequential([keras.Input(shape), layer])


class _OwnCall(keras.layers.Dense):
    """A layer that does more than Keras does around its `call`."""

    seen = 0

    def __call__(self, inputs, **kwargs):
        type(self).seen += 1
        return super().__call__(inputs, **kwargs)


def test_a_call_of_ones_own_is_kept():
    model = _model(_OwnCall(4, name="own"))
    ks.wrap_model(model, "lora", "own", rank=2)
    before = _OwnCall.seen
    model(np.ones((2, 6), "float32"))
    assert _OwnCall.seen == before + 1


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "head"])
def test_inputs_of_another_size_are_named(method):
    model = _model(keras.layers.Dense(6, name="hidden"))
    model.add(keras.layers.Dense(4, name="d"))
    if method == "head":
        ks.wrap_model(model, "lora", "hidden", trainable="d", rank=1)
    else:
        options = {} if method == "ia3" else {"rank": 1}
        ks.wrap_model(model, method, "d", trainable=(), **options)
    with pytest.raises(ValueError, match="expected axis -1.*value 6"):
        model.get_layer("d")(np.ones((2, 5), "float32"))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "bfloat16"])
def test_inputs_of_another_type_are_cast(dtype):
    keras.utils.set_random_seed(0)
    model = _model(keras.layers.Dense(4, name="d", dtype=dtype))
    inputs = np.arange(12).reshape(2, 6)
    given = [inputs, inputs.astype("float64"), inputs.astype("float16")]
    before = [model(x) for x in given]
    ks.wrap_model(model, "lora", "d", rank=2)
    for x, y in zip(given, before):
        got = model.get_layer("d")(x)
        assert got.dtype == y.dtype
        got, y = (
            ops.convert_to_numpy(ops.cast(a, "float32")) for a in (got, y)
        )
        np.testing.assert_array_equal(got, y)


def test_a_base_that_is_quantised_later():
    """Keras runs it by another function than `call`."""
    keras.utils.set_random_seed(0)
    model = _model(keras.layers.Dense(4, name="d"))
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    ks.wrap_model(model, "lora", "d", rank=2)
    before = ops.convert_to_numpy(model(x))
    model.get_layer("d").layer.quantize("int8")
    after = ops.convert_to_numpy(model(x))
    assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()
