import os
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral._internal.optimizers import after_update
from keras_spectral._internal.optimizers import renewed
from keras_spectral._internal.optimizers import stop_after_update
from keras_spectral.optimizers import IVON
from keras_spectral.optimizers import WithRates

pytestmark = pytest.mark.compiled

GOLDEN = os.environ.get("KERAS_SPECTRAL_GOLDEN")
BACKEND = keras.backend.backend()
OPTIMIZERS = keras.optimizers
NAMES = [
    name
    for name in (
        "SGD Adam AdamW Nadam RMSprop Adagrad Adadelta Adamax Adafactor Lion "
        "Ftrl Lamb Muon ScheduleFreeAdamW"
    ).split()
    if hasattr(OPTIMIZERS, name)
]
# The first regex that matches counts: lora_b2 has 0.5, the last one 0.
RATES = {".*b2": 0.5, ".*lora_b.*": 16, "frozen": 0.0}
FACTORS = {"lora_a": 1, "lora_b": 16, "lora_b2": 0.5, "frozen": 0}
SHAPES = (4, 3), (3, 5), (3, 5), (2,)


def _numpy(x):
    return ops.convert_to_numpy(x)


def _start(steps=4):
    """Values of the four variables, and gradients for some steps."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(steps + 1, sum(map(np.prod, SHAPES))))
    ends = np.cumsum([np.prod(shape) for shape in SHAPES])[:-1]
    parted = [
        [part.reshape(s) for part, s in zip(np.split(row, ends), SHAPES)]
        for row in draws.astype("float32")
    ]
    return parted[0], parted[1:]


def _variables(values, names=FACTORS):
    return [keras.Variable(v, name=name) for v, name in zip(values, names)]


def _apply(optimizer, gradients, variables):
    """One update as the backend's training step makes it."""
    gradients = [ops.convert_to_tensor(g) for g in gradients]
    if BACKEND != "jax":
        optimizer.apply(gradients, variables)
        return
    state = [v.value for v in optimizer.variables]
    values, state = optimizer.stateless_apply(
        state, gradients, [v.value for v in variables]
    )
    both = [*variables, *optimizer.variables]
    for old, new in zip(both, [*values, *state]):
        old.assign(new)


def _trained(optimizer, values, gradients, names=FACTORS, scale=1.0):
    variables = _variables(values, names)
    optimizer.build(variables)
    for step in gradients:
        _apply(optimizer, [scale * g for g in step], variables)
    return [_numpy(v) for v in variables]


def _each_alone(make, values, gradients):
    """Where optimizers of one variable each, with their own rates, end."""
    ends = []
    for index, (name, factor) in enumerate(FACTORS.items()):
        end = values[index]
        if factor:
            given = [[step[index]] for step in gradients]
            (end,) = _trained(make(factor), [end], given, [name])
        ends.append(end)
    return ends


def assert_equal(got, expected, start, **tolerance):
    for one, other, before, c in zip(got, expected, start, FACTORS.values()):
        np.testing.assert_allclose(
            one, other, **{"rtol": 1e-5, "atol": 1e-6, **tolerance}
        )
        assert bool((one != before).any()) == bool(c)


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_equals_several_with_their_own_rates(name):
    kind = getattr(OPTIMIZERS, name)
    values, gradients = _start(3)

    def make(c=1):
        return kind(0.01 * c, weight_decay=0.1)

    got = _trained(WithRates(make(), RATES), values, gradients)
    assert_equal(got, _each_alone(make, values, gradients), values)


@pytest.mark.once
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "clipnorm": 0.5},
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 2},
        {"clipnorm": 0.5},
        {"clipvalue": 0.1},
        {"loss_scale_factor": 8.0},
    ],
)
def test_options_equal_those_of_several(options):
    values, gradients = _start()

    def make(c=1):
        return OPTIMIZERS.AdamW(0.01 * c, **options)

    optimizer = WithRates(make(), RATES)
    got = _trained(optimizer, values, gradients)
    assert_equal(got, _each_alone(make, values, gradients), values)
    steps = options.get("gradient_accumulation_steps", 1)
    assert int(optimizer.iterations) == 4 / steps


