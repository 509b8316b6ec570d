import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks

pytestmark = pytest.mark.compiled

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model(rate=0.1):
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(16, "relu", name="hidden"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(0, 0.4, w.shape) for w in model.weights])
    model.compile(keras.optimizers.SGD(rate), LOSS, metrics=["accuracy"])
    return model


def _data():
    x = np.random.default_rng(0).normal(size=(48, 12)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0)


def _gradient(model, x, y):
    """Of the cross entropy by the two kernels and biases, in numpy."""
    k1, b1, k2, b2 = (np.float64(_numpy(w)) for w in model.weights)
    hidden = np.maximum(x @ k1 + b1, 0)
    z = hidden @ k2 + b2
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(y)), y] -= 1
    p /= len(y)
    back = (p @ k2.T) * (hidden > 0)
    return x.T @ back, back.sum(0), hidden.T @ p, p.sum(0)


def test_rounds_equal_their_formula():
    model, (x, y) = _model(), _data()
    before = [_numpy(w) for w in model.weights]
    scheme = ks.schemes.LearnedRank(9e-2)
    small, history = ks.learn_compression(
        model,
        (x, y),
        {"hidden": scheme},
        mu=0.3,
        growth=2.0,
        rounds=3,
        batch_size=48,
    )
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, _numpy(new))

    def project(k, mu):
        u, s, vt = np.linalg.svd(k, full_matrices=False)
        costs = [
            9e-2 * r * 28 + mu / 2 * (s[r:] ** 2).sum() for r in range(1, 13)
        ]
        r = 1 + np.argmin(costs)
        return (u[:, :r] * s[:r]) @ vt[:r], r

    weights = [np.float64(w) for w in before]
    multiplier = np.zeros_like(weights[0])
    target, _ = project(weights[0], 0.3)
    twin = _model()
    for number, record in enumerate(history):
        mu = 0.3 * 2**number
        twin.set_weights(weights)
        steps = list(_gradient(twin, x, y))
        steps[0] = steps[0] + mu * (weights[0] - target) - multiplier
        weights = [w - 0.1 * g for w, g in zip(weights, steps)]
        target, rank = project(weights[0] - multiplier / mu, mu)
        multiplier = multiplier - mu * (weights[0] - target)
        assert record["ranks"] == {"hidden": rank}
        gap = np.linalg.norm(weights[0] - target) / np.linalg.norm(weights[0])
        np.testing.assert_allclose(record["distortion"]["hidden"], gap, 1e-3)
        assert record["mu"] == mu and "accuracy" in record["logs"]
    layer = small.get_layer("hidden")
    assert isinstance(layer, ks.LowRank) and layer.down.units == rank
    np.testing.assert_allclose(_numpy(layer.kernel), target, atol=1e-5)
    np.testing.assert_allclose(
        _numpy(small.get_layer("head").kernel), weights[2], atol=1e-5
    )


@pytest.mark.once
def test_ranks_follow_their_price_and_distortion_falls():
    model, data = _model(), _data()
    model.fit(*data, epochs=10, verbose=0)
    ranks = []
    for alpha in (1e-4, 3e-2):
        small, history = ks.learn_compression(
            model,
            data,
            {"hidden": ks.schemes.LearnedRank(alpha)},
            mu=0.05,
            growth=1.5,
            rounds=12,
        )
        ranks.append(history[-1]["ranks"]["hidden"])
        gaps = [record["distortion"]["hidden"] for record in history]
        assert gaps[-1] < 0.3 * max(gaps)
    assert ranks[0] > ranks[1]
    assert small.count_params() < model.count_params()


def _codes(kernel):
    return len(np.unique(_numpy(kernel)))


