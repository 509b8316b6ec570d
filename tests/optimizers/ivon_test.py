import ast
import contextlib
import os
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.optimizers import IVON

pytestmark = pytest.mark.compiled

GOLDEN = os.environ.get("KERAS_SPECTRAL_GOLDEN")
BACKEND = keras.backend.backend()


def _numpy(x):
    return ops.convert_to_numpy(x)


@contextlib.contextmanager
def _precision(dtype):
    """Keras, and JAX below it, with floats of that size."""
    before = keras.config.floatx()
    keras.config.set_floatx(dtype)
    try:
        with contextlib.ExitStack() as stack:
            if BACKEND == "jax" and dtype == "float64":
                import jax

                stack.enter_context(jax.enable_x64(True))
            yield
    finally:
        keras.config.set_floatx(before)


def _oracle(
    x,
    noise,
    gradient,
    lr,
    ess,
    h0,
    b1,
    b2,
    wd,
    clip,
    rescale,
    debias,
    approx="price",
    samples=1,
):
    """Mean, momentum and h after each step, in float64."""
    m, g, h = x.copy(), np.zeros_like(x), np.full_like(x, h0)
    for t, eps in enumerate(noise.reshape(-1, samples, x.size), 1):
        e = eps / np.sqrt(ess * (h + wd))
        grads = np.array([gradient(m + one) for one in e])
        f = ess * (grads**2).mean(0)
        if approx == "price":
            f = ess * (h + wd) * (e * grads).mean(0)
        g = b1 * g + (1 - b1) * grads.mean(0)
        h_new = b2 * h + (1 - b2) * f
        h = h_new + (1 - b2) ** 2 * (h - f) ** 2 / (2 * (h + wd))
        move = (g / (1 - b1**t if debias else 1) + wd * m) / (h + wd)
        m = m - (lr * (h0 + wd) if rescale else lr) * np.clip(move, -clip, clip)
        yield np.concatenate([m, g, h])


def _trajectory(optimizer, x, noise, gradient, dtype):
    variable = keras.Variable(x.astype(dtype), dtype=dtype)
    given = iter([*noise, np.zeros_like(x)])
    optimizer.noise = lambda index, shape, dtype: ops.convert_to_tensor(
        next(given).astype(dtype)
    )
    optimizer.build([variable])
    for _ in noise:
        grad = gradient(_numpy(variable)).astype(dtype)
        optimizer.apply([ops.convert_to_tensor(grad)])
        mean, _ = optimizer.posterior(variable)
        rest = optimizer.momentum(variable), optimizer.hessian(variable)
        yield np.concatenate([mean, *rest])


@pytest.mark.skipif(not GOLDEN, reason="needs KERAS_SPECTRAL_GOLDEN")
@pytest.mark.parametrize(
    ("dtype", "atol"), [("float64", 1e-10), ("float32", 1e-5)]
)
def test_golden_steps(dtype, atol):
    file = np.load(pathlib.Path(GOLDEN, "ivon_quad_default_1g.npz"))
    settings = ast.literal_eval(str(file["cfg"]))
    with _precision(dtype):
        optimizer = IVON(
            settings["lr"],
            settings["ess"],
            settings["hess_init"],
            settings["beta1"],
            settings["beta2"],
            settings["weight_decay"],
        )
        steps = _trajectory(
            optimizer,
            file["x0"],
            file["noise"][:, 0],
            lambda x: file["H"] @ x - file["b"],
            dtype,
        )
        for got, expected in zip(steps, file["traj"], strict=True):
            np.testing.assert_allclose(got, expected, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 1e-2, "beta_2": 0.9},
        {"clip_radius": 0.05},
        {"debias": False},
        {"rescale_lr": False, "learning_rate": 0.03},
        {"hess_approx": "gradsq", "beta_2": 0.9},
        {"mc_samples": 3, "beta_2": 0.9},
        {"mc_samples": 2, "hess_approx": "gradsq", "beta_2": 0.9},
    ],
)
def test_equals_its_formula(options):
    rng = np.random.default_rng(0)
    samples = options.get("mc_samples", 1)
    x, noise = rng.normal(size=5), rng.normal(size=(4 * samples, 5))
    matrix = rng.normal(size=(5, 5))
    settings = {
        "learning_rate": 0.1,
        "ess": 20.0,
        "hess_init": 0.7,
        "beta_1": 0.9,
        "beta_2": 0.99,
        "weight_decay": 1e-3,
        "clip_radius": np.inf,
        "rescale_lr": True,
        "debias": True,
        "hess_approx": "price",
        "mc_samples": 1,
        **options,
    }

    def gradient(x):
        return matrix @ np.tanh(x)

    with _precision("float64"):
        expected = _oracle(x, noise, gradient, *settings.values())
        optimizer = IVON(**settings)
        steps = list(_trajectory(optimizer, x, noise, gradient, "float64"))
        for got, wanted in zip(steps[samples - 1 :: samples], expected):
            np.testing.assert_allclose(got, wanted, atol=1e-12)
        assert int(optimizer.iterations) == len(steps) / samples == 4


