import keras
import numpy as np
import pytest

import keras_spectral as ks

pytestmark = pytest.mark.once


def _model(rank=8):
    """Two adapted layers; `one` needs 3 pairs, `two` only 1."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(16, name="one"),
        keras.layers.Dense(16, name="two"),
    ]
    model = keras.Sequential([keras.Input((16,)), *layers])
    ks.wrap_model(model, "dylora", target=["one", "two"], rank=rank)
    return model


def _score(needed):
    def metric(model, dataset):
        ranks = [layer.active_rank() for layer in model.layers]
        return -sum(max(0, n - rank) for n, rank in zip(needed, ranks))

    return metric


@pytest.mark.parametrize("needed", [(3, 1), (1, 1), (8, 2), (5, 4)])
def test_common_rank_and_ranks_of_their_own(needed):
    model = _model()
    found = ks.search_rank(model, None, _score(needed), drop=0.5)
    assert found == {"one": max(needed), "two": max(needed)}
    found = ks.search_rank(
        model, None, _score(needed), drop=0.5, per_layer=True
    )
    assert found == {"one": needed[0], "two": needed[1]}
    assert [x.active_rank() for x in model.layers] == list(needed)


def test_metrics_by_name_and_a_trained_model():
    model = _model()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 16)).astype("float32")
    y = model.predict(x, verbose=0) + x[:, :1] @ rng.normal(size=(1, 16))
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(x, y, epochs=30, verbose=0)
    for layer in model.layers:
        layer.truncate(8)
    best = model.evaluate(x, y, verbose=0)
    found = ks.search_rank(model, (x, y), "loss", 0.05, mode="min")
    assert max(found.values()) < 8
    assert model.evaluate(x, y, verbose=0) <= best + 0.05 + 1e-6


def test_a_failed_search_changes_nothing():
    model = _model()
    model.layers[0].truncate(5)
    model.compile("sgd", "mse")
    data = (np.ones((4, 16)), np.ones((4, 16)))
    with pytest.raises(ValueError, match=r"gives \['loss'\]"):
        ks.search_rank(model, data, "accuracy")
    assert [layer.active_rank() for layer in model.layers] == [5, 8]
    calls = []

    def breaks(model, dataset):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        ks.search_rank(model, None, breaks)
    assert [layer.active_rank() for layer in model.layers] == [5, 8]
    for options in ({"drop": -1}, {"mode": "most"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ks.search_rank(model, data, "loss", **options)
    ks.unwrap_model(model)
    with pytest.raises(ValueError, match="no adapters of method 'dylora'"):
        ks.search_rank(model, data)


@pytest.mark.parametrize(
    "data", [None, [], (np.ones((0, 16)), np.ones((0, 16)))]
)
def test_no_data(data):
    model = _model()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Expected at least one example"):
        ks.search_rank(model, data, "loss", mode="min")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"metric": 3}, "metric=3"),
        ({"per_layer": "no"}, "per_layer='no'"),
        ({"metric": lambda model, data: float("nan")}, "gave NaN"),
        ({"drop": float("inf")}, "drop=inf"),
    ],
)
def test_bad_options_leave_the_ranks(options, expected):
    model = _model()
    with pytest.raises(ValueError, match=expected):
        ks.search_rank(model, None, **options)
    assert [layer.active_rank() for layer in model.layers] == [8, 8]


@pytest.mark.parametrize("model", [None, 3, keras.Sequential()])
def test_what_is_no_model_to_search(model):
    with pytest.raises(ValueError, match="Expected a"):
        ks.search_rank(model, None)
