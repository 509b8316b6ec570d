"""Folders of VeRA, LoHa, LoKr, OFT and BOFT that are refused."""

import numpy as np
import pytest
from peft_folders import assert_refused
from peft_folders import bert
from peft_folders import distance
from peft_folders import llama
from peft_folders import outputs
from peft_folders import write

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places

PATH = "bert.encoder.layer.0.attention.self.query"


def good(kind, tensors=(), **fields):
    """The tensors and fields of an adapter of one layer (8 x 8)."""
    rng = np.random.default_rng(0)
    shapes, config = {
        "VERA": ({"vera_lambda_d": (3,), "vera_lambda_b": (8,)}, {"r": 3}),
        "LOHA": (
            {
                **{f"hada_w{i}_a": (8, 2) for i in (1, 2)},
                **{f"hada_w{i}_b": (2, 8) for i in (1, 2)},
            },
            {"r": 2, "alpha": 4},
        ),
        "LOKR": (
            {"lokr_w1": (2, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
            {"r": 1, "alpha": 4},
        ),
        "OFT": (
            {"oft_R.weight": (2, 6)},
            {"oft_block_size": 4, "use_cayley_neumann": False},
        ),
        "BOFT": (
            {"boft_R": (1, 2, 4, 4), "boft_s": (8, 1)},
            {"boft_block_size": 4},
        ),
    }[kind]
    named = {f"model.{PATH}.{name}": shape for name, shape in shapes.items()}
    if kind == "VERA":
        named |= {"vera_A": (3, 8), "vera_B": (8, 3)}
    named |= {
        name if name in named else f"model.{PATH}.{name}": shape
        for name, shape in dict(tensors).items()
    }
    tensors = {
        name: rng.normal(size=shape)
        for name, shape in named.items()
        if shape is not None
    }
    config |= {"peft_type": kind, "target_modules": [PATH], **fields}
    return tensors, config


_KINDS = ["VERA", "LOHA", "LOKR", "OFT", "BOFT"]


@pytest.mark.parametrize("kind", _KINDS)
def test_good_folder(tmp_path, kind):
    tensors, config = good(kind)
    model = bert()
    before = outputs(model)
    write(tmp_path, tensors, "base_model.", **config)
    ks.load_peft(model, tmp_path)
    assert distance(outputs(model), before) > 1e-5


@pytest.mark.parametrize(
    "kind, tensors, match",
    [
        ("VERA", {"vera_lambda_d": None}, "vera_lambda_d' is missing"),
        ("VERA", {"vera_lambda_b": (7,)}, r"\(7,\). Expected \(8,\)"),
        ("VERA", {"vera_A": None}, "vera_A'.*are missing.*save_projection"),
        ("VERA", {"vera_A": (3, 7)}, r"\(3, 7\).*Expected \(3, 8\)"),
        ("VERA", {"vera_A": (2, 8)}, r"\(2, 8\).*Expected \(3, 8\)"),
        ("VERA", {"vera_B": (3, 8)}, r"\(3, 8\). Expected .*\(8, 3\)"),
        ("LOHA", {"hada_w2_b": None}, "hada_w2_b' is missing"),
        ("LOHA", {"hada_w1_a": (8, 3)}, r"\(8, 3\). Expected \(8, 2\)"),
        ("LOHA", {"hada_t1": (2, 2, 1, 1)}, "hada_t1' is unexpected"),
        ("LOKR", {"lokr_w1": None}, "lokr_w1' is missing"),
        ("LOKR", {"lokr_w2_a": (2, 1)}, r"\(2, 1\). Expected \(4, 1\)"),
        ("LOKR", {"lokr_w2": (4, 4)}, "lokr_w2' is unexpected"),
        ("LOKR", {"lokr_t2": (1, 1, 1, 1)}, "use_effective_conv2d=False"),
        ("OFT", {"oft_R.weight": None}, "lacks tensors"),
        ("OFT", {"oft_R.weight": (2, 5)}, r"\(2, 5\). Expected \(2, 6\)"),
        ("OFT", {"oft_R.weight": (6,)}, r"\(6,\). Expected \(2, 6\)"),
        ("OFT", {"lora_A.weight": (2, 8)}, "lora_A.weight' is unexpected"),
        ("BOFT", {"boft_s": None}, "boft_s' is missing"),
        ("BOFT", {"boft_s": (1, 8)}, r"\(1, 8\). Expected \(8, 1\)"),
        ("BOFT", {"boft_R": (3, 2, 4, 4)}, r"\(3, .*Expected \(1, 2, 4, 4\)"),
        ("BOFT", {"boft_R": (1,)}, r"\(1,\). Expected \(1, 2, 4, 4\)"),
        ("BOFT", {"other": (1,)}, "unexpected tensors.*other"),
    ],
)
@pytest.mark.once
def test_bad_tensors(tmp_path, kind, tensors, match):
    tensors, config = good(kind, tensors)
    write(tmp_path, tensors, "base_model.", **config)
    assert_refused(tmp_path, match)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.once
def test_wrong_base(tmp_path, kind):
    tensors, config = good(kind)
    write(tmp_path, tensors, "base_model.", **config)
    assert_refused(tmp_path, "Expected", model=bert(hidden_dim=12))
    assert_refused(tmp_path, "unexpected tensors", model=llama())
    _, other = good(_KINDS[_KINDS.index(kind) - 1])
    write(tmp_path, tensors, "base_model.", **other)
    assert_refused(tmp_path, "Expected")


@pytest.mark.parametrize(
    "kind, field, value",
    [
        ("VERA", "r", 0),
        ("VERA", "d_initial", 0),
        ("VERA", "bias", "lora_only"),
        ("VERA", "save_projection", 1),
        ("LOHA", "r", 4),
        ("LOHA", "alpha", "4"),
        ("LOHA", "use_effective_conv2d", "yes"),
        ("LOHA", "rank_pattern", {"quary": 2}),
        ("LOKR", "decompose_factor", 0),
        ("LOKR", "decompose_factor", 8),
        ("LOKR", "decompose_both", None),
        ("OFT", "use_cayley_neumann", None),
        ("OFT", "num_cayley_neumann_terms", 2),
        ("OFT", "r", 2),
        ("OFT", "oft_block_size", 0),
        ("OFT", "oft_block_size", 8),
        ("OFT", "block_share", True),
        ("OFT", "coft", 1),
        ("OFT", "eps", "6e-5"),
        ("BOFT", "boft_block_num", 2),
        ("BOFT", "boft_block_size", 2),
        ("BOFT", "boft_block_size", 3),
        ("BOFT", "boft_n_butterfly_factor", 0),
    ],
)
@pytest.mark.once
def test_bad_field(tmp_path, kind, field, value):
    tensors, config = good(kind, **{field: value})
    write(tmp_path, tensors, "base_model.", **config)
    assert_refused(tmp_path, f"{field}|Expected .*, as this model's|is missing")


@pytest.mark.parametrize("version", [None, "0.17.1", "nightly"])
@pytest.mark.once
def test_series_of_before(tmp_path, version):
    series = {"use_cayley_neumann": True, "peft_version": version}
    tensors, config = good("OFT", **series)
    write(tmp_path, tensors, "base_model.", **config)
    assert_refused(tmp_path, "peft_version=.*0.18 PEFT's series")
    config["peft_version"] = "0.19.0.dev0@UNKNOWN"
    write(tmp_path, tensors, "base_model.", **config)
    model = ks.load_peft(bert(), tmp_path)
    assert adapter_places(model)[0].layer.neumann_terms == 5


@pytest.mark.once
def test_dropout_that_is_not_here_is_told(tmp_path):
    tensors, config = good("BOFT", boft_dropout=0.1)
    write(tmp_path, tensors, "base_model.", **config)
    with pytest.warns(UserWarning, match="boft_dropout=0.1.*without it"):
        ks.load_peft(bert(), tmp_path)
