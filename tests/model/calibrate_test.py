import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype("float32") @ np.diag(
    [3, 2, 1, 0.5, 0.1, 0.1]
).astype("float32")
X = X + 1.0


def _model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="one"),
            keras.layers.Dense(3, name="two"),
        ]
    )


def _out(model, x=X):
    return ops.convert_to_numpy(model(x))


def test_moments_of_dense_layers():
    model = _model()
    before = _out(model)
    found = ks.calibrate(model, X, "all", batch_size=7)
    assert list(found) == ["one", "two"]
    np.testing.assert_array_equal(_out(model), before)
    hidden = np.maximum(X @ model.layers[0].kernel.numpy(), 0)
    for path, rows in (("one", X), ("two", hidden)):
        assert found[path].count == 40
        np.testing.assert_allclose(
            found[path].mean, rows.mean(axis=0), atol=1e-5
        )
        np.testing.assert_allclose(
            found[path].second, rows.T @ rows / 40, atol=1e-4
        )
    values, directions = found["one"].components()
    covariance = np.cov(X.T, bias=True)
    np.testing.assert_allclose(
        directions.T @ covariance @ directions, np.diag(values), atol=1e-4
    )


def test_a_wide_layer_keeps_a_diagonal():
    found = ks.calibrate(_model(), (X, np.zeros(40)), "one", limit=5)["one"]
    assert not found.whole
    np.testing.assert_allclose(found.second, (X**2).mean(axis=0), rtol=1e-5)


def test_patches_of_a_convolution():
    layer = keras.layers.Conv2D(4, 3, 2, groups=2, name="conv")
    model = keras.Sequential([keras.Input((7, 6, 4)), layer])
    x = RNG.normal(size=(5, 7, 6, 4)).astype("float32")
    found = ks.calibrate(model, x, "conv")["conv"]
    assert found.second.shape == (36, 36)
    ks.wrap_model(model, "lora", "conv", rank=1)
    # What a matrix does to these rows has the size that the moments say.
    adapter = model.layers[0]
    adapter.lora_b.assign(RNG.normal(size=(1, 4)))
    view = adapter.view
    kernel = view.from_matrix(adapter.delta_matrix())
    delta = ops.convert_to_numpy(view.to_matrix(kernel))
    change = _out(model, x) - ops.convert_to_numpy(layer(x))
    size = found.count * np.trace(delta.T @ found.second @ delta)
    np.testing.assert_allclose((change**2).sum(), size, rtol=1e-4)


def test_masked_tokens_do_not_count():
    inputs = {
        "x": keras.Input((4, 6), name="x"),
        "padding_mask": keras.Input((4,), dtype="int32", name="padding_mask"),
    }
    outputs = keras.layers.Dense(3, name="one")(inputs["x"])
    model = keras.Model(inputs, outputs * inputs["padding_mask"][..., None])
    x = RNG.normal(size=(5, 4, 6)).astype("float32")
    mask = np.arange(4) < np.array([[4], [1], [2], [3], [4]])
    found = ks.calibrate(model, {"x": x, "padding_mask": np.int32(mask)}, "all")
    assert found["one"].count == 14
    rows = x[mask]
    np.testing.assert_allclose(
        found["one"].second, rows.T @ rows / 14, atol=1e-5
    )


def test_a_wrapped_or_quantised_model():
    model = ks.wrap_model(_model(), "lora", "two", rank=2)
    found = ks.calibrate(model, X, "all")
    plain = ks.calibrate(_model(), X, "all")
    for path in plain:
        np.testing.assert_allclose(
            found[path].second, plain[path].second, atol=1e-4
        )
    model = _model()
    model.quantize("int8")
    found = ks.calibrate(model, X, "one")
    np.testing.assert_allclose(
        found["one"].second, plain["one"].second, atol=1e-4
    )


def test_a_failing_model_is_as_before():
    class Failing(keras.layers.Layer):
        def call(self, x):
            if not isinstance(x, keras.KerasTensor) and self.built_once:
                raise RuntimeError("no")
            return x

        built_once = False

    failing = Failing()
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3, name="one"), failing]
    )
    call = model.layers[0].call
    failing.built_once = True
    with pytest.raises(RuntimeError):
        ks.calibrate(model, X, "one")
    assert model.layers[0].call == call


def test_what_it_refuses():
    model = _model()
    with pytest.raises(ValueError, match="at least one example"):
        ks.calibrate(model, X[:0])
    with pytest.raises(ValueError, match="matches"):
        ks.calibrate(model, X, "three")
    with pytest.raises(ValueError, match="limit=0"):
        ks.calibrate(model, X, "one", limit=0)