def test_averages_are_taken_over_in_the_end():
    values, gradients = _start()
    options = {"use_ema": True, "ema_momentum": 0.5}
    optimizer = WithRates(OPTIMIZERS.SGD(0.01, **options), RATES)
    variables = _variables(values)
    optimizer.build(variables)
    averages, weights = [0, 0, 0, 0], values
    for step, given in enumerate(gradients):
        _apply(optimizer, given, variables)
        weights = [
            w - 0.01 * c * g
            for w, g, c in zip(weights, given, FACTORS.values())
        ]
        share = 0.5 if step else 1.0
        averages = [
            (1 - share) * a + share * w for a, w in zip(averages, weights)
        ]
    optimizer.finalize_variable_values(variables)
    for variable, average in zip(variables, averages):
        np.testing.assert_allclose(_numpy(variable), average, atol=1e-6)


def _adamw(value, gradients, rates, decay):
    """The formula of AdamW, the rate of each step given."""
    w, m, v = np.float64(value), 0.0, 0.0
    for t, (g, rate) in enumerate(zip(np.float64(gradients), rates), 1):
        w = w * (1 - rate * decay)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        bias = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        w = w - rate * bias * m / (np.sqrt(v) + 1e-7)
    return w


@pytest.mark.parametrize("kind", ["number", "schedule", "callable"])
def test_the_rate_of_the_moment_times_the_factor(kind):
    values, gradients = _start()
    rate, rates = 0.02, [0.02] * 4
    if kind == "schedule":
        rate = OPTIMIZERS.schedules.InverseTimeDecay(0.02, 1, 0.5)
        rates = [0.02 / (1 + 0.5 * t) for t in range(4)]
    elif kind == "callable":

        def rate():
            return 0.02

    optimizer = WithRates(OPTIMIZERS.AdamW(rate, weight_decay=0.3), RATES)
    got = _trained(optimizer, values, gradients)
    expected = [
        _adamw(w, [s[i] for s in gradients], np.multiply(rates, c), 0.3)
        for i, (w, c) in enumerate(zip(values, FACTORS.values()))
    ]
    assert_equal(got, expected, values, rtol=1e-4, atol=2e-5)


def test_the_norm_of_all_gradients_is_clipped():
    values, gradients = _start()
    optimizer = WithRates(OPTIMIZERS.SGD(0.01, global_clipnorm=0.5), RATES)
    got = _trained(optimizer, values, gradients)
    expected = values
    for step in gradients:
        norm = np.sqrt(sum((g**2).sum() for g in step))
        expected = [
            w - 0.01 * c * g * 0.5 / norm
            for w, g, c in zip(expected, step, FACTORS.values())
        ]
    assert_equal(got, expected, values)


def test_within_a_scaled_loss():
    values, gradients = _start()
    plain = WithRates(OPTIMIZERS.Adam(0.01), RATES)
    inner = WithRates(OPTIMIZERS.Adam(0.01, loss_scale_factor=2.0), RATES)
    scaled = OPTIMIZERS.LossScaleOptimizer(inner, 4.0)
    assert inner.inner_optimizer.loss_scale_factor is None
    expected = _trained(plain, values, gradients)
    got = _trained(scaled, values, gradients, scale=4.0)
    assert_equal(got, expected, values)
    infinite = [np.inf * np.ones_like(g) for g in gradients[0]]
    variables = scaled.inner_optimizer.inner_optimizer._trainable_variables
    _apply(scaled, infinite, variables)
    assert_equal([_numpy(v) for v in variables], expected, values)
    assert float(scaled.dynamic_scale) == 2.0
    assert int(scaled.iterations) == 4


def test_gradients_that_are_no_numbers_leave_a_frozen_variable_alone():
    values, gradients = _start(1)
    gradients[0][3] = np.full(2, np.nan, "float32")
    got = _trained(WithRates("adam", RATES), values, gradients)
    np.testing.assert_array_equal(got[3], values[3])


