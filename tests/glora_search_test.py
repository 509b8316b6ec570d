import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.layers.glora_path import KINDS
from keras_spectral.search import glora as search

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 5)).astype("float32")
Y = RNG.normal(size=(16, 3)).astype("float32")


def _model(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, "tanh", bias_initializer="ones", name="one"),
            keras.layers.Dense(3, name="two"),
        ]
    )
    options = {"supernet": True, **options}
    ks.wrap_model(model, "glora", "all", rank=2, seed=1, **options)
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    model.compile("adam", "mse", metrics=["mae"])
    return model


def _out(model):
    return ops.convert_to_numpy(model(X))


def _size(model, paths):
    adapters = {layer.name: layer for layer in model.layers}
    return sum(search._path_size(adapters[p], paths[p]) for p in paths)


SMALL = {"rounds": 3, "population": 8, "top": 3, "mutations": 4}


@pytest.mark.compiled
def test_the_best_path_within_the_limit(monkeypatch):
    model = _model()
    plain = model.evaluate(X, Y, verbose=0)[0]
    seen = []
    metric_of = search.metric_of

    def counted(model, data, metric):
        found = {x.name: x.path_in_use() for x in model.layers}
        value = metric_of(model, data, metric)
        seen.append((str(found), value, _size(model, found)))
        return value

    monkeypatch.setattr(search, "metric_of", counted)
    before = [w.numpy() for w in model.trainable_weights]
    best = ks.search_glora(model, (X, Y), 40, crossovers=4, seed=0, **SMALL)
    assert len(seen) == len({path for path, _, _ in seen}) == 24
    assert max(size for _, _, size in seen) <= 40
    path, loss, _ = min(seen, key=lambda one: one[1])
    assert path == str(best)
    assert best == {x.name: x.path_in_use() for x in model.layers}
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0)[0], loss)
    assert loss < plain
    for weight, value in zip(model.trainable_weights, before):
        np.testing.assert_array_equal(weight.numpy(), value)


@pytest.mark.once
def test_the_seed_decides_and_the_mode():
    model = _model()
    options = {**SMALL, "crossovers": 4, "metric": "mae"}

    def found(mode):
        ks.search_glora(model, (X, Y), 60, seed=3, mode=mode, **options)
        return model.evaluate(X, Y, verbose=0)[1]

    assert found("min") == found("min") < found("max")


@pytest.mark.once
def test_it_ends_where_there_are_no_more_paths():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(3, use_bias=False)]
    )
    ks.wrap_model(model, "glora", "all", rank=2, supernet=True)
    model.compile("adam", "mse")
    best = ks.search_glora(model, (X, Y), 0, rounds=2, population=4)
    assert best == {"dense": dict.fromkeys("abcde", "none")}
    # Scalars alone fit, and a bias that is not there has none.
    ks.search_glora(model, (X, Y), 1, rounds=2, population=20, seed=0)


@pytest.mark.once
def test_children():
    space = search._Space([_model().layers[0]], 1000, 0)
    path = ("lora", "none", "lora", "scalar", "vector")
    drawn = [space.mutated([path], 0.2) for _ in range(500)]
    moved = np.mean([[a != b for a, b in zip(x, path)] for x in drawn], axis=0)
    kinds = np.array([len(kinds) for kinds in KINDS.values()])
    np.testing.assert_allclose(moved, 0.2 * (1 - 1 / kinds), atol=0.06)
    assert space.mutated([path], 0) == path
    other = ("none", "lora", "none", "none", "none")
    drawn = [space.crossed([path, other]) for _ in range(500)]
    for i in range(5):
        kinds, counts = np.unique([x[i] for x in drawn], return_counts=True)
        assert set(kinds) == {path[i], other[i]}
        np.testing.assert_allclose(counts, 250, atol=60)


def test_fixed_layers_have_the_same_outputs():
    model = _model()
    paths = {
        "one": dict(zip("abcde", ("lora", "vector", "lora", "scalar", "none"))),
        "two": dict(zip("abcde", ("scalar", "lora", "none", "none", "vector"))),
    }
    for layer in model.layers:
        layer.use_path(paths[layer.name])
    expected, other = _out(model), _model()
    ks.finalize_glora(model)
    ks.finalize_glora(other, paths)
    for one in (model, other):
        np.testing.assert_allclose(_out(one), expected, atol=1e-6)
        assert [x.parts for x in one.layers] == list(paths.values())
        assert not any(x.supernet for x in one.layers)
    assert ks.layers.METHODS["glora"] is type(model.layers[0])
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert count == _size(model, paths)
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    expected = _out(model)
    ks.merge_model(model)
    np.testing.assert_allclose(_out(model), expected, atol=1e-5)


@pytest.mark.once
def test_a_layer_without_a_part_loses_its_adapter():
    model, none = _model(), dict.fromkeys("abcde", "none")
    for layer in model.layers:
        layer.use_path(none if layer.name == "one" else {})
    expected = _out(model)
    ks.finalize_glora(model)
    assert isinstance(model.layers[0], keras.layers.Dense)
    np.testing.assert_allclose(_out(model), expected, atol=1e-6)


@pytest.mark.once
def test_what_the_search_refuses():
    model = _model()
    model.layers[0].use_path({"a": "scalar"})
    before = [x.path_in_use() for x in model.layers]
    for options, match in (
        ({"max_params": -1}, "max_params=-1"),
        ({"rounds": 0}, "rounds=0"),
        ({"mutation": 1.5}, "mutation=1.5"),
        ({"metric": "accuracy", "rounds": 1}, "metric='accuracy'"),
        ({"mode": "best"}, "mode='best'"),
        ({"dataset": (X[:0], Y[:0])}, "at least one example"),
    ):
        given = {"dataset": (X, Y), "max_params": 9, **options}
        with pytest.raises(ValueError, match=match):
            ks.search_glora(model, **given)
        assert [x.path_in_use() for x in model.layers] == before
    for fixed in (ks.search_glora, ks.finalize_glora):
        given = [(X, Y), 9] if fixed is ks.search_glora else []
        with pytest.raises(ValueError, match="0 active supernets"):
            fixed(_model(supernet=False), *given)
    model.layers[0].a_up.assign(np.full((2, 6), np.nan))
    model.layers[0].b_up.assign(np.full((2, 6), np.nan))
    with pytest.raises(ValueError, match="NaN on each of"):
        ks.search_glora(model, (X, Y), 99, rounds=1, population=3)
    assert [x.path_in_use() for x in model.layers] == before
    model.compiled = False
    with pytest.raises(ValueError, match="not compiled"):
        ks.search_glora(model, (X, Y), 9)


@pytest.mark.once
def test_what_cannot_be_finalized():
    model = _model()
    layers = list(model.layers)
    none = dict.fromkeys("abcde", "none")
    for paths, match in (
        ({"three": {}}, "three.*'one', 'two'"),
        ({"one": {"a": "big"}}, "'big'"),
        ({"one": none, "two": none}, "would keep a part"),
        (3, "paths=3"),
    ):
        with pytest.raises(ValueError, match=match):
            ks.finalize_glora(model, paths)
        assert list(model.layers) == layers