def test_eva_begins_where_inputs_vary():
    model = _model()
    found = ks.calibrate(model, X, "all")
    plain = _out(model)
    ks.wrap_model(
        model, "lora", "all", rank=2, initializer="eva", calibration=found
    )
    np.testing.assert_array_equal(_out(model), plain)
    one = model.layers[0]
    a = one.lora_a.numpy()
    np.testing.assert_allclose(a.T @ a, np.eye(2), atol=1e-5)
    _, directions = np.linalg.eigh(np.cov(X.T, bias=True))
    overlap = np.abs(directions[:, :-3:-1].T @ a)
    np.testing.assert_allclose(overlap, np.eye(2), atol=1e-3)


def test_eva_shares_out_ranks():
    found = ks.calibrate(_model(), X, "all")
    ranks = found.ranks(2, rho=2.0)
    assert sum(own["rank"] for own in ranks.values()) in (4, 5)
    assert all(1 <= own["rank"] <= 4 for own in ranks.values())
    model = ks.wrap_model(
        _model(),
        "lora",
        "all",
        initializer="eva",
        calibration=found,
        overrides=ranks,
    )
    assert [x.rank for x in model.layers] == [
        own["rank"] for own in ranks.values()
    ]
    assert all(float(x.scale) == 1 for x in model.layers)


@pytest.mark.parametrize("kind", ["corda", "corda_kpm"])
def test_corda_takes_what_the_data_use(kind):
    model = _model()
    plain, found = _out(model), ks.calibrate(model, X, "all")
    ks.wrap_model(
        model,
        "lora",
        "all",
        rank=2,
        alpha=4,
        initializer=kind,
        calibration=found,
    )
    np.testing.assert_allclose(_out(model), plain, atol=1e-4)
    one = model.layers[0]
    start = 2 * one.start_a.numpy() @ one.start_b.numpy()
    kernel, second = one.layer.kernel.numpy(), np.float64(found["one"].second)
    second = second + 0.01 * np.mean(np.diag(second)) * np.eye(6)
    u, s, vt = np.linalg.svd(second @ kernel)
    chosen = slice(0, 2) if kind == "corda" else slice(4, 6)
    part = (u[:, chosen] * s[chosen]) @ vt[: len(s)][chosen]
    expected = np.linalg.solve(second, part)
    np.testing.assert_allclose(start, expected, atol=1e-4)


def test_loftq_is_nearer_to_the_float_model():
    x = RNG.normal(size=(16, 64)).astype("float32")

    def make():
        keras.utils.set_random_seed(0)
        layers = [keras.Input((64,)), keras.layers.Dense(48, name="one")]
        return keras.Sequential(layers)

    original, model = make(), make()
    model.quantize("int4")
    expected, quantised = _out(original, x), _out(model, x)
    ks.wrap_model(
        model,
        "lora",
        "all",
        rank=8,
        alpha=4,
        initializer="loftq",
        original=original,
    )
    adapter = model.layers[0]
    kernel = original.layers[0].kernel.numpy()
    lost = kernel - ops.convert_to_numpy(adapter.view.matrix())
    delta = ops.convert_to_numpy(adapter.delta_matrix())
    s = np.linalg.svd(lost, compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.norm(lost - delta), np.linalg.norm(s[8:]), rtol=1e-4
    )
    before = np.abs(quantised - expected).mean()
    assert np.abs(_out(model, x) - expected).mean() < 0.9 * before


def test_files_hold_what_data_gave(tmp_path):
    found = ks.calibrate(_model(), X, "all")
    for kind in ("eva", "corda"):
        options = {"rank": 2, "initializer": kind}
        model = ks.wrap_model(
            _model(), "lora", "all", calibration=found, **options
        )
        model.compile(keras.optimizers.Adam(0.1), "mse")
        model.fit(X, np.ones((40, 3)), verbose=0)
        outputs = _out(model)
        path = tmp_path / f"{kind}.safetensors"
        ks.save_adapters(model, path)
        again = ks.load_adapters(_model(), path)
        np.testing.assert_allclose(_out(again), outputs, atol=1e-6)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_allclose(_out(again), outputs, atol=1e-6)
        ks.merge_model(again)
        np.testing.assert_allclose(_out(again), outputs, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"initializer": "eva"}, "wrap_model.*calibration="),
        ({"initializer": "loftq"}, "wrap_model.*original="),
        ({"calibration": 3, "initializer": "eva"}, "calibration=3"),
        (
            {"start_data": "found", "initializer": "eva"},
            "start_data=.*wrap_model.*calibration=",
        ),
        ({"calibration": "found"}, "this start needs none"),
        (
            {"calibration": "found", "original": 3, "initializer": "eva"},
            "calibration and original",
        ),
    ],
)
def test_starts_that_lack_data(options, match):
    model = _model()
    for name in ("calibration", "start_data"):
        if options.get(name) == "found":
            options = {**options, name: ks.calibrate(model, X, "all")}
    with pytest.raises(ValueError, match=match):
        ks.wrap_model(model, "lora", "all", rank=2, **options)
    with pytest.raises(ValueError, match="initializer='eva'"):
        ks.DoRADense(keras.layers.Dense(3), initializer="eva")