@pytest.mark.skipif(not GOLDEN, reason="needs KERAS_SPECTRAL_GOLDEN")
def test_golden_steps_with_a_frozen():
    """LoRA-FA: its gradient of B is made here, the rest is Adam's."""
    file = np.load(pathlib.Path(GOLDEN, "lora_optimizers.npz"))
    x, base = file["x"], file["x"] @ file["W"].T + file["bias"]
    start = file["lorafa/A0"], file["lorafa/B0"]
    a, b = variables = _variables(start, ["lora_a", "lora_b"])
    adam = OPTIMIZERS.Adam(0.01, epsilon=1e-6)
    optimizer = WithRates(adam, {"lora_a": 0})
    optimizer.build(variables)
    scale = 2.0
    gram = np.float64(start[0]) @ start[0].T + 1e-8 * np.eye(3)
    steps = zip(file["lorafa/A"], file["lorafa/B"], strict=True)
    for expected_a, expected_b in steps:
        error = base + scale * x @ _numpy(a).T @ _numpy(b).T - file["target"]
        down = 2 * scale / error.size * error.T @ (x @ _numpy(a).T)
        up = 2 * scale / error.size * (error @ _numpy(b)).T @ x
        projected = (down @ np.linalg.inv(gram) / scale**2).astype("float32")
        _apply(optimizer, [up, projected], variables)
        np.testing.assert_array_equal(_numpy(a), expected_a)
        np.testing.assert_allclose(_numpy(b), expected_b, atol=2e-5)


def _model(units=8, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(units, "tanh", name="first"),
            keras.layers.Dense(5, name="second"),
        ],
        name="mlp",
    )
    if options:
        options = {"seed": 1, "target": ["first", "second"], **options}
        ks.wrap_model(model, **options)
    return model


def _data(count=32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 6)).astype("float32")
    return x, rng.normal(size=(count, 5)).astype("float32")


@pytest.mark.parametrize("decay", [None, 0.05])
def test_lora_plus_in_two_lines(decay):
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(5, name="hidden")]
    )
    ks.wrap_model(model, "lora", target="hidden", rank=3, alpha=6, seed=0)
    layer = model.layers[0]
    a, b = _numpy(layer.lora_a), _numpy(layer.lora_b)
    kernel, bias = map(_numpy, (layer.layer.kernel, layer.layer.bias))
    inner = OPTIMIZERS.SGD(0.01, weight_decay=decay)
    model.compile(WithRates(inner, {r".*lora_b": 16.0}), "mse")
    x, y = _data(20)
    model.fit(x, y, batch_size=20, epochs=4, verbose=0)
    for _ in range(4):
        error = x @ (kernel + 2 * a @ b) + bias - y
        slope = 2 * 2 / error.size * x.T @ error
        grads = slope @ b.T, a.T @ slope
        a, b = (
            w * (1 - rate * (decay or 0)) - rate * g
            for w, g, rate in zip((a, b), grads, (0.01, 0.16))
        )
    np.testing.assert_allclose(_numpy(layer.lora_a), a, atol=1e-6)
    np.testing.assert_allclose(_numpy(layer.lora_b), b, atol=1e-6)


def test_layer_wise_decay_in_two_lines():
    model = _model()
    depths = enumerate(reversed(model.layers))
    rates = {f".*{layer.name}/.*": 0.5**i for i, layer in depths}
    model.compile(WithRates("adam", rates), "mse")
    model.optimizer.build(model.trainable_variables)
    factors = [model.optimizer.factor(v) for v in model.trainable_variables]
    assert factors == [0.5, 0.5, 1.0, 1.0]


def test_saves_and_goes_on(tmp_path):
    model = _model(method="lora", rank=2)
    inner = OPTIMIZERS.AdamW(0.01, clipnorm=0.5)
    model.compile(WithRates(inner, {".*lora_b": 4, ".*": 0.5}), "mse")
    model.fit(*_data(), epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer, WithRates)
    assert again.optimizer.get_config() == model.optimizer.get_config()
    assert list(again.optimizer.rates) == [".*lora_b", ".*"]
    states = again.optimizer.variables, model.optimizer.variables
    for one, other in zip(*states, strict=True):
        np.testing.assert_array_equal(_numpy(one), _numpy(other))
    for each in (model, again):
        each.fit(*_data(), epochs=2, shuffle=False, verbose=0)
    for one, other in zip(model.weights, again.weights):
        np.testing.assert_allclose(_numpy(one), _numpy(other), atol=1e-6)


