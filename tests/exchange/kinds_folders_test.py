"""Folders of VeRA, LoHa, LoKr, OFT and BOFT: out and back."""

import numpy as np
import pytest
from keras import ops
from peft_folders import bert
from peft_folders import check_equal
from peft_folders import distance
from peft_folders import gpt2
from peft_folders import llama
from peft_folders import outputs
from peft_folders import read
from peft_folders import trained
from peft_folders import weights
from peft_folders import write

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places

QV = r".*/(query|value)"


def pairs(model):
    """The frozen pair that VeRA's layers share, if there is one."""
    shared = {id(p.layer.shared): p.layer.shared for p in adapter_places(model)}
    return [
        {w.name: ops.convert_to_numpy(w) for w in layer.weights}
        for layer in shared.values()
        if layer is not None
    ]


_TRIPS = [
    (bert, "vera", {"rank": 5}),
    (llama, "loha", {"rank": 2, "alpha": 3}),
    (llama, "lokr", {"rank": 1, "alpha": 0.3}),
    (bert, "oft", {"block_size": 4}),
    (llama, "boft", {"block_size": 4, "factors": 2}),
]
_MORE_TRIPS = [
    (llama, "vera", {"rank": 20, "d_initial": -0.2, "dropout": 0.1}),
    (gpt2, "vera", {"rank": 3, "target": r".*feedforward.*_dense"}),
    (bert, "loha", {"target": "all-linear", "rank": 3}),
    (llama, "lokr", {"rank": 1, "factor": 2, "decompose_both": True}),
    (bert, "lokr", {"rank": 9, "target": "all-linear"}),
    (llama, "oft", {"block_size": 2, "neumann_terms": 5, "eps": 0.1}),
    (bert, "oft", {"block_size": 4, "block_share": True}),
    (bert, "boft", {"block_size": 2, "target": "all-linear"}),
]


@pytest.mark.parametrize(
    "make, method, options",
    [
        *_TRIPS,
        *(pytest.param(*x, marks=pytest.mark.once) for x in _MORE_TRIPS),
    ],
)
def test_round_trip(tmp_path, make, method, options):
    options = dict(options)
    target = options.pop("target", QV)
    model = trained(make(), method, target, **options)
    assert set(ks.save_peft(model, tmp_path / "a").values()) == {0.0}
    back = ks.load_peft(make(), tmp_path / "a")
    check_equal(weights(back), weights(model))
    for found, expected in zip(pairs(back), pairs(model), strict=True):
        check_equal(found, expected)
    assert distance(outputs(back), outputs(model)) < 1e-6
    for new, old in zip(adapter_places(back), adapter_places(model)):
        kept = old.layer.options() | {"seed": None, "pair": None}
        assert new.layer.options() | {"seed": None, "pair": None} == kept
    ks.save_peft(back, tmp_path / "b")
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert first[1] == second[1]
    check_equal(second[0], first[0])
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"A {first[1]['peft_type']} adapter" in card


@pytest.mark.once
def test_vera_s_pair_is_of_the_size_that_is_needed(tmp_path):
    model = trained(bert(), "vera", "all-linear", rank=3)
    (pair,) = pairs(model)
    ks.save_peft(model, tmp_path / "a")
    tensors, fields = read(tmp_path / "a")
    assert tensors["base_model.vera_A"].shape == (3, 12)
    tensors = {
        key if key.startswith("base_model.") else f"base_model.model.{key}": x
        for key, x in tensors.items()
    }
    for name, axis in (("vera_A", 1), ("vera_B", 0)):
        name = f"base_model.{name}"
        more = np.ones_like(tensors[name])
        tensors[name] = np.concatenate([tensors[name], more], axis)
    write(tmp_path / "b", tensors, "", **fields)
    back = ks.load_peft(bert(), tmp_path / "b")
    check_equal(pairs(back)[0], pair)
    assert distance(outputs(back), outputs(model)) < 1e-6


