import h5py
import numpy as np
import pytest
from peft_folders import bert
from peft_folders import distance
from peft_folders import gpt2
from peft_folders import llama
from peft_folders import outputs

import keras_spectral as ks
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject


def saved(model, path, rank=3, layers=None):
    """Lets Keras's own LoRA have numbers, saves them; the model's outputs."""
    model.backbone.enable_lora(rank, target_layer_names=layers)
    rng = np.random.default_rng(1)
    for weight in model.backbone.trainable_weights:
        if "lora_kernel" in weight.name:
            weight.assign(rng.normal(0, 0.3, weight.shape))
    model.backbone.save_lora_weights(str(path))
    return outputs(model)


@pytest.mark.parametrize(
    "make",
    [
        bert,
        pytest.param(llama, marks=pytest.mark.once),
        pytest.param(gpt2, marks=pytest.mark.once),
    ],
)
def test_equals_keras_s_own(tmp_path, make):
    path = tmp_path / "a.lora.h5"
    expected = saved(make(), path)
    model = make()
    before = outputs(model)
    assert ks.load_keras_lora(model, path, adapter="old") is model
    assert distance(before, expected) > 1e-2
    assert distance(outputs(model), expected) < 1e-5
    ks.merge_model(model)
    assert distance(outputs(model), expected) < 1e-5


@pytest.mark.once
def test_every_kind_of_kernel(tmp_path):
    names = ["query", "key", "value", "attention_output"]
    names += ["feedforward_intermediate_dense", "feedforward_output_dense"]
    path = tmp_path / "a.lora.h5"
    expected = saved(bert(), path, 3, names)
    model = ks.load_keras_lora(bert(), path)
    assert distance(outputs(model), expected) < 1e-5
    ranks = {
        place.path.rpartition("/")[2]: place.layer.rank
        for place in places(model)
        if place.layer is not subject(place.layer)
    }
    # Two heads of three; the others have their rank, at most the kernel's.
    assert ranks == {
        "query": 6,
        "key": 6,
        "value": 6,
        "attention_output": 3,
        "feedforward_intermediate_dense": 3,
        "feedforward_output_dense": 3,
    }


@pytest.mark.once
def test_rank_above_the_kernel_s(tmp_path):
    path = tmp_path / "a.lora.h5"
    expected = saved(bert(), path, 6)
    model = ks.load_keras_lora(bert(), path)
    assert distance(outputs(model), expected) < 1e-5


@pytest.mark.once
def test_into_a_wrapped_model(tmp_path):
    path = tmp_path / "a.lora.h5"
    expected = saved(bert(), path)
    model = ks.wrap_model(bert(), "lora", "all-linear", adapter="other", rank=2)
    ks.load_keras_lora(model, path, adapter="old")
    assert distance(outputs(model), expected) < 1e-5
    with pytest.raises(ValueError, match="has an adapter 'old' already"):
        ks.load_keras_lora(model, path, adapter="old")


@pytest.mark.once
def test_bad_files(tmp_path):
    path, model = tmp_path / "a.lora.h5", bert()
    before = outputs(model)

    def refused(match, error=ValueError):
        with pytest.raises(error, match=match):
            ks.load_keras_lora(model, path)
        assert ks.adapter_names(model) == []
        np.testing.assert_array_equal(outputs(model), before)

    refused("There is no file", FileNotFoundError)
    path.write_bytes(b"no HDF5")
    refused("no readable file of `save_lora_weights`")
    saved(bert(hidden_dim=12, num_layers=2), path)
    refused(r"\(12, 2, 3\).*belongs to another model")
    saved(bert(num_layers=3), path)
    refused("of another model|belongs to another|has .* layers")
    saved(bert(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused("no readable file")
    path.write_bytes(content)
    with h5py.File(path, "a") as file:
        name = next(n for n in file["lora"] if n != "vars")
        home = file["lora"][name]["vars"]
        value = home["lora_kernel_a"][()]
        home["lora_kernel_a"][...] = np.full(value.shape, np.nan)
    refused("NaN or infinite")
    with h5py.File(path, "a") as file:
        home = file["lora"][name]["vars"]
        del home["lora_kernel_a"]
        home["lora_kernel_a"] = h5py.ExternalLink("/etc/other.h5", "/x")
    refused("a link to elsewhere")
