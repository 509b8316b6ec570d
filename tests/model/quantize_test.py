import io

import keras
import numpy as np
import pytest
import rich.console
from keras import ops

import keras_spectral as ks

X = np.random.default_rng(0).normal(size=(16, 64)).astype("float32")


def _model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(48, "relu", name="one"),
            keras.layers.Dense(32, name="two"),
        ]
    )


def _out(model):
    return ops.convert_to_numpy(model(X))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_nearer_to_the_float_model(mode):
    expected = _out(_model())
    plain = _model()
    plain.quantize(mode)
    before = np.abs(_out(plain) - expected).mean()
    model = ks.quantize_with_lora(_model(), mode, "all", rank=8)
    assert model.layers[0].layer.quantization_mode == mode
    assert np.abs(_out(model) - expected).mean() < 0.95 * before


def test_the_error_falls_from_round_to_round_and_is_in_the_summary():
    found = []
    for rounds in (1, 2, 5):
        model = ks.quantize_with_lora(
            _model(), "int4", "all", rank=8, rounds=rounds
        )
        found.append([layer.start_errors[1] for layer in model.layers])
    found = np.array(found)
    assert (found[1] < found[0]).all() and (found[2] < found[0]).all()
    console = rich.console.Console(width=100, file=io.StringIO())
    rows = ks.adapter_summary(model, console).rows
    for layer, row in zip(model.layers, rows):
        assert row.errors == layer.start_errors
        kernel = {"one": 0, "two": 1}[layer.name]
        original = _model().layers[kernel].kernel.numpy()
        held = ops.convert_to_numpy(layer.view.matrix())
        delta = ops.convert_to_numpy(layer.delta_matrix())
        size = np.linalg.norm(original)
        np.testing.assert_allclose(
            row.errors,
            (
                np.linalg.norm(original - held) / size,
                np.linalg.norm(original - held - delta) / size,
            ),
            rtol=1e-3,
        )
    assert "lost %" in console.file.getvalue()


def test_it_trains_and_is_saved(tmp_path):
    model = ks.quantize_with_lora(_model(), "int8", "all", rank=4, adapter="a")
    model.compile("adam", "mse")
    model.fit(X, np.ones((16, 32)), verbose=0)
    outputs = _out(model)
    ks.save_adapters(model, tmp_path / "file.safetensors")
    base = _model()
    base.quantize("int8")
    ks.load_adapters(base, tmp_path / "file.safetensors")
    np.testing.assert_allclose(_out(base), outputs, atol=1e-5)


def test_what_it_refuses():
    model = _model()
    with pytest.raises(ValueError, match="mode='int3'"):
        ks.quantize_with_lora(model, "int3")
    with pytest.raises(ValueError, match="rounds=0"):
        ks.quantize_with_lora(model, rounds=0)
    ks.wrap_model(model, "lora", "one", rank=2)
    with pytest.raises(ValueError, match="has adapters"):
        ks.quantize_with_lora(model)
    ks.unwrap_model(model)
    model.quantize("int8")
    with pytest.raises(ValueError, match="is quantised"):
        ks.quantize_with_lora(model, target="all")
