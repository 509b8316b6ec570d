import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.compression.integrator import truncated

pytestmark = pytest.mark.compiled


def _numpy(x):
    return np.float64(ops.convert_to_numpy(x))


def _model():
    model = keras.Sequential(
        [
            keras.Input((10,)),
            keras.layers.Dense(8, "tanh", name="hidden"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(0, 0.5, w.shape) for w in model.weights])
    return model


def _data():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(24, 10)), rng.normal(size=(24, 3))
    return x.astype("float32"), y.astype("float32")


def _kernel(layer):
    a, b = layer.pair()
    return np.float64(a @ b)


def _gradients(kernels, biases, x, y):
    """Of the mean squared error by kernels and biases."""
    hidden = np.tanh(x @ kernels[0] + biases[0])
    error = 2 * (hidden @ kernels[1] + biases[1] - y) / y.size
    back = (error @ kernels[1].T) * (1 - hidden**2)
    return [x.T @ back, hidden.T @ error], [back.sum(0), error.sum(0)]


def _orth(*columns):
    return np.linalg.qr(np.concatenate(columns, axis=1))[0]


def _step(factors, biases, x, y, rate, theta, most):
    """METHODS's step in numpy, with shapes that change."""
    kernels = [u @ s @ v.T for u, s, v in factors]
    grown = []
    for (u, s, v), g in zip(factors, _gradients(kernels, biases, x, y)[0]):
        k, left = u @ s - rate * g @ v, v @ s.T - rate * g.T @ u
        if theta is None:
            uh, vh = _orth(k), _orth(left)
        else:
            uh, vh = _orth(k, u), _orth(left, v)
        grown.append((uh, uh.T @ u @ s @ v.T @ vh, vh))
    kernels = [u @ s @ v.T for u, s, v in grown]
    by_kernels, by_biases = _gradients(kernels, biases, x, y)
    after = []
    for (u, s, v), g, limit in zip(grown, by_kernels, most):
        s = s - rate * u.T @ g @ v
        if theta is not None:
            p, d, qt = np.linalg.svd(s)
            tails = [np.linalg.norm(d[r:]) for r in range(len(d) + 1)]
            r = next(
                r
                for r, tail in enumerate(tails)
                if tail <= theta * tails[0] and r
            )
            r = min(r, limit)
            u, s, v = u @ p[:, :r], np.diag(d[:r]), v @ qt[:r].T
        after.append((u, s, v))
    return after, [b - rate * g for b, g in zip(biases, by_biases)]


@pytest.mark.parametrize("theta", [None, 0.15, 0.5])
def test_steps_equal_their_formula(theta):
    model, (x, y) = _model(), _data()
    trainer = ks.dlrt(model, rank=3, theta=theta)
    trainer.compile(keras.optimizers.SGD(0.2), "mse")
    factors, biases = [], []
    for name in ("hidden", "head"):
        layer = model.get_layer(name)
        u, s, vt = np.linalg.svd(_numpy(layer.kernel), full_matrices=False)
        factors.append((u[:, :3], np.diag(s[:3]), vt[:3].T))
        biases.append(_numpy(layer.bias))
    for _ in range(4):
        trainer.fit(x, y, batch_size=24, verbose=0)
        factors, biases = _step(factors, biases, x, y, 0.2, theta, (3, 3))
        for layer, (u, s, v), bias in zip(
            trainer.model.layers, factors, biases
        ):
            assert int(layer.rank) == len(s)
            np.testing.assert_allclose(_kernel(layer), u @ s @ v.T, atol=1e-5)
            np.testing.assert_allclose(
                _numpy(layer.layer.bias), bias, atol=1e-5
            )
    assert list(trainer.ranks()) == ["hidden", "head"]


def test_finished_models_are_plain_and_equal(tmp_path):
    model, (x, y) = _model(), _data()
    before = [_numpy(w) for w in model.weights]
    trainer = ks.dlrt(model, rank=4, theta=0.3, exclude="head", rate=0.2)
    trainer.compile("adam", "mse", metrics=["mae"])
    logs = trainer.fit(x, y, epochs=15, verbose=0).history
    assert logs["loss"][-1] < logs["loss"][0] and "mae" in logs
    expected = trainer.predict(x, verbose=0)
    trainer.save(tmp_path / "trainer.keras")
    small = ks.finalize_dlrt(trainer)
    assert isinstance(small.get_layer("hidden"), ks.LowRank)
    assert len(small.trainable_weights) == 5
    np.testing.assert_allclose(small.predict(x, verbose=0), expected, atol=1e-5)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), expected, atol=1e-5)
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, _numpy(new))
    with pytest.raises(ValueError, match="not yet finalized"):
        ks.finalize_dlrt(trainer)
    loaded = keras.saving.load_model(tmp_path / "trainer.keras")
    np.testing.assert_allclose(
        loaded.predict(x, verbose=0), expected, atol=1e-5
    )
    loaded.fit(x, y, verbose=0)
    assert loaded.factorised()[0].max_rank == 4


