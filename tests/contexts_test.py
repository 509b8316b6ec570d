import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks


def _model(method="lora", **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(6, activation="relu", name="first"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    ks.wrap_model(model, method, target=["first", "head"], rank=2, **options)
    rng = np.random.default_rng(3)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    return model


def _outputs(model):
    x = np.random.default_rng(0).normal(size=(5, 8)).astype("float32")
    return ops.convert_to_numpy(model(x)), model.predict(x, verbose=0)


def test_merged_is_a_plain_model_and_goes_back_bit_for_bit(tmp_path):
    model = _model()
    adapters = list(model.layers)
    kernels = [a.layer.kernel.numpy() for a in adapters]
    expected = _outputs(model)
    with ks.merged(model):
        assert all(type(x) is keras.layers.Dense for x in model.layers)
        for got, wanted in zip(_outputs(model), expected):
            np.testing.assert_allclose(got, wanted, atol=1e-5)
        model.save(tmp_path / "plain.keras")
    assert model.layers == adapters
    for adapter, kernel in zip(adapters, kernels):
        np.testing.assert_array_equal(adapter.layer.kernel.numpy(), kernel)
        assert not adapter.layer.trainable
    for got, wanted in zip(_outputs(model), expected):
        np.testing.assert_array_equal(got, wanted)
    plain = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_allclose(_outputs(plain)[0], expected[0], atol=1e-5)


def test_merged_comes_back_after_an_error():
    model = _model()
    kernel = model.layers[0].layer.kernel.numpy()
    expected, _ = _outputs(model)
    with pytest.raises(RuntimeError), ks.merged(model):
        raise RuntimeError
    np.testing.assert_array_equal(model.layers[0].layer.kernel.numpy(), kernel)
    np.testing.assert_array_equal(_outputs(model)[0], expected)


def test_merged_refuses_what_cannot_be_merged():
    model = _model("conditional_spectral")
    adapters = list(model.layers)
    with pytest.raises(ValueError, match="depend on the input"):
        with ks.merged(model):
            pass
    assert model.layers == adapters
    diverged = _model()
    diverged.layers[1].lora_b.assign(np.full((2, 3), np.nan))
    kernel = diverged.layers[0].layer.kernel.numpy()
    with pytest.raises(ValueError, match="NaN"):
        with ks.merged(diverged):
            pass
    np.testing.assert_array_equal(
        diverged.layers[0].layer.kernel.numpy(), kernel
    )


def test_merged_puts_a_faded_bias_back():
    options = {"end_step": 2, "decay_bias": True, "initializer": "fan_in"}
    model = _model("decaying_lora", **options)
    for adapter in model.layers:
        adapter.layer.bias.assign(adapter.layer.bias + 1.0)
        adapter.step.assign(1)
    biases = [adapter.layer.bias.numpy() for adapter in model.layers]
    expected = _outputs(model)
    with ks.merged(model):
        for got, wanted in zip(_outputs(model), expected):
            np.testing.assert_allclose(got, wanted, atol=1e-5)
    for adapter, bias in zip(model.layers, biases):
        np.testing.assert_array_equal(adapter.layer.bias.numpy(), bias)