def test_in_half_precision(tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = _model()
        adam = OPTIMIZERS.Adam(0.01)
        model.compile(WithRates(adam, {".*bias": 0}), "mse")
        assert isinstance(model.optimizer, OPTIMIZERS.LossScaleOptimizer)
        model.optimizer.build(model.trainable_variables)
        model.optimizer.dynamic_scale.assign(8.0)
        start = _numpy(model.layers[0].kernel)
        model.fit(*_data(), verbose=0)
        assert (_numpy(model.layers[0].kernel) != start).all()
        np.testing.assert_array_equal(_numpy(model.layers[0].bias), 0)
        model.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
        assert again.optimizer.get_config() == model.optimizer.get_config()
        states = again.optimizer.variables, model.optimizer.variables
        for one, other in zip(*states, strict=True):
            np.testing.assert_array_equal(_numpy(one), _numpy(other))
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    "given",
    ["adam", {"class_name": "Adam", "config": {"learning_rate": 0.5}}],
)
def test_names_and_configurations(given):
    optimizer = WithRates(given, {".*a": 2})
    assert isinstance(optimizer.inner_optimizer, OPTIMIZERS.Adam)
    config = OPTIMIZERS.serialize(optimizer)
    assert config["registered_name"] == "keras_spectral>WithRates"
    again = OPTIMIZERS.deserialize(config)
    assert again.get_config() == optimizer.get_config()


def test_the_rate_is_read_and_set_through():
    model = _model()
    model.compile(WithRates(OPTIMIZERS.SGD(0.1), {".*second/.*": 0.5}), "mse")
    callbacks = keras.callbacks
    model.fit(
        *_data(),
        epochs=3,
        verbose=0,
        callbacks=[
            callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        ],
    )
    assert float(model.optimizer.learning_rate) == np.float32(0.0125)
    plateau = callbacks.ReduceLROnPlateau("loss", 0.5, 1, min_delta=100.0)
    model.fit(*_data(), epochs=2, verbose=0, callbacks=[plateau])
    assert float(model.optimizer.learning_rate) == np.float32(0.00625)
    model.optimizer.learning_rate = 0.25
    inner = model.optimizer.inner_optimizer
    assert float(inner.learning_rate) == 0.25
    before = _numpy(model.layers[1].kernel)
    twin = _model()
    twin.set_weights(model.get_weights())
    twin.compile(OPTIMIZERS.SGD(0.125), "mse")
    for each in (model, twin):
        each.fit(*_data(), batch_size=32, verbose=0)
    after = _numpy(model.layers[1].kernel)
    np.testing.assert_allclose(after, _numpy(twin.layers[1].kernel), atol=1e-6)
    assert (after != before).all()


def test_options_are_those_of_the_inner_one():
    inner = OPTIMIZERS.SGD(0.1, clipnorm=0.5, gradient_accumulation_steps=2)
    optimizer = WithRates(inner, {".*": 2})
    assert optimizer.clipnorm == 0.5
    assert optimizer.gradient_accumulation_steps == 2
    optimizer.clipnorm = 0.25
    optimizer.loss_scale_factor = 8.0
    assert inner.clipnorm == 0.25 and inner.loss_scale_factor == 8.0
    assert float(optimizer.scale_loss(ops.ones(()))) == 8.0
    assert not optimizer.use_ema


def test_exclusions_from_weight_decay():
    values, _ = _start()
    zeros = [[np.zeros_like(v) for v in values]]
    inner = OPTIMIZERS.SGD(0.1, weight_decay=0.5)
    optimizer = WithRates(inner, RATES)
    # One group of a single factor has none left to shrink.
    optimizer.exclude_from_weight_decay(var_names=["b2"])
    got = _trained(optimizer, values, zeros)
    for one, start, c in zip(got, values, (1, 16, 0, 0)):
        np.testing.assert_allclose(one, start * (1 - c * 0.05), rtol=1e-6)