def test_convolutions_norms_dropout_and_einsum():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, strides=2, activation="relu", name="conv"),
            layers.BatchNormalization(),
            layers.Dropout(0.2),
            layers.EinsumDense("abcd,de->abce", (3, 3, 12), bias_axes="e"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, activity_regularizer="l2"),
        ]
    )
    trainer = ks.dlrt(model, rank=2, theta=0.05)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    trainer.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    data = rng.normal(size=(16, 8, 8, 3)), rng.normal(size=(16, 2))
    logs = trainer.fit(*data, epochs=4, batch_size=16, verbose=0).history
    assert logs["loss"][-1] < logs["loss"][0]
    assert all(1 <= r <= 2 for r in trainer.ranks().values())
    moved = _numpy(trainer.model.layers[1].moving_mean)
    assert np.abs(moved).max() > 0
    expected = trainer.predict(data[0], verbose=0)
    small = ks.finalize_dlrt(trainer)
    np.testing.assert_allclose(
        small.predict(data[0], verbose=0), expected, atol=1e-5
    )
    assert small.get_layer("conv").down.filters <= 2


@pytest.mark.once
@pytest.mark.parametrize("theta", [0.05, 0.3, 0.9])
def test_the_least_rank_within_the_tolerance(theta):
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.normal(size=(12, 6)))[0] for _ in range(2)]
    core = rng.normal(size=(6, 6)) * 0.5 ** np.arange(6)
    tensors = [ops.cast(x, "float32") for x in (bases[0], core, bases[1])]
    u, s, v, rank = map(_numpy, truncated(*tensors, theta, 5))
    d = np.linalg.svd(core, compute_uv=False)
    good = [
        r
        for r in range(1, 6)
        if np.linalg.norm(d[r:]) <= theta * np.linalg.norm(d)
    ]
    assert rank == min([*good, 5])
    np.testing.assert_allclose(np.diag(s)[: int(rank)], d[: int(rank)], 1e-5)
    assert not s[int(rank) :].any()
    p, _, qt = np.linalg.svd(core)
    p, qt = p[:, : int(rank)], qt[: int(rank)]
    expected = bases[0] @ p * d[: int(rank)] @ qt @ bases[1].T
    np.testing.assert_allclose(u @ s @ v.T, expected, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank=0"),
        ({"theta": 0}, "theta=0"),
        ({"theta": 1}, "theta=1"),
        ({"rate": -1}, "rate=-1"),
        ({"target": "nothing"}, "nothing"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ks.dlrt(_model(), **{"rank": 2, **options})


@pytest.mark.once
def test_refusals():
    conv = keras.layers.Conv2D(4, 3, groups=2, name="conv")
    grouped = keras.Sequential([keras.Input((5, 5, 4)), conv])
    with pytest.raises(ValueError, match="groups"):
        ks.dlrt(grouped, 1)
    with pytest.raises(ValueError, match="Expected what `dlrt`"):
        ks.finalize_dlrt(_model())
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
    trainer = ks.dlrt(_model(), 2)
    trainer.compile(scaled, "mse")
    with pytest.raises(ValueError, match="LossScaleOptimizer"):
        trainer.fit(*_data())


@pytest.mark.once
def test_inside_of_keras_hub(tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=6,
    )
    model = keras_hub.models.BertTextClassifier(backbone, 2, preprocessor=None)
    trainer = ks.dlrt(model, 2, 0.1, target="all-linear")
    trainer.compile(keras.optimizers.SGD(0.1), "mse")
    ids = np.ones((4, 6), "int32")
    inputs = {"token_ids": ids, "segment_ids": 0 * ids, "padding_mask": ids}
    trainer.fit(inputs, np.ones((4, 2)), verbose=0)
    expected = trainer.predict(inputs, verbose=0)
    small = ks.finalize_dlrt(trainer)
    assert small.count_params() < model.count_params()
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras", compile=False)
    for found in (small, again):
        got = found.predict(inputs, verbose=0)
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("theta", [None, 0.1])
def test_frozen_layers_rest(theta):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, name=name) for name in ("one", "two")]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.layers[0].trainable = False
    trainer = ks.dlrt(model, 4, theta)
    trainer.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=(16, 8)).astype("float32")

    def kernels():
        return [np.matmul(*layer.pair()) for layer in trainer.factorised()]

    before = kernels()
    trainer.fit(x, x, epochs=2, verbose=0)
    after = kernels()
    np.testing.assert_array_equal(after[0], before[0])
    assert np.abs(after[1] - before[1]).max() > 1e-3
    small = ks.finalize_dlrt(trainer)
    flags = [layer.trainable for layer in small.layers]
    assert flags == [False, True]
    assert all(not v.trainable for v in small.layers[0].variables)
