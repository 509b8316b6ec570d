import block_cases
import keras
import numpy as np
import pytest
from block_cases import WIDTH
from keras import ops

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places
from keras_spectral.search import parts as gate_search

PARTS = {"lora": 2, "prefix": 3, "bottleneck": 2}
SIZES = {"lora": 8 * WIDTH, "prefix": 6 * WIDTH, "adapter": 4 * WIDTH}


def _outputs(model):
    return ops.convert_to_numpy(model(block_cases.inputs()))


def _wrapped(**options):
    model = block_cases.model()
    ks.wrap_model(model, "unipelt", seed=1, **{**PARTS, **options})
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    return model


def _blocks(model):
    return [model.get_layer(f"block_{i}") for i in range(2)]


def _shut(block, *names):
    """Closes sigmoid gates, all the way and for a long time."""
    low = ops.convert_to_numpy(block.low_steps)
    for name in names:
        kernel, bias = block.gates.weights[name]
        kernel.assign(kernel * 0)
        bias.assign(bias * 0 - 1e9)
        low[block.gate_names.index(name)] = 1000
    block.low_steps.assign(low)


def test_gates_of_every_example():
    model = _wrapped(overrides={"block_1": {"prefix": 0}})
    gates = ks.collect_gates(model, block_cases.inputs())
    assert list(gates) == ["block_0", "block_1"]
    assert list(gates["block_1"]) == ["lora_query", "lora_value", "adapter"]
    for block in _blocks(model):
        assert block.collected is None
        for name, (mean, deviation) in block.gate_values.items():
            values = gates[block.name][name]
            assert values.shape == (block_cases.BATCH,)
            np.testing.assert_allclose(values.mean(), mean, rtol=1e-5)
            np.testing.assert_allclose(values.std(), deviation, atol=1e-6)


def test_pruned_parts_are_gone_and_the_rest_goes_on():
    model = _wrapped()
    first, second = _blocks(model)
    _shut(first, "lora_query", "lora_value")
    _shut(second, "adapter", "lora_query")  # the value's gate is open
    before = _outputs(model)
    kept = ops.convert_to_numpy(first.net.up[0])
    lost = ops.convert_to_numpy(second.net.up[0])
    removed = ks.prune_parts(model, keep_weights=True)
    assert {path: list(parts) for path, parts in removed.items()} == {
        "block_0": ["lora"],
        "block_1": ["adapter"],
    }
    weights = removed["block_1"]["adapter"]
    np.testing.assert_array_equal(weights["adapter_up_kernel"], lost)
    assert "gate_adapter_bias" in weights
    np.testing.assert_allclose(_outputs(model), before, atol=1e-6)
    first, second = _blocks(model)
    assert first.gate_names == ["prefix", "adapter"]
    assert list(second.parts) == ["lora", "prefix"]
    np.testing.assert_array_equal(ops.convert_to_numpy(first.net.up[0]), kept)
    model.compile("adam", "mse")
    model.fit(block_cases.inputs(), before, verbose=0)
    ks.unwrap_model(model)
    np.testing.assert_array_equal(
        _outputs(model), _outputs(block_cases.model())
    )


@pytest.mark.once
def test_pruning_shares_keeps_the_others_in_proportion():
    model = _wrapped(gate="softmax", warmup_steps=0)
    for layer in _blocks(model):
        layer.step.assign(1)
        kernel, bias = layer.gates.last
        kernel.assign(kernel * 0.1)
        bias.assign([-30.0, 0.5, -0.5])
    before = _outputs(model)
    for layer in _blocks(model):
        layer.reset_gates()
    model(block_cases.inputs())
    assert ks.prune_parts(model, steps=0) == {
        "block_0": ("lora",),
        "block_1": ("lora",),
    }
    block = _blocks(model)[0]
    assert block.gate_names == ["prefix", "adapter"]
    np.testing.assert_allclose(_outputs(model), before, atol=1e-5)


@pytest.mark.once
def test_a_block_without_a_part_left_loses_its_adapter():
    model = _wrapped()
    first, _ = _blocks(model)
    _shut(first, *first.gate_names)
    assert ks.prune_parts(model) == {"block_0": ("lora", "prefix", "adapter")}
    assert [p.path for p in adapter_places(model)] == ["block_1"]
    assert not model.get_layer("block_0").trainable_weights
    ks.unwrap_model(model)
    assert model.get_layer("block_0").trainable_weights


@pytest.mark.once
def test_nothing_changes_where_all_would_go():
    model = _wrapped()
    for block in _blocks(model):
        _shut(block, *block.gate_names)
    before = _outputs(model)
    with pytest.raises(ValueError, match="No part of any block"):
        ks.prune_parts(model)
    np.testing.assert_array_equal(_outputs(model), before)
    with ks.adapters_disabled(model):
        with pytest.raises(ValueError, match="switched off"):
            ks.prune_parts(model)
    with pytest.raises(ValueError, match="no adapters of method 'unipelt'"):
        ks.prune_parts(block_cases.model())


