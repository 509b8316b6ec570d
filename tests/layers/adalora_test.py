import warnings

import keras
import numpy as np
import pytest
from keras import ops
from lora_test import lora_matrix
from variants import Variant
from variants import lora_size

import keras_spectral as ks
from keras_spectral.layers import adalora
from keras_spectral.model.hosts import adapter_places


def _formula(variant, adapter, lora_a, lora_e, lora_b, **state):
    return lora_matrix(adapter, 3 / (2 + 1e-5), lora_a * lora_e, lora_b)


VARIANTS = [
    Variant(
        ks.AdaLoRADense,
        "adalora",
        {"rank": 2, "alpha": 3},
        _formula,
        lambda case, layer: lora_size(case, layer) + 2,
    ),
]


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="first"),
            keras.layers.Dense(5, name="second"),
        ]
    )
    ks.wrap_model(
        model, "adalora", target=["first", "second"], rank=3, seed=1, **options
    )
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    return model


X = np.random.default_rng(1).normal(size=(4, 6)).astype("float32")


def test_the_penalty_is_the_mean_over_all_matrices():
    model = _model(orthogonality=0.5)
    assert model(X, training=False) is not None and not model.losses
    model(X, training=True)
    distances = []
    for layer in model.layers:
        a, b = _numpy(layer.lora_a), _numpy(layer.lora_b)
        for gram in (a.T @ a, b @ b.T):
            distances.append(np.linalg.norm(gram - np.eye(3)))
    total = sum(float(_numpy(loss)) for loss in model.losses)
    np.testing.assert_allclose(total, 0.5 * np.mean(distances), rtol=1e-5)


def test_later_layers_share_the_mean():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="first"),
            keras.layers.Dense(5, name="second"),
        ]
    )
    ks.wrap_model(model, "adalora", target="first", rank=2)
    assert float(_numpy(model.layers[0].layer_share)) == 1.0
    ks.wrap_model(model, "adalora", target="second", rank=2)
    shares = [float(_numpy(layer.layer_share)) for layer in model.layers]
    assert shares == [0.5, 0.5]


def test_compact_is_exact_and_drops_what_is_off():
    model = _model()
    first, second = model.layers
    first.lora_e.assign([0.0, 2.0, 0.0])
    before = _numpy(model(X))
    assert ks.compact_ranks(model) == {"first": 1, "second": 3}
    assert [type(x).__name__ for x in model.layers] == ["LoRADense"] * 2
    assert model.layers[0].rank == 1
    np.testing.assert_allclose(_numpy(model(X)), before, atol=1e-5)


def test_a_layer_without_a_triplet_loses_its_adapter():
    model = _model()
    model.layers[1].lora_e.assign([0.0, 0.0, 0.0])
    before = _numpy(model(X))
    assert ks.compact_ranks(model) == {"first": 3, "second": 0}
    assert [p.path for p in adapter_places(model)] == ["first"]
    assert not model.layers[1].trainable_weights
    np.testing.assert_allclose(_numpy(model(X)), before, atol=1e-5)
    ks.unwrap_model(model)
    assert len(model.trainable_weights) == 4


def test_nothing_changes_where_all_is_off():
    model = _model()
    for layer in model.layers:
        layer.lora_e.assign([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="Every triplet"):
        ks.compact_ranks(model)
    assert len(adapter_places(model)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": "big"}, "alpha='big'"),
        ({"orthogonality": -1}, "orthogonality=-1"),
        ({"dropout": 1}, "dropout=1"),
    ],
)
def test_bad_options_raise(options, message):
    base = keras.layers.Dense(3)
    with pytest.raises(ValueError, match=message):
        ks.AdaLoRADense(base, **options)
    embedding = keras.layers.Embedding(4, 3)
    with pytest.raises(ValueError, match="cannot be dropped"):
        ks.AdaLoRADense(embedding, dropout=0.1)


def test_warns_once_if_no_budget_takes_triplets_away(monkeypatch):
    monkeypatch.setattr(adalora, "_WARNED", [])
    model = _model()
    model.compile("sgd", "mse")
    y = np.zeros((4, 5), "float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without RankBudget")
        model.predict(X, verbose=0)
        budget = ks.callbacks.RankBudget(1, warmup=0, final=0, interval=1)
        model.fit(X, y, epochs=2, verbose=0, callbacks=[budget])
    with pytest.warns(UserWarning, match="'first' trains without RankBudget"):
        model.fit(X, y, verbose=0)
    other = _model()
    other.compile("sgd", "mse")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*without RankBudget")
        other.fit(X, y, verbose=0)
