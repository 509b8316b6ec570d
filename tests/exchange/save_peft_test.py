import json
import os

import keras_hub
import numpy as np
import pytest
from keras import ops
from peft_folders import bert
from peft_folders import check_equal
from peft_folders import distance
from peft_folders import golden
from peft_folders import gpt2
from peft_folders import inputs
from peft_folders import llama
from peft_folders import outputs
from peft_folders import read
from peft_folders import trained
from peft_folders import weights

import keras_spectral as ks
from keras_spectral.model.hosts import member_places

QKV = r".*/(query|key|value)"


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.once
def test_peft_s_own_folder_comes_out_as_it_went_in(tmp_path, family, adapter):
    base = str(golden(family, "base"))
    if family == "bert":
        backbone = keras_hub.models.BertBackbone.from_preset(base)
        model = keras_hub.models.BertTextClassifier(
            backbone=backbone, num_classes=3, preprocessor=None
        )
    else:
        backbone = keras_hub.models.Llama3Backbone.from_preset(base)
        model = keras_hub.models.Llama3CausalLM(
            backbone=backbone, preprocessor=None
        )
    ks.load_peft(model, golden(family, adapter))
    errors = ks.save_peft(model, tmp_path / "out", base=f"{family}/base")
    assert set(errors.values()) == {0.0}
    wanted, fields = read(golden(family, adapter))
    tensors, config = read(tmp_path / "out")
    check_equal(tensors, wanted)
    for name in ("peft_type", "task_type", "r", "lora_alpha", "use_dora"):
        assert config.get(name) == fields.get(name), name
    for name in ("rank_pattern", "alpha_pattern", "use_rslora", "bias"):
        assert config.get(name) == fields.get(name), name
    assert config["base_model_name_or_path"] == f"{family}/base"
    modules = {k.partition(".lora_")[0].partition(".ia3_")[0] for k in wanted}
    targets = {m for m in modules if not m.startswith("classifier")}
    assert set(config["target_modules"]) == targets
    if family == "bert":
        assert config["modules_to_save"] == ["classifier"]


_TRIPS = [
    (bert, "lora", {"target": "all-linear", "rank": 3}),
    (bert, "lora", {"target": QKV, "rank": 3, "scaling": "rslora"}),
    (bert, "lora", {"target": QKV, "rank": 2, "trainable": "biases"}),
    (llama, "lora", {"target": "attention", "rank": 2, "alpha": 0.3}),
    (llama, "dora", {"target": QKV, "rank": 2, "alpha": 7}),
    (llama, "ia3", {"target": None}),
    (gpt2, "lora", {"target": QKV, "rank": 2, "alpha": 3}),
    (gpt2, "lora", {"target": "attention", "rank": 2, "alpha": 3}),
    (gpt2, "lora", {"target": QKV, "rank": 4, "scaling": "rslora"}),
]


@pytest.mark.parametrize(
    "make, method, options",
    [
        _TRIPS[0],
        *(pytest.param(*trip, marks=pytest.mark.once) for trip in _TRIPS[1:]),
    ],
)
def test_round_trip(tmp_path, make, method, options):
    options = dict(options)
    model = trained(make(), method, options.pop("target"), **options)
    assert set(ks.save_peft(model, tmp_path / "a").values()) == {0.0}
    back = ks.load_peft(make(), tmp_path / "a")
    assert distance(outputs(back), outputs(model)) < 1e-5
    if options.get("trainable") != "biases":
        check_equal(weights(back), weights(model))
    ks.save_peft(back, tmp_path / "b")
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert first[1] == second[1]
    if options.get("trainable") != "biases":
        check_equal(second[0], first[0])


@pytest.mark.once
def test_ranks_and_alphas_of_single_layers(tmp_path):
    model = trained(
        bert(),
        "lora",
        QKV,
        rank=2,
        overrides={
            r".*layer_1/.*/query": {"rank": 4, "alpha": 4},
            r".*layer_0/.*/key": {"alpha": 6},
        },
    )
    ks.save_peft(model, tmp_path)
    _, config = read(tmp_path)
    path = "bert.encoder.layer.{}.attention.self.{}"
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert config["rank_pattern"] == {path.format(1, "query"): 4}
    assert config["alpha_pattern"] == {
        path.format(1, "query"): 4,
        path.format(0, "key"): 6,
    }
    back = ks.load_peft(bert(), tmp_path)
    check_equal(weights(back), weights(model))


@pytest.mark.once
def test_three_layers_become_one_module(tmp_path):
    model = trained(gpt2(), "lora", QKV, rank=2, alpha=3)
    ks.save_peft(model, tmp_path)
    tensors, config = read(tmp_path)
    path = "transformer.h.0.attn.c_attn"
    assert (config["r"], config["lora_alpha"]) == (6, 9)
    assert config["fan_in_fan_out"] is True
    b = tensors[f"{path}.lora_B.weight"]
    assert tensors[f"{path}.lora_A.weight"].shape == (6, 8)
    assert b.shape == (24, 6)
    mask = np.kron(np.eye(3), np.ones((8, 2)))
    assert np.all((b != 0) == (mask != 0))