def _compiled():
    model = block_cases.model()
    model.compile(keras.optimizers.Adam(0.05), "mse", metrics=["mae"])
    inputs = block_cases.inputs()
    return model, (inputs, _outputs(model)[..., ::-1] * 2)


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_search_keeps_what_fits(gate):
    model, data = _compiled()
    kept = ks.search_parts(model, data, 4, keep=0.5, gate=gate, **PARTS)
    assert list(kept) == ["block_0", "block_1"]
    size = sum(SIZES[part] for parts in kept.values() for part in parts)
    assert 0 < size <= sum(SIZES.values())
    for place in adapter_places(model):
        assert tuple(place.layer.parts) == kept[place.path]
        assert place.layer.gate == gate
        assert place.layer.options()["penalty"] == "entropy"
    losses = model.fit(*data, epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.once
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_what_is_kept_goes_on_with_its_weights(monkeypatch, gate):
    model, data = _compiled()
    trained = {}

    def train(*args):
        fit(*args)
        for block in _blocks(model):
            names = ("lora", "prefix", "adapter")
            for weight in block.trainable_weights:
                if weight.name.startswith(names):
                    trained[block.name, weight.name] = weight.numpy()

    fit = gate_search.fit
    monkeypatch.setattr(gate_search, "fit", train)
    kept = ks.search_parts(model, data, 2, keep=1.0, gate=gate, **PARTS)
    assert set(kept.values()) == {("lora", "prefix", "adapter")}
    found = {(b.name, w.name): w for b in _blocks(model) for w in b.weights}
    assert len(trained) > 10
    for key, value in trained.items():
        np.testing.assert_array_equal(found[key].numpy(), value)
    count = 4 if gate == "sigmoid" else 3
    assert all(b.low_steps.shape == (count,) for b in _blocks(model))


@pytest.mark.once
def test_latency_shuts_every_part():
    model, data = _compiled()
    values = [w.numpy() for w in model.weights]
    with pytest.raises(ValueError, match="No part of any block"):
        ks.search_parts(model, data, epochs=60, latency=100.0, **PARTS)
    assert not adapter_places(model)
    for weight, value in zip(model.weights, values):
        np.testing.assert_array_equal(weight.numpy(), value)


@pytest.mark.once
def test_search_wants_a_plain_compiled_model():
    with pytest.raises(ValueError, match="not compiled"):
        ks.search_parts(block_cases.model(), None)
    with pytest.raises(ValueError, match="has adapters"):
        ks.search_parts(_wrapped(), None)
    model, data = _compiled()
    with pytest.raises(ValueError, match="gate='gumbel'"):
        ks.search_parts(model, data, gate="gumbel")
    with pytest.raises(ValueError, match="keep=2"):
        ks.search_parts(model, data, keep=2)


@pytest.mark.once
def test_tuning_leaves_the_model_as_it_was():
    pytest.importorskip("optuna")
    model, data = _compiled()
    values = [w.numpy() for w in model.weights]
    best = ks.tune_gates(
        model, data, data, "mae", trials=2, mode="min", seed=0, **PARTS
    )
    assert 0.5 <= best["temperature"] <= 5 and 1e-6 <= best["sparsity"] <= 1e-2
    assert best["value"] > 0
    assert not adapter_places(model)
    for weight, value in zip(model.weights, values):
        np.testing.assert_array_equal(weight.numpy(), value)
    with pytest.raises(ValueError, match="metric='f1'"):
        ks.tune_gates(model, data, data, "f1", trials=1, **PARTS)
    assert not adapter_places(model)


@pytest.mark.once
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"keep": 0}, "keep=0. Expected a number above 0 and at most 1"),
        ({"keep": 1.5}, "keep=1.5. Expected a number above 0 and at most 1"),
        ({"epochs": 0}, "epochs=0"),
        ({"latency": float("nan")}, "latency=nan"),
        ({"sparsity": 0.1}, r"options \['sparsity'\].*`latency`"),
    ],
)
def test_searches_refuse(options, expected):
    model, data = _compiled()
    with pytest.raises(ValueError, match=expected):
        ks.search_parts(model, data, **options)
    assert not adapter_places(model)


@pytest.mark.once
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"trials": True}, "trials=True"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"temperature": 2}, "temperature=2. Expected two numbers"),
        ({"temperature": (5, 1)}, r"temperature=\(5, 1\)"),
        ({"sparsity": (0, 1)}, r"sparsity=\(0, 1\)"),
        ({"seed": "a"}, "seed='a'"),
        ({"gate": "sigmoid"}, r"options \['gate'\]"),
        ({"validation_data": None}, "validation_data=None"),
    ],
)
def test_tuning_refuses(options, expected):
    model, data = _compiled()
    options = {"dataset": data, "validation_data": data, **options}
    with pytest.raises(ValueError, match=expected):
        ks.tune_gates(model, **options)
    assert not adapter_places(model)


@pytest.mark.once
def test_tuning_by_a_metric_that_is_nan(monkeypatch):
    pytest.importorskip("optuna")
    model, data = _compiled()
    monkeypatch.setattr(
        "keras_spectral.search.gates.metric_of", lambda *_: float("nan")
    )
    with pytest.raises(ValueError, match="'mae' was NaN in each of 2 trials"):
        ks.tune_gates(model, data, data, "mae", trials=2, **PARTS)
    assert not adapter_places(model)


@pytest.mark.once
@pytest.mark.parametrize("search", [ks.search_parts, ks.collect_gates])
@pytest.mark.parametrize("model", [None, 3])
def test_what_is_no_model(search, model):
    with pytest.raises(ValueError, match="Expected a Keras model"):
        search(model, np.ones((2, 3)))


@pytest.mark.once
def test_no_examples():
    model, data = _compiled()
    with pytest.raises(ValueError, match="at least one example"):
        ks.search_parts(model, [])
    model = _wrapped()
    with pytest.raises(ValueError, match="at least one example"):
        ks.collect_gates(model, None)
    with pytest.raises(ValueError, match="steps=True"):
        ks.prune_parts(model, steps=True)
    with pytest.raises(ValueError, match="keep_weights='no'"):
        ks.prune_parts(model, keep_weights="no")
