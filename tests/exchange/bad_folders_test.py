"""Folders that are refused: the model stays as it was."""

import json
import pickle

import numpy as np
import pytest
from peft_folders import assert_refused
from peft_folders import bert
from peft_folders import llama
from peft_folders import lora
from peft_folders import outputs
from peft_folders import pair
from peft_folders import write

import keras_spectral as ks

pytestmark = pytest.mark.once

PATH = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path, lora(PATH, 8, 8), target_modules=[PATH])


def test_after_an_error_a_good_folder_loads(folder, tmp_path):
    good = write(tmp_path / "good", lora(PATH, 8, 8), target_modules=[PATH])
    write(folder, lora(PATH, 6, 8), target_modules=[PATH])
    model = assert_refused(folder, "shape")
    plain = outputs(model)
    ks.load_peft(model, good)
    assert np.abs(outputs(model) - plain).max() > 1e-5


def test_adapters_that_are_there_stay_as_they_were(folder):
    model = ks.load_peft(bert(), folder, adapter="first")
    ks.set_adapters(model, {"first": 0.5})
    tensors = lora(PATH, 8, 8)
    tensors[f"{PATH}.lora_B.weight"][0, 0] = np.nan
    write(folder, tensors, target_modules=[PATH])
    assert_refused(folder, "NaN or infinite", model=model)


def test_no_folder(tmp_path):
    assert_refused(tmp_path / "none", "There is no folder", FileNotFoundError)
    assert_refused("someone/adapter", "snapshot_download", FileNotFoundError)


def test_no_config(folder):
    (folder / "adapter_config.json").unlink()
    assert_refused(folder, "There is no adapter_config.json", FileNotFoundError)


def test_no_tensors(folder):
    (folder / "adapter_model.safetensors").unlink()
    assert_refused(folder, "There is no adapter_model", FileNotFoundError)


def test_pickle_is_not_read(folder):
    class Bomb:
        def __reduce__(self):
            return open, (str(folder / "boom"), "w")

    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert_refused(folder, "a pickle.*save_pretrained")
    assert not (folder / "boom").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\xff"])
