"""Adapters of a model combined into a new one."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.library.merging import combine_deltas
from keras_spectral.library.merging import combine_pairs

X = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
WEIGHTS = {"a": 0.7, "b": -0.3}


def _model(kinds=("lora", "lora"), rank=2, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", name="one"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    rng = np.random.default_rng(2)
    for name, kind in zip("ab", kinds):
        options = {"trainable": "head", **options}
        ks.wrap_model(model, kind, "one", rank=rank, adapter=name, **options)
        for weight in model.trainable_weights:
            weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    return model


def _members(model, layer="one"):
    members = model.get_layer(layer).members()
    return {m.adapter_name: m for m in members}


def _delta(member):
    return ops.convert_to_numpy(member.delta_matrix())


def _out(model):
    return ops.convert_to_numpy(model(X))


@pytest.mark.parametrize("method", ["svd", "cat"])
@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "spectral")])
def test_exact_sums_are_the_mixture(method, kinds):
    model = _model(kinds)
    mixed = _out(ks.set_adapters(model, WEIGHTS))
    errors = ks.combine_adapters(model, WEIGHTS, "c", method)
    assert list(errors) == ["one"] and errors["one"] < 1e-5
    assert ks.adapter_names(model) == ["a", "b", "c"]
    np.testing.assert_allclose(_out(model), mixed, atol=1e-5)
    ks.set_adapters(model, WEIGHTS)
    np.testing.assert_allclose(_out(model), mixed, atol=1e-6)


def test_svd_of_what_has_no_thin_form():
    model = _model(("lora", "spectral"))
    ks.wrap_model(
        model, "spectral", "one", mode="values", adapter="v", trainable=[]
    )
    _members(model)["v"].delta_s.assign(np.linspace(-0.3, 0.5, 6))
    weights = {"a": 0.5, "v": 1.5}
    expected = sum(w * _delta(_members(model)[n]) for n, w in weights.items())
    errors = ks.combine_adapters(model, weights, "c", rank=3)
    values = np.linalg.svd(expected, compute_uv=False)
    error = np.linalg.norm(values[3:]) / np.linalg.norm(values)
    assert errors["one"] == pytest.approx(error, rel=1e-3)
    got = _members(model)["c"]
    assert got.rank == 3
    distance = np.linalg.norm(_delta(got) - expected)
    assert distance / np.linalg.norm(expected) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "magnitude_prune"])
def test_the_pure_functions_do_the_work(method):
    model = _model()
    found = _members(model)
    pairs = []
    for name in "ab":
        a, b = map(ops.convert_to_numpy, found[name].factors())
        pairs.append((a, b, 1.0))
    from keras_spectral._internal.checks import derived_seed

    seed = derived_seed(5, "one")
    weights = list(WEIGHTS.values())
    a, b = combine_pairs(pairs, weights, method, 0.5, rng=seed)
    ks.combine_adapters(model, WEIGHTS, "c", method, density=0.5, seed=5)
    np.testing.assert_allclose(_delta(_members(model)["c"]), a @ b, atol=1e-6)
    deltas = [_delta(found[name]) for name in "ab"]
    name = f"{method}_svd"
    delta = combine_deltas(deltas, weights, name, 0.5, rng=seed)
    errors = ks.combine_adapters(
        model, WEIGHTS, "d", name, density=0.5, seed=5, rank=6
    )
    assert errors["one"] < 1e-5
    np.testing.assert_allclose(_delta(_members(model)["d"]), delta, atol=1e-5)


def test_biases_are_combined_as_well():
    model = _model(trainable="biases")
    before = {
        m.adapter_name: m.bias_delta.numpy()
        for m in model.get_layer("one").members()
        if isinstance(m, ks.BitFit)
    }
    ks.combine_adapters(model, WEIGHTS, "c", "cat")
    (new,) = [
        m
        for m in model.get_layer("one").members()
        if isinstance(m, ks.BitFit) and m.adapter_name == "c"
    ]
    expected = sum(WEIGHTS[name] * value for name, value in before.items())
    np.testing.assert_allclose(new.bias_delta.numpy(), expected, atol=1e-6)


def test_one_of_another_rank():
    model = _model()
    ks.wrap_model(model, "lora", "one", rank=3, adapter="wide", trainable=[])
    weights = {"a": 1.0, "wide": 1.0}
    with pytest.raises(ValueError, match="ranks"):
        ks.combine_adapters(model, weights, "c", "linear")
    ks.combine_adapters(model, weights, "c", "cat")
    assert _members(model)["c"].rank == 5


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (({"a": 1.0, "x": 1.0}, "c"), "no adapter 'x'"),
        (({}, "c"), "Expected {name: weight}"),
        ((["a"], "c"), "Expected {name: weight}"),
        (({"a": float("inf")}, "c"), "finite"),
        ((WEIGHTS, "b"), "already"),
        ((WEIGHTS, "c/d"), "letters, digits"),
        ((WEIGHTS, "c", "tise"), "method"),
        ((WEIGHTS, "c", "ties"), "density"),
    ],
)
def test_bad_input_changes_nothing(arguments, match):
    model = _model()
    before = _out(model)
    with pytest.raises(ValueError, match=match):
        ks.combine_adapters(model, *arguments)
    assert ks.adapter_names(model) == ["a", "b"]
    np.testing.assert_array_equal(_out(model), before)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "ties", "density": -0.5}, "density=-0.5"),
        ({"method": "ties", "density": 0.5, "rank": 2}, "the factors' own"),
        ({"method": "svd", "rank": 0}, "rank=0"),
        ({"method": "svd", "seed": "x"}, "seed"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ks.combine_adapters(_model(), WEIGHTS, "c", **options)


def test_what_is_no_change_of_a_kernel_is_refused():
    model = keras.Sequential(
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(9, 4)]
    )
    ks.wrap_model(model, "lora", "embedding.*", rank=1, adapter="a")
    ks.wrap_model(
        model, "conditional_spectral", "embedding.*", rank=1, adapter="b"
    )
    with pytest.raises(ValueError, match="cannot be merged"):
        ks.combine_adapters(model, {"a": 1.0, "b": 1.0}, "c")
