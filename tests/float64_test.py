"""Models of float64: every way that kernels and corrections meet."""

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks


@pytest.fixture(autouse=True)
def _wide():
    """JAX knows float64 only where it is switched on."""
    if keras.backend.backend() != "jax":
        yield
        return
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


METHODS = {
    "lora": {},
    "pissa": {"method": "lora", "initializer": "pissa"},
    "spectral": {},
    "rotate": {"method": "spectral", "mode": "rotate"},
    "values": {"method": "spectral", "mode": "values"},
    "gated_spectral": {},
    "conditional_spectral": {},
    "decaying_lora": {"end_step": 4},
    "adalora": {},
    "dylora": {},
    "glora": {},
}


def _dense():
    hidden = layers.Dense(12, "relu", name="hidden", dtype="float64")
    head = layers.Dense(4, name="head", dtype="float64")
    return keras.Sequential([keras.Input((16,), dtype="float64"), hidden, head])


def _conv():
    conv = layers.Conv2D(12, 3, name="hidden", dtype="float64")
    return keras.Sequential([keras.Input((5, 5, 3), dtype="float64"), conv])


def _inputs(model):
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, *model.input_shape[1:]))


def _outputs(model):
    outputs = model(_inputs(model))
    assert keras.backend.standardize_dtype(outputs.dtype) == "float64"
    return ops.convert_to_numpy(outputs)


def _wrapped(model, name):
    options = dict(METHODS[name])
    method = options.pop("method", name)
    return ks.wrap_model(model, method, target="hidden", rank=2, **options)


def _jolt(model, size=0.3):
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, size, weight.shape))


@pytest.mark.parametrize("make", [_dense, _conv])
@pytest.mark.parametrize("name", METHODS)
def test_wrap_call_save_load_merge(name, make, tmp_path):
    model = make()
    base = model.get_weights()
    plain = _outputs(model)
    _wrapped(model, name)
    np.testing.assert_allclose(_outputs(model), plain, atol=1e-5)
    # Gates that are 0 or 1 need more to open.
    _jolt(model, 5.0 if name == "conditional_spectral" else 0.3)
    expected = _outputs(model)
    assert np.abs(expected - plain).max() > 1e-3
    ks.save_adapters(model, tmp_path / "a.safetensors")
    other = make()
    other.set_weights(base)
    ks.load_adapters(other, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(_outputs(other), expected)
    if name == "conditional_spectral":
        return
    kernel = model.get_layer("hidden").kernel
    ks.merge_model(model)
    np.testing.assert_allclose(_outputs(model), expected, atol=1e-5)
    merged = model.get_layer("hidden").kernel
    assert merged.dtype == "float64"
    np.testing.assert_array_equal(
        ops.convert_to_numpy(kernel), ops.convert_to_numpy(merged)
    )


@pytest.mark.once
@pytest.mark.parametrize("make", [_dense, _conv])
@pytest.mark.parametrize("recover", [None, "lora"])
def test_compression(make, recover, tmp_path):
    model = make()
    options = {"max_error": 0.8, "recover": recover, "recover_rank": 1}
    small = ks.compress_model(model, target="hidden", **options)
    if recover == "lora":
        _jolt(small)
        expected = _outputs(small)
        ks.finalize_transfer(small)
        np.testing.assert_allclose(_outputs(small), expected, atol=1e-5)
    assert isinstance(small.get_layer("hidden"), ks.LowRank)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(_outputs(again), _outputs(small))


def test_other_ways_to_the_kernel(tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    base = _dense()
    models = []
    for i, file in enumerate(files):
        model = keras.models.clone_model(base)
        model.set_weights(base.get_weights())
        options = {"rank": 2, "columns": 2 * i}
        ks.wrap_model(model, "spectral", target="hidden", **options)
        _jolt(model)
        ks.save_adapters(model, file)
        models.append(model)
    with ks.merged(models[0]):
        merged = _outputs(models[0])
    np.testing.assert_allclose(_outputs(models[0]), merged, atol=1e-5)
    expected = _outputs(models[0])
    ks.to_lora(models[0], rank=4)
    np.testing.assert_allclose(_outputs(models[0]), expected, atol=1e-5)
    for method in ("columns", "average"):
        fused = keras.models.clone_model(base)
        fused.set_weights(base.get_weights())
        ks.fuse_adapters(fused, files, method=method)
        assert np.abs(_outputs(fused) - _outputs(base)).max() > 1e-3