def test_damaged_config(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    assert_refused(folder, "adapter_config.json")


def test_truncated_tensors(folder):
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert_refused(folder, "not a readable safetensors")


def test_other_kind_of_numbers(folder):
    from safetensors.numpy import save_file

    tensors = {"base_model.model.x": np.ones(3, "int32")}
    save_file(tensors, folder / "adapter_model.safetensors")
    assert_refused(folder, "of type I32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path, value):
    tensors = lora(PATH, 8, 8)
    tensors[f"{PATH}.lora_A.weight"][0, 0] = value
    write(tmp_path, tensors, target_modules=[PATH])
    assert_refused(tmp_path, "NaN or infinite")


def test_wrong_base(folder):
    assert_refused(folder, "unexpected tensors.*self_attn", model=llama())
    wide = bert(hidden_dim=12)
    assert_refused(folder, r"\(2, 8\).*rank 2 by 12 inputs", model=wide)
    flat = bert(num_layers=1)
    path = PATH.replace("0", "1")
    write(folder, lora(path, 8, 8), target_modules=[path])
    assert_refused(folder, "unexpected tensors.*layer.1", model=flat)


def test_missing_half(tmp_path):
    tensors = lora(PATH, 8, 8)
    del tensors[f"{PATH}.lora_B.weight"]
    write(tmp_path, tensors, target_modules=[PATH])
    assert_refused(tmp_path, "lora_B.weight' is missing")


def test_missing_module(tmp_path):
    write(tmp_path, lora(PATH, 8, 8), target_modules=["query"])
    assert_refused(tmp_path, "lacks tensors for .*layer.1.attention.self.query")
    write(tmp_path, {}, target_modules=["query"])
    assert_refused(tmp_path, "lacks tensors")


@pytest.mark.parametrize(
    "name", ["bert.x.lora_A.weight", f"{PATH}.other", "bert.x.weight"]
)
def test_unexpected_tensor(tmp_path, name):
    tensors = lora(PATH, 8, 8) | {name: np.ones((2, 8))}
    write(tmp_path, tensors, target_modules=[PATH])
    assert_refused(tmp_path, "unexpected tensors.*" + name)


def test_module_by_two_names(tmp_path):
    other = PATH.removeprefix("bert.")
    tensors = lora(PATH, 8, 8) | lora(other, 8, 8)
    write(tmp_path, tensors, target_modules=[PATH])
    assert_refused(tmp_path, "unexpected tensors.*self.query")


def test_layer_that_trains_as_a_copy(tmp_path):
    model = ks.wrap_model(bert(), "lora", rank=2, adapter="a")
    write(tmp_path, lora("classifier", 8, 3), target_modules=["classifier"])
    with pytest.raises(ValueError, match="train as copies with another"):
        ks.load_peft(model, tmp_path)
    assert ks.adapter_names(model) == ["a"]
    ks.load_peft(bert(), tmp_path)


def test_names_without_their_start(tmp_path):
    write(tmp_path, lora(PATH, 8, 8), "", target_modules=[PATH])
    assert_refused(tmp_path, "begin with 'base_model.model.'")


def test_another_number_of_classes(tmp_path):
    tensors = lora(PATH, 8, 8) | {"classifier.weight": np.ones((5, 8))}
    fields = {"target_modules": [PATH], "modules_to_save": ["classifier"]}
    write(tmp_path, tensors, **fields)
    tensors["classifier.bias"] = np.ones(5)
    write(tmp_path, tensors, **fields)
    assert_refused(tmp_path, r"\(5,.*another number of classes")
    tensors["classifier.weight"] = np.ones((3, 8))
    del tensors["classifier.bias"]
    write(tmp_path, tensors, **fields)
    assert_refused(tmp_path, r"lacks the tensors \['classifier.bias'\]")


@pytest.mark.parametrize("kind", ["FOURIERFT", "HRA", "XLORA", None, 3, []])
def test_unknown_kind(folder, kind):
    write(folder, lora(PATH, 8, 8), peft_type=kind)
    assert_refused(folder, r"peft_type=.*Expected one of LORA")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_that_matches_nothing(folder, field):
    fields = {"target_modules": [PATH], field: {"quary": 2}}
    write(folder, lora(PATH, 8, 8), **fields)
    assert_refused(folder, f"'quary' in its {field}, which matches none")


def test_rank_that_is_not_the_tensors(folder):
    write(folder, lora(PATH, 8, 8), target_modules=[PATH], r=4)
    assert_refused(folder, r"\(2, 8\).*rank 4 by 8")


@pytest.mark.parametrize(
    "field, value",
    [
        ("target_parameters", ["experts.down_proj"]),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("r", 0),
        ("r", "2"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("lora_dropout", "none"),
        ("use_rslora", 1),
        ("use_dora", "no"),
        ("bias", "some"),
        ("target_modules", 3),
        ("target_modules", [1]),
        ("target_modules", "(query"),
        ("modules_to_save", {"a": 1}),
        ("layers_to_transform", "0"),
        ("rank_pattern", {"query": 1.5}),
        ("rank_pattern", [2]),
        ("alpha_pattern", {"(": 2}),
    ],
)
def test_field_that_is_refused(folder, field, value):
    write(folder, lora(PATH, 8, 8), **{"target_modules": [PATH], field: value})
    named = field if value not in ("(query", {"(": 2}) else "no regular"
    assert_refused(folder, named)


def test_unknown_field_is_passed_over_with_a_note(folder):
    fields = {"target_modules": [PATH], "of_tomorrow": 3, "off": None}
    write(folder, lora(PATH, 8, 8), **fields)
    with pytest.warns(UserWarning, match="not known.*: of_tomorrow."):
        ks.load_peft(bert(), folder)


def test_convolution_in_place_of_a_linear_layer(tmp_path):
    a, b = pair(8, 8)
    tensors = {
        f"{PATH}.lora_A.weight": a.reshape(2, 2, 2, 2),
        f"{PATH}.lora_B.weight": b,
    }
    write(tmp_path, tensors, target_modules=[PATH])
    assert_refused(tmp_path, r"\(2, 2, 2, 2\)")


def test_prompt_of_another_size(tmp_path):
    fields = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    write(tmp_path, {"prompt_embeddings": np.ones((3, 7))}, "", **fields)
    assert_refused(tmp_path, r"\(3, 7\).*keys and values", model=llama())
    write(tmp_path, {"prompt_embeddings": np.ones((2, 16))}, "", **fields)
    assert_refused(tmp_path, "3 rows, as num_virtual_tokens", model=llama())
    write(tmp_path, lora(PATH, 8, 8), **fields)
    assert_refused(
        tmp_path, "lacks the tensor 'prompt_embeddings'", model=llama()
    )


def test_name_that_is_taken(folder):
    model = ks.load_peft(bert(), folder)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        ks.load_peft(model, folder)


def test_paths_in_the_config_are_not_followed(folder, tmp_path):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/at/all"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = ks.load_peft(bert(), folder)
    assert ks.adapter_names(model) == ["default"]