@pytest.mark.parametrize(
    "method, options, ranks",
    [
        ("spectral", {"rank": 2}, {4}),
        ("spectral", {"rank": 2, "mode": "rotate"}, {2}),
        ("gated_spectral", {"rank": 2, "directions": 3}, {3}),
        ("dylora", {"rank": 3}, {3}),
        ("adalora", {"rank": 3}, {3}),
        ("lora", {"rank": 2, "initializer": "pissa"}, {4}),
        ("lora", {"rank": 2, "initializer": "olora"}, {4}),
        ("lora_fa", {"rank": 2}, {2}),
        ("lora", {"rank": 2, "dropout": 0.1}, {2}),
    ],
)
@pytest.mark.once
def test_what_is_a_lora_is_written_as_one(tmp_path, method, options, ranks):
    model = trained(bert(), method, QKV, **options)
    assert max(ks.save_peft(model, tmp_path).values()) == 0.0
    tensors, config = read(tmp_path)
    found = {len(x) for name, x in tensors.items() if "lora_A" in name}
    assert config["peft_type"] == "LORA" and found == ranks
    back = ks.load_peft(bert(), tmp_path)
    assert distance(outputs(back), outputs(model)) < 1e-5


@pytest.mark.once
def test_ranks_that_do_nothing_are_left_out(tmp_path):
    model = trained(bert(), "adalora", QKV, rank=3)
    for place in member_places(model):
        if place.path.endswith("key"):
            place.layer.lora_e.assign([0.0, 1.0, 0.0])
    ks.save_peft(model, tmp_path)
    _, config = read(tmp_path)
    assert config["r"] == 3 and set(config["rank_pattern"].values()) == {1}
    back = ks.load_peft(bert(), tmp_path)
    assert distance(outputs(back), outputs(model)) < 1e-5


@pytest.mark.once
def test_truncation_is_told(tmp_path):
    model = trained(bert(), "spectral", QKV, rank=2, mode="values")
    with pytest.raises(ValueError, match="has no low rank. Expected rank="):
        ks.save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    errors = ks.save_peft(model, tmp_path / "out", rank=1)
    assert len(errors) == 6 and 0 < min(errors.values()) < 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{max(errors.values()):.3g}" in card
    model = trained(bert(), "lora", QKV, rank=3)
    errors = ks.save_peft(model, tmp_path / "out", rank=2)
    back = ks.load_peft(bert(), tmp_path / "out")
    for place, was in zip(member_places(back), member_places(model)):
        if place.path not in errors:
            continue
        wanted = ops.convert_to_numpy(was.layer.delta_matrix())
        missing = wanted - ops.convert_to_numpy(place.layer.delta_matrix())
        error = np.linalg.norm(missing) / np.linalg.norm(wanted)
        assert place.layer.rank == 2
        np.testing.assert_allclose(errors[place.path], error, rtol=1e-4)


@pytest.mark.once
def test_heads_and_copies_go_with_it(tmp_path):
    model = trained(
        bert(),
        "lora",
        QKV,
        rank=2,
        trainable=["logits", r".*/embeddings_layer_norm", r".*/pooled_dense"],
    )
    ks.save_peft(model, tmp_path)
    tensors, config = read(tmp_path)
    assert config["modules_to_save"] == [
        "bert.embeddings.LayerNorm",
        "bert.pooler.dense",
        "classifier",
    ]
    assert tensors["classifier.weight"].shape == (3, 8)
    back = ks.load_peft(bert(), tmp_path)
    check_equal(weights(back), weights(model))


@pytest.mark.once
def test_head_is_there_though_it_was_not_trained(tmp_path):
    model = trained(bert(), "lora", QKV, rank=2, trainable=[])
    ks.save_peft(model, tmp_path)
    head = ops.convert_to_numpy(model.get_layer("logits").kernel)
    tensors, _ = read(tmp_path)
    np.testing.assert_array_equal(tensors["classifier.weight"], head.T)


@pytest.mark.once
def test_one_of_several_adapters(tmp_path):
    model = trained(bert(), "lora", QKV, rank=2, adapter="a")
    trained(model, "lora", "attention", rank=3, adapter="b")
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*one adapter"):
        ks.save_peft(model, tmp_path / "x")
    with pytest.raises(ValueError, match="no adapter 'c'"):
        ks.save_peft(model, tmp_path / "x", adapter="c")
    with pytest.raises(ValueError, match="one adapter"):
        ks.save_peft(model, tmp_path / "x", adapter=["a"])
    ks.save_peft(model, tmp_path / "x", adapter="a")  # though "b" is active
    back = ks.load_peft(bert(), tmp_path / "x", adapter="a")
    ks.set_adapters(model, "a")
    assert distance(outputs(back), outputs(model)) < 1e-6