def test_an_optimizer_is_left_as_it_was():
    values, gradients = _start()
    inner = OPTIMIZERS.AdamW(0.01)
    step = inner.update_step

    def counted(*args):
        counts.append(1)
        return step(*args)

    counts = []
    vars(inner)["update_step"] = counted
    optimizer = WithRates(inner, RATES)
    variables = _variables(values)
    optimizer.build(variables)
    _apply(optimizer, gradients[0], variables)
    names = set(vars(inner))
    assert not names & {"_apply_weight_decay", "_get_current_learning_rate"}
    assert not names & {"_parallel_update_step", "_at_rates"}
    assert vars(inner)["update_step"] is counted
    if not hasattr(inner, "_parallel_update_step"):
        assert len(counts) == 3
    with pytest.raises(ValueError):
        optimizer.apply(
            [ops.convert_to_tensor(gradients[0][0])], [_variables(values)[0]]
        )
    assert set(vars(inner)) == names


def test_an_optimizer_that_is_built_already():
    values, gradients = _start()
    inner, variables = OPTIMIZERS.SGD(0.01), _variables(values)
    inner.build(variables)
    optimizer = WithRates(inner, RATES)
    _apply(optimizer, gradients[0], variables)
    for variable, w, g, c in zip(
        variables, values, gradients[0], FACTORS.values()
    ):
        expected = w - 0.01 * c * g
        np.testing.assert_allclose(_numpy(variable), expected, atol=1e-6)
    assert optimizer.built


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("first", ["rates", "function"])
def test_functions_after_updates_see_each_step_once(first, scaled):
    values, gradients = _start(2)
    inner, variables = OPTIMIZERS.SGD(0.1, momentum=0.9), _variables(values)
    seen = []

    def function(grads, updated):
        assert len(grads) == len(updated) == 4
        seen.append([v.path for v in updated])
        total = sum(ops.sum(v) for v in updated)
        extra.assign(ops.convert_to_tensor(extra) + total)

    if first == "function":
        inner.build(variables)
        extra = inner.add_variable((), name="extra")
        after_update(inner, function, [extra])
    optimizer = around = WithRates(inner, RATES)
    if scaled:
        around = OPTIMIZERS.LossScaleOptimizer(optimizer, 1.0)
    around.build(variables)
    if first == "rates":
        extra = inner.add_variable((), name="extra")
        after_update(around, function, [extra])
    count = len(around.variables)
    expected, momenta, total = values, [0, 0, 0, 0], 0.0
    for step in gradients:
        _apply(around, step, variables)
        momenta = [
            0.9 * m - 0.1 * c * g
            for m, g, c in zip(momenta, step, FACTORS.values())
        ]
        expected = [w + m for w, m in zip(expected, momenta)]
        total += sum(w.sum() for w in expected)
    assert_equal([_numpy(v) for v in variables], expected, values)
    assert len(seen) == 2 and float(extra) == pytest.approx(total, 1e-5)
    store = {}
    inner.save_own_variables(store)
    assert len(store) == len(inner.variables) - 1
    stop_after_update(around)
    assert len(around.variables) == count - 1
    _apply(around, gradients[0], variables)
    assert len(seen) == 2


@pytest.mark.parametrize("scaled", [False, True])
def test_within_rank_budget(scaled):
    ends = []
    for rates in ({".*lora_e": 0.5}, None):
        model = _model(method="adalora", rank=4)
        optimizer = OPTIMIZERS.Adam(0.02)
        if rates:
            optimizer = WithRates(optimizer, rates)
        if scaled:
            optimizer = OPTIMIZERS.LossScaleOptimizer(optimizer, 8.0)
        model.compile(optimizer, "mse")
        budget = ks.callbacks.RankBudget(1.5, warmup=2, final=0.25, interval=2)
        history = model.fit(
            *_data(), batch_size=4, epochs=4, verbose=0, callbacks=[budget]
        ).history
        assert history["rank_budget"][-1] == 3
        ranks = {layer.name: layer.active_rank() for layer in model.layers}
        assert ranks == budget.ranks[-1]
        assert history["loss"][-1] < history["loss"][0]
        ends.append(_numpy(model.layers[0].lora_e))
    assert (ends[0] != ends[1]).any()