def _model(**options):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(4, "tanh", name="hidden"),
            layers.Dense(1, name="out"),
        ]
    )
    model.compile(IVON(ess=200, seed=1, **options), "mse")
    return model


def _data(count=32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 3)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def test_trains_and_is_deterministic():
    losses, weights = [], []
    for _ in range(2):
        model = _model()
        history = model.fit(*_data(), epochs=15, batch_size=8, verbose=0)
        losses.append(history.history["loss"])
        weights.append(_numpy(model.get_layer("hidden").kernel))
    np.testing.assert_array_equal(*weights)
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_each_step_draws_anew():
    model = _model(learning_rate=0.0)
    x, y = _data(8)
    samples = []
    for _ in range(3):
        model.fit(x, y, batch_size=8, verbose=0)
        samples.append(_numpy(model.get_layer("hidden").kernel))
    mean, deviation = model.optimizer.posterior(
        model.get_layer("hidden").kernel
    )
    assert np.abs(samples[0] - samples[1]).max() > 1e-4
    assert np.abs(samples[1] - samples[2]).max() > 1e-4
    for sample in samples:
        assert (np.abs(sample - mean) < 6 * deviation).all()


def test_posterior_and_mean():
    model = _model(hess_init=0.5, weight_decay=0.01)
    kernel = model.get_layer("hidden").kernel
    with pytest.raises(ValueError, match="no posterior yet"):
        model.optimizer.posterior(kernel)
    before = _numpy(kernel)
    model.optimizer.build(model.trainable_variables)
    mean, deviation = model.optimizer.posterior(kernel)
    np.testing.assert_array_equal(mean, before)
    np.testing.assert_allclose(deviation, 1 / np.sqrt(200 * 0.51), rtol=1e-6)
    sample = _numpy(kernel)
    assert np.abs(sample - mean).max() > 1e-3
    with model.optimizer.mean():
        np.testing.assert_array_equal(_numpy(kernel), mean)
    np.testing.assert_array_equal(_numpy(kernel), sample)
    np.testing.assert_array_equal(model.optimizer.momentum(kernel), 0)
    np.testing.assert_array_equal(model.optimizer.hessian(kernel), 0.5)


@pytest.mark.parametrize("name", ["posterior", "momentum", "hessian"])
def test_states_are_those_of_known_variables(name):
    model = _model()
    read = getattr(model.optimizer, name)
    with pytest.raises(ValueError, match="no posterior yet"):
        read(model.get_layer("hidden").kernel)
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="Unknown variable"):
        read(keras.Variable([1.0]))


def test_predictions_are_averaged_over_samples():
    model = _model()
    x, y = _data()
    model.fit(x, y, verbose=0)
    before = [_numpy(w) for w in model.weights]
    seen = []
    plain = model.predict

    def predict(*args, **kwargs):
        seen.append(plain(*args, **kwargs))
        return seen[-1]

    model.predict = predict
    got = ks.optimizers.predict_mean(model, x, samples=4)
    np.testing.assert_allclose(got, np.mean(seen, axis=0), rtol=1e-6)
    assert len(seen) == 4 and np.ptp(seen, axis=0).max() > 1e-4
    for weight, value in zip(model.weights, before):
        np.testing.assert_array_equal(_numpy(weight), value)
    probable = ks.optimizers.predict_mean(model, x, 4, activation="sigmoid")
    expected = np.mean(1 / (1 + np.exp(-np.array(seen[4:]))), axis=0)
    np.testing.assert_allclose(probable, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="samples=0"):
        ks.optimizers.predict_mean(model, x, samples=0)
    with pytest.raises(ValueError, match="sharpmax"):
        ks.optimizers.predict_mean(model, x, activation="sharpmax")
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="Expected IVON"):
        ks.optimizers.predict_mean(model, x)