@pytest.mark.parametrize(
    ("scheme", "holds"),
    [
        (ks.schemes.Magnitude(0.75), lambda k: (_numpy(k) != 0).sum() == 48),
        (ks.schemes.KMeans(2), lambda k: _codes(k) == 4),
        (ks.schemes.Linear(2), lambda k: _codes(k) <= 3 * 16),
        (ks.schemes.L1Constraint(9.0), lambda k: abs(_numpy(k)).sum() < 9.001),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.once
def test_kernels_end_as_the_scheme_allows(scheme, holds):
    model = _model()
    small, history = ks.learn_compression(
        model, _data(), {"hidden": scheme}, mu=0.1, rounds=2
    )
    assert type(small.get_layer("hidden")) is keras.layers.Dense
    assert holds(small.get_layer("hidden").kernel)
    assert history[-1]["ranks"] == {}


@pytest.mark.once
def test_convolutions_with_groups_and_in_einsums():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            keras.layers.Conv2D(6, 3, groups=2, name="grouped"),
            keras.layers.Conv2D(8, 3, name="plain"),
            keras.layers.EinsumDense("abcd,de->abce", (2, 2, 5), name="einsum"),
        ]
    )
    model.compile("sgd", "mse")
    data = np.ones((2, 6, 6, 4)), np.ones((2, 2, 2, 5))
    small, history = ks.learn_compression(
        model,
        data,
        {
            "grouped": ks.schemes.Magnitude(0.5),
            "plain|einsum": ks.schemes.FixedRank(2),
        },
        rounds=1,
    )
    zeros = _numpy(small.get_layer("grouped").kernel) == 0
    assert zeros.sum() == 54
    assert history[0]["ranks"] == {"plain": 2, "einsum": 2}
    assert small.get_layer("plain").down.filters == 2
    with pytest.raises(ValueError, match="2 groups"):
        ks.learn_compression(model, data, {"grouped": ks.schemes.FixedRank(1)})


def test_goes_on_from_a_file(tmp_path):
    data, path = _data(), tmp_path / "state.safetensors"
    schemes = {"hidden": ks.schemes.FixedRank(3), "head": ks.schemes.KMeans(2)}
    options = {"mu": 0.1, "growth": 1.5, "batch_size": 48}

    def model():
        model = _model()
        momentum = keras.optimizers.SGD(0.1, momentum=0.9)
        model.compile(momentum, LOSS)
        return model

    whole, history = ks.learn_compression(
        model(), data, schemes, rounds=3, **options
    )
    for rounds in (1, 3):
        parts, found = ks.learn_compression(
            model(), data, schemes, rounds=rounds, checkpoint=path, **options
        )
    assert [record["round"] for record in found] == [0, 1, 2]
    np.testing.assert_allclose(
        [r["distortion"]["head"] for r in found],
        [r["distortion"]["head"] for r in history],
        rtol=1e-3,
    )
    x, _ = data
    expected = whole.predict(x, verbose=0)
    np.testing.assert_allclose(parts.predict(x, verbose=0), expected, atol=1e-4)
    with pytest.raises(ValueError, match="another run"):
        options["mu"] = 0.2
        ks.learn_compression(model(), data, schemes, checkpoint=path, **options)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        ks.learn_compression(model(), data, schemes, checkpoint=path, **options)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"compressions": {}}, "compressions={}"),
        ({"compressions": {"hidden": 3}}, r"\['hidden'\]=3"),
        ({"compressions": {"nothing": ks.schemes.KMeans(1)}}, "nothing"),
        ({"mu": 0}, "mu=0"),
        ({"growth": 0.5}, "growth=0.5"),
        ({"rounds": 0}, "rounds=0"),
        ({"dataset": None}, "dataset=None"),
        ({"y": 3}, r"\['y'\]"),
        ({"checkpoint": 3}, "checkpoint=3"),
        (
            {
                "compressions": {
                    "hidden": ks.schemes.KMeans(1),
                    "hid.*": ks.schemes.KMeans(2),
                }
            },
            "several",
        ),
    ],
)
def test_bad_options(options, match):
    given = {
        "dataset": _data(),
        "compressions": {"hidden": ks.schemes.KMeans(1)},
    }
    with pytest.raises(ValueError, match=match):
        ks.learn_compression(_model(), **{**given, **options})


@pytest.mark.once
def test_a_model_has_to_be_compiled():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(2, name="hidden")]
    )
    with pytest.raises(ValueError, match="not compiled"):
        ks.learn_compression(
            model, np.ones((2, 4)), {"hidden": ks.schemes.KMeans(1)}
        )