@pytest.mark.once
def test_prefix_comes_back(tmp_path):
    model = trained(llama(), "prefix", "blocks", length=3)
    ks.save_peft(model, tmp_path)
    tensors, config = read(tmp_path)
    assert config["peft_type"] == "PREFIX_TUNING"
    assert tensors["prompt_embeddings"].shape == (3, 2 * 2 * 4)
    back = ks.load_peft(llama(), tmp_path)
    for name, value in weights(model).items():
        np.testing.assert_allclose(weights(back)[name], value, atol=1e-6)


@pytest.mark.once
def test_soft_prompt_comes_back(tmp_path):
    model = trained(bert(), "soft_prompt", None, length=3, position=0)
    ks.save_peft(model, tmp_path)
    back = ks.load_peft(bert(), tmp_path)
    check_equal(weights(back), weights(model))
    model = trained(bert(), "soft_prompt", None, length=3)
    with pytest.raises(ValueError, match="behind 1 tokens.*position=0"):
        ks.save_peft(model, tmp_path)


@pytest.mark.parametrize(
    "method, options, match",
    [
        ("bottleneck", {"target": "blocks", "size": 2}, "one of PEFT's kinds"),
        ("bitfit", {"target": "biases"}, "trains biases alone"),
        ("decaying_lora", {"target": QKV}, "has no low rank"),
        ("prefix", {"target": r".*layer_0"}, "on 1 of 2 blocks"),
        ("prefix", {"target": "blocks"}, "positions from a table"),
    ],
)
@pytest.mark.once
def test_what_peft_has_not(tmp_path, method, options, match):
    options = dict(options)
    model = trained(bert(), method, options.pop("target"), **options)
    with pytest.raises(ValueError, match=match):
        ks.save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.once
def test_methods_that_do_not_mix(tmp_path):
    model = trained(bert(), "lora", r".*/query", rank=2)
    ks.wrap_model(model, "dora", r".*/key", rank=2)
    with pytest.raises(ValueError, match="DoRADense on all or on none"):
        ks.save_peft(model, tmp_path)
    model = trained(bert(), "lora", r".*/query", rank=2)
    ks.wrap_model(model, "ia3", r".*/key")
    with pytest.raises(ValueError, match=r"\['ia3', 'lora'\]"):
        ks.save_peft(model, tmp_path)
    model = trained(bert(), "ia3", r".*/query", trainable="biases")
    with pytest.raises(ValueError, match="trains its bias"):
        ks.save_peft(model, tmp_path)
    with pytest.raises(ValueError, match="has no adapters"):
        ks.save_peft(bert(), tmp_path)


@pytest.mark.once
def test_layer_without_a_name_there(tmp_path):
    model = trained(
        bert(), "lora", QKV, rank=2, trainable=[r".*/position_embedding"]
    )
    ks.save_peft(model, tmp_path)
    model = trained(gpt2(), "lora", QKV, rank=2, trainable=[r".*_0/.*/query"])
    assert ks.adapter_names(model) == ["default"]
    model = trained(gpt2(), "lora", r".*/query", trainable=[r".*_0/.*/key"])
    with pytest.raises(ValueError, match="made of several layers here"):
        ks.save_peft(model, tmp_path)


@pytest.mark.once
def test_nothing_is_written_of_diverged_weights(tmp_path):
    model = trained(bert(), "lora", QKV, rank=2)
    ks.save_peft(model, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    weight = model.trainable_weights[0]
    weight.assign(np.full(weight.shape, np.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        ks.save_peft(model, tmp_path / "out")
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(ValueError, match="NaN or infinite"):
        ks.save_peft(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.once
def test_files(tmp_path):
    model = trained(bert(), "lora", QKV, rank=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    ks.save_peft(model, tmp_path, base="google-bert/bert-base-uncased")
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]
    card = (tmp_path / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    fields = dict(line.split(": ", 1) for line in head.splitlines())
    assert json.loads(fields["base_model"]) == "google-bert/bert-base-uncased"
    assert fields["library_name"] == "peft"
    assert "PeftModel.from_pretrained(base" in text
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ks.save_peft(model, tmp_path / "a" / "b")
    assert inputs(model).keys() == {"token_ids", "padding_mask", "segment_ids"}


def test_a_card_of_ones_own_stays(tmp_path):
    model = trained(bert(), "lora", QKV, rank=2)
    (tmp_path / "README.md").write_text("Mine.")
    ks.save_peft(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "Mine."
    back = ks.load_peft(bert(), tmp_path)
    assert distance(outputs(back), outputs(model)) < 1e-5