@pytest.mark.once
def test_two_adapters_have_a_pair_each(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        model = trained(bert(), "vera", QV, rank=3, seed=seed)
        ks.save_peft(model, tmp_path / name)
    model = bert()
    for name in ("a", "b"):
        ks.load_peft(model, tmp_path / name, adapter=name)
    first, second = pairs(model)
    assert np.abs(first["vera_a"] - second["vera_a"]).max() > 0.1
    ks.save_peft(model, tmp_path / "c", adapter="a")
    check_equal(read(tmp_path / "c")[0], read(tmp_path / "a")[0])


@pytest.mark.parametrize("method", ["vera", "loha", "lokr", "oft", "boft"])
@pytest.mark.once
def test_rank_writes_a_lora(tmp_path, method):
    options = {"block_size": 4} if "oft" in method else {"rank": 1}
    model = trained(bert(), method, QV, **options)
    errors = ks.save_peft(model, tmp_path, rank=8)
    assert max(errors.values()) < 1e-5
    assert read(tmp_path)[1]["peft_type"] == "LORA"
    back = ks.load_peft(bert(), tmp_path)
    assert distance(outputs(back), outputs(model)) < 1e-5


@pytest.mark.once
def test_biases_go_with_it(tmp_path):
    model = trained(bert(), "oft", QV, block_size=4, trainable="biases")
    ks.save_peft(model, tmp_path)
    assert read(tmp_path)[1]["bias"] == "all"
    back = ks.load_peft(bert(), tmp_path)
    assert distance(outputs(back), outputs(model)) < 1e-5
    model = trained(bert(), "loha", QV, rank=1, trainable="biases")
    with pytest.raises(ValueError, match="trains its bias.*beside LOHA"):
        ks.save_peft(model, tmp_path / "x")


@pytest.mark.parametrize(
    "method, options, match",
    [
        ("vera", {"target": "attention"}, r"3 layers here.*rank=\.\.\."),
        ("oft", {"block_size": 4, "target": r".*_dense"}, "lies as .in, out"),
        (
            "loha",
            {"rank": 1, "target": r".*/segment_embedding"},
            "a table.*PEFT has none for it",
        ),
    ],
)
@pytest.mark.once
def test_modules_that_peft_s_kinds_do_not_fit(tmp_path, method, options, match):
    options = dict(options)
    model = gpt2() if method != "loha" else bert()
    model = trained(model, method, options.pop("target"), **options)
    with pytest.raises(ValueError, match=match):
        ks.save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "method, options, other, match",
    [
        ("vera", {}, {"d_initial": 0.3}, "one d_initial for all"),
        ("lokr", {"rank": 1}, {"factor": 2}, "one decompose_factor for all"),
        ("oft", {"block_size": 4}, {"eps": 0.1}, "one eps for all"),
        ("oft", {"block_size": 4}, {"neumann_terms": 4}, "one num_cayley"),
        ("oft", {"block_size": 4}, {"block_size": 2}, "one oft_block_size"),
        ("oft", {"block_size": 4}, {"block_share": True}, "one block_share"),
        ("boft", {"block_size": 4}, {"block_size": 2}, "one boft_block_size"),
        ("boft", {"block_size": 4}, {"factors": 2}, "one boft_n_butterfly"),
    ],
)
@pytest.mark.once
def test_what_peft_has_once_for_all(tmp_path, method, options, other, match):
    overrides = {r".*layer_1/.*/query": other}
    model = trained(bert(), method, QV, **options, overrides=overrides)
    with pytest.raises(ValueError, match=match):
        ks.save_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.once
def test_more_that_peft_has_not(tmp_path, monkeypatch):
    model = trained(bert(), "oft", QV, block_size=4, neumann_terms=3)
    with pytest.raises(ValueError, match="neumann_terms=3. Expected 0, or 4"):
        ks.save_peft(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(ks.VeRADense, "connect", lambda adapters: None)
        model = trained(bert(), "vera", QV, rank=3)
    with pytest.raises(ValueError, match="have 4 pairs"):
        ks.save_peft(model, tmp_path / "out")
    model = trained(bert(), "vera", r".*/query", rank=3)
    trained(model, "lora", r".*/key", rank=2)
    ks.save_peft(model, tmp_path / "out")  # which both are
    assert read(tmp_path / "out")[1]["peft_type"] == "LORA"


@pytest.mark.once
def test_blocks_of_one_number(tmp_path):
    overrides = {r".*feedforward_output_dense": {"block_size": 6}}
    target = r".*(query|feedforward_output_dense)"
    model = trained(bert(), "oft", target, block_size=4, overrides=overrides)
    ks.save_peft(model, tmp_path)
    fields = read(tmp_path)[1]
    assert (fields["r"], fields["oft_block_size"]) == (2, 0)
    check_equal(weights(ks.load_peft(bert(), tmp_path)), weights(model))