def test_predict_mean_refuses_a_posterior_that_saw_nothing():
    model = _model()
    x, y = _data()
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="trained none of its weights"):
        ks.optimizers.predict_mean(model, x)
    model.fit(x, y, verbose=0)
    assert ks.optimizers.predict_mean(model, x).shape == (len(x), *y.shape[1:])


def test_saves_and_restores_its_state(tmp_path):
    x, y = _data()
    model = _model()
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.optimizer.get_config() == model.optimizer.get_config()
    for m in (model, again):
        m.fit(x, y, epochs=2, shuffle=False, verbose=0)
    for weight, other in zip(model.weights, again.weights):
        np.testing.assert_allclose(_numpy(weight), _numpy(other), atol=1e-6)


def test_accumulated_gradients_count_as_one_step():
    x, y = _data(16)
    results = []
    for size, steps in ((16, None), (4, 4)):
        model = _model(gradient_accumulation_steps=steps)
        model.fit(x, y, batch_size=size, epochs=2, shuffle=False, verbose=0)
        mean, _ = model.optimizer.posterior(model.get_layer("hidden").kernel)
        results.append(mean)
    if BACKEND != "jax":  # there each batch draws, used or not
        np.testing.assert_allclose(*results, atol=1e-5)
    assert np.isfinite(results[1]).all()


