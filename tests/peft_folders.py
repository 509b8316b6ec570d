"""Tiny models, and folders as HF PEFT writes them."""

import json
import os
import pathlib

import keras_hub
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file
from safetensors.numpy import save_file

import keras_spectral as ks
from keras_spectral.layers.member import own_weights
from keras_spectral.model.hosts import member_places

START = "base_model.model."
_LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
_SIZES = {
    "vocabulary_size": 32,
    "num_layers": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
}


def golden(*names):
    """A path in the folder of golden files, which HF PEFT itself wrote."""
    home = pathlib.Path(os.environ.get("KERAS_SPECTRAL_GOLDEN", "golden"))
    path = home.joinpath("hf_exchange", *names)
    if not path.exists():
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    return path


def bert(num_classes=3, **sizes):
    """A classifier whose every weight is its own."""
    backbone = keras_hub.models.BertBackbone(
        **{**_SIZES, "num_heads": 2, "max_sequence_length": 16, **sizes}
    )
    model = keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=num_classes, preprocessor=None
    )
    return filled(model)


def gpt2():
    backbone = keras_hub.models.GPT2Backbone(
        **_SIZES, num_heads=2, max_sequence_length=16
    )
    return filled(
        keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    )


def llama(**options):
    backbone = keras_hub.models.Llama3Backbone(
        **{**_SIZES, "num_query_heads": 2, "num_key_value_heads": 1, **options}
    )
    return filled(
        keras_hub.models.Llama3CausalLM(backbone=backbone, preprocessor=None)
    )


def filled(model):
    """A model with numbers that are the same on every backend."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        if "float" in str(weight.dtype):
            weight.assign(rng.normal(0, 0.3, weight.shape))
    return model


def inputs(model, length=6):
    ids = np.random.default_rng(1).integers(2, 30, (2, length))
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    if "segment_ids" in model.input:
        x["segment_ids"] = np.zeros_like(ids)
    return x


def outputs(model, x=None):
    x = inputs(model) if x is None else x
    return ops.convert_to_numpy(model(x, training=False))


def distance(got, expected):
    """The largest difference, relative to the largest number."""
    got, expected = map(np.asarray, (got, expected))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def write(folder, tensors, start=START, **config):
    """Writes a folder: a LoRA of rank 2, but for what is said."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    config = {**(config if "peft_type" in config else _LORA | config)}
    config["inference_mode"] = True
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        start + key: np.ascontiguousarray(value, "float32")
        for key, value in tensors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def add(view, change):
    """Adds a change (n_in x n_out) to a kernel."""
    matrix = ops.convert_to_numpy(view.matrix())
    view.assign((matrix + change).astype("float32"))


def read(folder):
    """A folder's tensors without the start of their names, and its fields."""
    folder = pathlib.Path(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    fields = json.loads((folder / "adapter_config.json").read_text())
    return {k.removeprefix(START): v for k, v in tensors.items()}, fields


def pair(n_in, n_out, rank=2, seed=0):
    """PEFT's A (rank, in) and B (out, rank)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rank, n_in)), rng.normal(size=(n_out, rank))


def lora(path, n_in, n_out, rank=2, seed=0):
    """The two tensors of a module."""
    a, b = pair(n_in, n_out, rank, seed)
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def assert_refused(folder, match, error=ValueError, model=None):
    """Checks that loading raises and changes nothing."""
    model = model or bert()
    before, trained = outputs(model), len(model.trainable_weights)
    names = ks.adapter_names(model)
    with pytest.raises(error, match=match):
        ks.load_peft(model, folder)
    assert ks.adapter_names(model) == names
    np.testing.assert_array_equal(outputs(model), before)
    assert len(model.trainable_weights) == trained
    return model


def trained(model, method, target, seed=0, **options):
    """Wraps a model and gives every trained weight a number of its own."""
    ks.wrap_model(model, method, target, **options)
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    return model


def weights(model):
    """All numbers of a model's adapters, by place, method and name."""
    return {
        (place.key, type(place.layer).__name__, w.name): ops.convert_to_numpy(w)
        for place in member_places(model)
        for w in own_weights(place.layer)
    }


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, str(name))