@pytest.mark.parametrize("scaled", [False, True])
def test_wrapped_after_it_is_compiled_and_built(scaled):
    model = _model()

    def rate():
        return 0.01

    adam = OPTIMIZERS.Adam(rate, clipnorm=0.5)
    optimizer = WithRates(adam, {".*(lora_b|kernel)": 16, ".*bias": 0})
    if scaled:
        optimizer = OPTIMIZERS.LossScaleOptimizer(optimizer, 8.0)
    model.compile(optimizer, "mse")
    model.fit(*_data(), verbose=0)
    ks.wrap_model(model, "lora", target="first", rank=2, trainable="second")
    fresh = model.optimizer
    assert fresh is not optimizer and not fresh.built
    if scaled:
        optimizer, fresh = optimizer.inner_optimizer, fresh.inner_optimizer
    assert type(fresh) is WithRates and fresh.rates == optimizer.rates
    assert fresh.inner_optimizer is not adam
    assert fresh.inner_optimizer._learning_rate is rate
    assert fresh.clipnorm == 0.5
    model.fit(*_data(), verbose=0)
    factors = [fresh.factor(v) for v in model.trainable_variables]
    assert factors == [1, 16, 16, 0]
    ks.unwrap_model(model)
    model.fit(*_data(), verbose=0)


def test_renewed_keeps_what_a_user_hung_on_it():
    optimizer = WithRates(IVON(0.1, ess=10, seed=1), {".*": 2})
    optimizer.note = "mine"
    fresh = renewed(optimizer)
    assert fresh.note == "mine" and not fresh.built
    assert fresh.get_config() == optimizer.get_config()


def test_traces_no_more_than_the_inner_one():
    counts = []
    for rates in (None, {".*kernel": 0.5}):
        model, traces = _model(), []
        plain = model.layers[0].call

        def call(*args, plain=plain, traces=traces, **kwargs):
            traces.append(1)
            return plain(*args, **kwargs)

        model.layers[0].call = call
        optimizer = OPTIMIZERS.Adam(0.01)
        if rates:
            optimizer = WithRates(optimizer, rates)
        model.compile(optimizer, "mse")
        for rate in (0.1, 0.01):
            model.fit(*_data(), epochs=2, verbose=0)
            model.optimizer.learning_rate = rate
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(BACKEND != "torch", reason="others compile the step")
@pytest.mark.parametrize("name", ["Adam", "AdamW", "Lion", "RMSprop"])
def test_no_number_goes_to_python_in_a_step(name):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    values, gradients = _start(2)
    inner = getattr(OPTIMIZERS, name)(0.01, weight_decay=0.1)
    optimizer, variables = WithRates(inner, RATES), _variables(values)
    optimizer.build(variables)
    _apply(optimizer, gradients[0], variables)
    with Recorder():
        _apply(optimizer, gradients[1], variables)
    assert seen and not any("_local_scalar_dense" in name for name in seen)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has it not on PyTorch")
def test_several_steps_in_one_execution():
    ends = []
    for steps in (1, 4):
        model = _model()
        optimizer = WithRates(OPTIMIZERS.Adam(0.01), {".*kernel": 2})
        model.compile(optimizer, "mse", steps_per_execution=steps)
        model.fit(*_data(), batch_size=4, shuffle=False, verbose=0)
        ends.append(_numpy(model.layers[0].kernel))
    np.testing.assert_allclose(*ends, atol=1e-6)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's strategies")
def test_under_a_strategy():
    import tensorflow as tf

    ends = []
    for strategy in (tf.distribute.MirroredStrategy(["CPU:0"]), None):
        with strategy.scope() if strategy else keras.name_scope("plain"):
            model = _model()
            adam = OPTIMIZERS.AdamW(0.01, weight_decay=0.1)
            model.compile(WithRates(adam, {".*kernel": 2, ".*bias": 0}), "mse")
        model.fit(*_data(), shuffle=False, verbose=0)
        ends.append(_numpy(model.layers[0].kernel))
        np.testing.assert_array_equal(_numpy(model.layers[0].bias), 0)
    np.testing.assert_allclose(*ends, atol=1e-6)


def test_around_ivon():
    values, gradients = _start()

    def make(c):
        ivon = IVON(0.1 * c, ess=100)
        ivon.noise = lambda index, shape, dtype: ops.zeros(shape, dtype)
        return ivon

    got = _trained(WithRates(make(1), RATES), values, gradients)
    assert_equal(got, _each_alone(make, values, gradients), values)


