"""A file that version 0.1 wrote, from a LoRA, a UniPELT block and a head."""

import pathlib

import block_cases
import keras
import numpy as np

import keras_spectral as ks

FILE = pathlib.Path(__file__).parent / "version_1.safetensors"
# What the model that was saved gave, on PyTorch.
SAVED = [
    [0.5765365958213806, 0.3723081648349762],
    [0.61921226978302, 0.35621678829193115],
]


def _model():
    inputs = keras.Input((4, 8), name="x")
    x = block_cases.Block(name="block")(inputs)
    x = keras.layers.Dense(6, activation="relu", name="hidden")(x[:, 0])
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return model


def _outputs(model):
    x = np.random.default_rng(1).normal(size=(2, 4, 8)).astype("float32")
    return keras.ops.convert_to_numpy(model(x))


def test_it_loads_by_the_name_default():
    model = ks.load_adapters(_model(), FILE)
    assert ks.adapter_names(model) == ["default"]
    np.testing.assert_allclose(_outputs(model), SAVED, atol=1e-5)
    assert model.get_layer("block").bottleneck == 2


def test_it_loads_by_another_name_and_is_saved_as_of_now(tmp_path):
    model = ks.load_adapters(_model(), FILE, adapter="old")
    ks.save_adapters(model, tmp_path / "new.safetensors")
    again = ks.load_adapters(_model(), tmp_path / "new.safetensors")
    assert ks.adapter_names(again) == ["old"]
    np.testing.assert_allclose(_outputs(again), SAVED, atol=1e-5)
    ks.load_adapters(again, FILE, adapter="old")  # a swap of values
    np.testing.assert_allclose(_outputs(again), SAVED, atol=1e-5)