def test_several_samples_make_one_step():
    model = _model(mc_samples=2, learning_rate=0.05)
    model.fit(*_data(), batch_size=8, epochs=3, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 6
    kernel = model.get_layer("hidden").kernel
    mean, _ = model.optimizer.posterior(kernel)
    before = _numpy(kernel)
    assert np.abs(before - mean).max() > 1e-3
    x, y = _data(8)
    model.fit(x, y, batch_size=8, verbose=0)
    # Half a step: another sample of the same posterior.
    np.testing.assert_array_equal(model.optimizer.posterior(kernel)[0], mean)
    assert np.abs(_numpy(kernel) - before).max() > 1e-3
    model.fit(x, y, batch_size=8, verbose=0)
    assert np.abs(model.optimizer.posterior(kernel)[0] - mean).max() > 1e-5


def _apply(optimizer, variable, gradient):
    """One update as the backend's training step makes it."""
    gradient = ops.convert_to_tensor(gradient)
    if BACKEND != "jax":
        optimizer.apply([gradient], [variable])
        return
    state = [v.value for v in optimizer.variables]
    (value,), state = optimizer.stateless_apply(
        state, [gradient], [variable.value]
    )
    for old, new in zip([variable, *optimizer.variables], [value, *state]):
        old.assign(new)


def test_under_a_scaled_loss_the_step_is_the_same():
    rng = np.random.default_rng(0)
    start, gradient = rng.normal(size=(2, 4)).astype("float32")
    ends = []
    for scaled in (False, True):
        inner = IVON(0.1, ess=50, seed=3)
        optimizer = inner
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(inner, 4.0)
        variable = keras.Variable(start)
        optimizer.build([variable])
        for _ in range(3):
            scale = 4.0 if scaled else 1.0
            _apply(optimizer, variable, scale * gradient)
        ends.append([_numpy(v) for v in [variable, *inner.variables]])
    for plain, other in zip(*ends, strict=True):
        np.testing.assert_allclose(plain, other, rtol=1e-6)
    before = [_numpy(v) for v in [variable, *inner.variables]]
    _apply(optimizer, variable, np.inf * gradient)
    for value, other in zip(before, [variable, *inner.variables]):
        np.testing.assert_array_equal(value, _numpy(other))
    assert float(optimizer.dynamic_scale) == 2.0


def test_within_a_scaled_loss():
    x, y = _data()
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(1, dtype="mixed_float16")]
    )
    model.dtype_policy = keras.DTypePolicy("mixed_float16")
    model.compile(IVON(0.1, ess=64), "mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.fit(x, y, verbose=0, callbacks=[ks.callbacks.MeanWeights()])
    inner, kernel = model.optimizer.inner_optimizer, model.layers[0].kernel
    # The scale of the start overflows: nothing was trained so far.
    with pytest.raises(ValueError, match="trained none of its weights"):
        ks.optimizers.predict_mean(model, x)
    model.optimizer.dynamic_scale.assign(8.0)
    model.fit(x, y, verbose=0, callbacks=[ks.callbacks.MeanWeights()])
    mean, deviation = inner.posterior(kernel)
    np.testing.assert_array_equal(_numpy(kernel), mean)
    got = ks.optimizers.predict_mean(model, x, samples=2)
    assert got.shape == y.shape and np.isfinite(got).all()


def test_schedules_and_mixed_precision():
    keras.utils.set_random_seed(0)
    schedule = keras.optimizers.schedules.CosineDecay(0.1, 20)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(1, dtype="mixed_bfloat16")]
    )
    model.compile(IVON(schedule, ess=500), "mse")
    losses = model.fit(*_data(), epochs=5, batch_size=8, verbose=0)
    assert losses.history["loss"][-1] < losses.history["loss"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ess": 0}, "ess=0"),
        ({"hess_init": -1}, "hess_init=-1"),
        ({"beta_1": 1.0}, "beta_1=1.0"),
        ({"beta_2": -0.1}, "beta_2=-0.1"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"clip_radius": 0}, "clip_radius=0"),
        ({"clip_radius": np.nan}, "clip_radius=nan"),
        ({"learning_rate": np.nan}, "learning_rate=nan"),
        ({"learning_rate": np.inf}, "learning_rate=inf"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1"),
        ({"learning_rate": True}, "learning_rate=True"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"ess": True}, "ess=True"),
        ({"ess": np.inf}, "ess=inf"),
        ({"ess": "10"}, "ess='10'"),
        ({"hess_init": np.nan}, "hess_init=nan"),
        ({"rescale_lr": "no"}, "rescale_lr='no'"),
        ({"debias": 1}, "debias=1"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"hess_approx": "newton"}, "hess_approx='newton'"),
        ({"mc_samples": 0}, "mc_samples=0"),
        ({"mc_samples": 1.5}, "mc_samples=1.5"),
        ({"mc_samples": 2, "gradient_accumulation_steps": 2}, "one of them"),
        ({"use_ema": True}, "use_ema=True"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        IVON(**options)


def test_all_weights_have_the_prior():
    with pytest.raises(ValueError, match="precision of the prior"):
        IVON(0.1).exclude_from_weight_decay(var_names=["bias"])


def test_whole_numbers_are_rates_too():
    assert float(IVON(2).learning_rate) == 2.0
    assert float(IVON(np.float32(0.5)).learning_rate) == 0.5


def test_mean_weights_around_validation_and_checkpoints(tmp_path):
    model = _model()
    x, y = _data()
    kernel = model.get_layer("hidden").kernel
    seen = {}

    class Watch(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            seen["test"] = _numpy(kernel), model.optimizer.posterior(kernel)[0]

        def on_epoch_end(self, epoch, logs=None):
            seen["end"] = _numpy(kernel), model.optimizer.posterior(kernel)[0]

        def on_epoch_begin(self, epoch, logs=None):
            if epoch:
                mean, _ = model.optimizer.posterior(kernel)
                seen["begin"] = np.abs(_numpy(kernel) - mean).max()

    path = tmp_path / "best.weights.h5"
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    model.fit(
        x,
        y,
        epochs=2,
        verbose=0,
        validation_data=(x, y),
        callbacks=[ks.callbacks.MeanWeights(), Watch(), checkpoint],
    )
    for name in ("test", "end"):
        np.testing.assert_array_equal(*seen[name])
    assert seen["begin"] > 1e-3
    mean, _ = model.optimizer.posterior(kernel)
    np.testing.assert_array_equal(_numpy(kernel), mean)
    model.load_weights(path)
    np.testing.assert_array_equal(_numpy(kernel), mean)


def test_mean_weights_wants_ivon():
    model = _model()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="Expected IVON"):
        model.fit(*_data(), verbose=0, callbacks=[ks.callbacks.MeanWeights()])