def test_ivon_is_found_and_draws_where_the_mean_stays():
    model = _model()
    kernel = model.layers[1].kernel
    start = _numpy(kernel)
    ivon = IVON(0.1, ess=100, seed=0)
    model.compile(WithRates(ivon, {".*second/kernel": 0}), "mse")
    samples = []
    for _ in range(2):
        model.fit(*_data(), verbose=0)
        samples.append(_numpy(kernel))
        np.testing.assert_array_equal(ivon.posterior(kernel)[0], start)
    assert (samples[0] != samples[1]).all()
    mean = ks.callbacks.MeanWeights()
    model.fit(*_data(), verbose=0, callbacks=[mean])
    np.testing.assert_array_equal(_numpy(kernel), start)
    predicted = ks.optimizers.predict_mean(model, _data()[0], samples=2)
    assert predicted.shape == (32, 5)


@pytest.mark.parametrize(
    ("optimizer", "rates", "message"),
    [
        ("adamm", {".*": 1}, "optimizer='adamm'.*Did you mean 'Adam'"),
        (None, {".*": 1}, "optimizer=None"),
        (OPTIMIZERS.Adam, {".*": 1}, "Expected a Keras optimizer, or its"),
        ({"name": "adam"}, {".*": 1}, "Expected a Keras optimizer, or its"),
        ("adam", {}, "rates={}. Expected a dictionary of regexes"),
        ("adam", [(".*", 1)], "Expected a dictionary of regexes"),
        ("adam", None, "rates=None"),
        ("adam", {1: 1}, "rates with 1. Expected"),
        ("adam", {"(": 1}, r"rates with '\(', which is no regular expression"),
        ("adam", {".*": -1}, r"rates\['\.\*'\]=-1. .* at least 0"),
        ("adam", {".*": np.nan}, "=nan"),
        ("adam", {".*": np.inf}, "=inf"),
        ("adam", {".*": True}, "=True"),
        ("adam", {".*": "16"}, "='16'"),
    ],
)
def test_arguments_are_checked(optimizer, rates, message):
    with pytest.raises(ValueError, match=message):
        WithRates(optimizer, rates)


def test_what_is_around_others_stays_outside():
    scaled = OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.SGD(0.1))
    with pytest.raises(ValueError, match="LossScaleOptimizer belongs around"):
        WithRates(scaled, {".*": 1})
    with pytest.raises(ValueError, match="into one dictionary"):
        WithRates(WithRates("sgd", {".*": 1}), {".*": 1})
    if hasattr(OPTIMIZERS, "MultiOptimizer"):
        several = OPTIMIZERS.OptimizerMap(OPTIMIZERS.SGD(0.1))
        with pytest.raises(ValueError, match="one that updates weights itself"):
            WithRates(OPTIMIZERS.MultiOptimizer(several), {".*": 1})


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        (".*lora_c", ".*lora_[ab]"),
        ("lora_b", ".*lora_b"),
        (".*frist/.*", ".*first/.*"),
        ("mlp/secnod/default/lora_a", "mlp/second/default/lora_a"),
    ],
)
def test_a_regex_that_matches_nothing(pattern, meant):
    model = _model(method="lora", rank=2)
    model.compile(WithRates("adam", {".*": 1, pattern: 16}), "mse")
    with pytest.raises(ValueError, match="matches no variable that") as error:
        model.optimizer.build(model.trainable_variables)
    assert f"rates has {pattern!r}" in str(error.value)
    assert "lora_a'" in str(error.value)
    inner = model.optimizer.inner_optimizer
    assert not inner.built and not model.optimizer.built
    said = str(error.value).partition("Did you mean '")[2].partition("'")[0]
    assert said in (
        meant,
        meant.replace("[ab]", "a"),
        meant.replace("[ab]", "b"),
    )


def test_factors_are_those_of_known_variables():
    optimizer = WithRates("sgd", {"lora_b": 16})
    variable, other = _variables([np.ones(2), np.ones(2)], ["lora_b", "other"])
    with pytest.raises(ValueError, match="is built for"):
        optimizer.factor(variable)
    optimizer.build([variable])
    assert optimizer.factor(variable) == 16
    with pytest.raises(ValueError, match="is built for"):
        optimizer.factor(other)
