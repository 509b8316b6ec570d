import warnings

import keras
import pytest
from keras import layers

import keras_spectral as ks

pytestmark = pytest.mark.once


def _model(width=8):
    return keras.Sequential(
        [keras.Input((width,)), layers.Dense(width, name="hidden")]
    )


@pytest.mark.parametrize(
    "options, meant",
    [
        ({"r": 8}, "'rank' for 'r'"),
        ({"lora_alpha": 16}, "'alpha' for 'lora_alpha'"),
        ({"lora_dropout": 0.1}, "'dropout' for 'lora_dropout'"),
        ({"use_rslora": True}, "'scaling' for 'use_rslora'"),
        ({"target_modules": ["q"]}, "'target' of `wrap_model` for"),
        ({"modules_to_save": ["q"]}, "'trainable' of `wrap_model` for"),
        ({"rnak": 3}, "'rank' for 'rnak'"),
        ({"overide": {}}, "'overrides' of `wrap_model`"),
    ],
)
def test_what_an_option_was_meant_to_be(options, meant):
    with pytest.raises(ValueError, match="no option.*Its options: rank") as c:
        ks.wrap_model(_model(), "lora", target="hidden", **options)
    assert f"Did you mean {meant}" in str(c.value)


def test_no_hint_where_nothing_is_near():
    with pytest.raises(ValueError, match="no option") as caught:
        ks.wrap_model(_model(), "lora", target="hidden", xyzzy=1)
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "method, meant",
    [("LoRA", "lora"), ("dylra", "dylora"), ("spectrl", "spectral")],
)
def test_what_a_method_was_meant_to_be(method, meant):
    with pytest.raises(ValueError, match=f"Did you mean '{meant}'"):
        ks.wrap_model(_model(), method)


@pytest.mark.parametrize(
    "method",
    [3, None, layers.Dense, ks.AdapterLayer, ks.blocks.BlockAdapter],
)
def test_what_is_no_method(method):
    with pytest.raises(ValueError, match="Received method=.*Expected one of"):
        ks.wrap_model(_model(), method)


def test_an_adapter_larger_than_its_base_warns_once():
    inputs = keras.Input((64,))
    x = layers.Dense(64, name="a")(inputs)
    model = keras.Model(inputs, layers.Dense(80, name="b")(x))
    with pytest.warns(UserWarning) as caught:
        ks.wrap_model(model, "lora", target="all", rank=64)
    (warning,) = caught
    message = str(warning.message)
    assert "2 of 2 adapters" in message
    assert "'a' 8,192 beside 4,160" in message
    assert warning.filename == __file__


def test_an_adapter_that_is_smaller_or_tiny_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size, rank in ((64, 32), (8, 8)):
            model = ks.wrap_model(_model(size), "lora", "all", rank=rank)
            assert model.trainable_weights


def test_a_model_stays_plain_if_the_warning_is_an_error():
    model = _model(64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="more numbers"):
            ks.wrap_model(model, "lora", target="all", rank=64)
    assert type(model.layers[0]) is layers.Dense
    assert model.layers[0].trainable


def test_a_kernel_without_numbers():
    model = keras.Sequential([keras.Input((0,)), layers.Dense(4, name="out")])
    with pytest.raises(ValueError, match="'out'.*0 x 4.*no numbers"):
        ks.wrap_model(model, "lora", target="out")
