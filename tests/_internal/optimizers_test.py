import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral._internal.optimizers import after_update
from keras_spectral._internal.optimizers import called_after_update
from keras_spectral._internal.optimizers import renewed
from keras_spectral._internal.optimizers import stop_after_update

OPTIMIZERS = keras.optimizers


def _numpy(x):
    return ops.convert_to_numpy(x)


def _variable():
    return keras.Variable(np.ones(2, "float32"))


def _model():
    return keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(32, activation="relu", name="hidden"),
            keras.layers.Dense(4, name="head"),
        ]
    )


def _decayed(optimizer, variables):
    """Which variables an update with gradients of zero shrinks."""
    optimizer.build(variables)
    before = [_numpy(v) for v in variables]
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    inner.apply([ops.zeros(v.shape) for v in variables], variables)
    after = [_numpy(v) for v in variables]
    return [bool((a != b).any()) for a, b in zip(after, before)]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_wrapped_model_keeps_exclusions_from_weight_decay(scaled, by_name):
    model = _model()
    head = model.get_layer("head")
    head.bias.assign(np.ones(4))
    adam = optimizer = OPTIMIZERS.AdamW(1e-2, weight_decay=5.0)
    if by_name:
        adam.exclude_from_weight_decay(var_names=["bias"])
    else:
        adam.exclude_from_weight_decay(var_list=[head.bias])
    if scaled:
        optimizer = OPTIMIZERS.LossScaleOptimizer(adam)
    model.compile(optimizer, "mse")
    model.optimizer.build(model.trainable_variables)
    ks.wrap_model(model, "lora", target="hidden", rank=2, trainable="head")
    assert model.optimizer is not optimizer
    a, b, kernel, bias = model.trainable_variables
    b.assign(np.ones(b.shape))
    assert bias.shape == (4,) and bias is not head.bias
    shrunk = _decayed(model.optimizer, [a, b, kernel, bias])
    assert shrunk == [True, True, True, False]
    ks.unwrap_model(model)
    model.get_layer("hidden").bias.assign(np.ones(32))
    shrunk = _decayed(model.optimizer, model.trainable_variables)
    assert shrunk == [True, not by_name, True, False]


def test_exclusions_hold_for_what_takes_a_variable_s_place():
    old, new, other = _variable(), _variable(), _variable()
    optimizer = OPTIMIZERS.SGD(0.1, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[old])
    optimizer.build([old, other])
    fresh = renewed(optimizer, [(old, new)])
    assert not fresh.built
    assert _decayed(fresh, [old, new, other]) == [False, False, True]
    plain = renewed(optimizer)
    assert _decayed(plain, [_variable(), other]) == [True, True]


def test_rates_are_those_of_the_moment():
    optimizer = OPTIMIZERS.SGD(0.1)
    optimizer.learning_rate = 0.3
    assert float(renewed(optimizer).learning_rate) == np.float32(0.3)
    schedule = OPTIMIZERS.schedules.CosineDecay(0.1, 10)
    optimizer.learning_rate = schedule
    assert renewed(optimizer)._learning_rate is schedule
    rate = {"now": 0.5}
    optimizer = OPTIMIZERS.SGD(lambda: rate["now"])
    fresh = renewed(optimizer)
    rate["now"] = 0.25
    assert float(fresh.learning_rate) == 0.25


def test_options_given_later_and_what_a_user_hung_on_it():
    optimizer = ks.optimizers.IVON(0.1, ess=10, seed=1)
    optimizer.clipnorm = 0.5
    optimizer.note = "mine"
    optimizer.noise = lambda index, shape, dtype: ops.zeros(shape, dtype)
    variable = _variable()
    optimizer.build([variable])
    fresh = renewed(optimizer)
    assert fresh.clipnorm == 0.5 and fresh.note == "mine"
    assert fresh.noise is optimizer.noise and not fresh.built
    assert fresh.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    "options",
    [
        {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3},
        {"gradient_accumulation_steps": 4},
        {"global_clipnorm": 2.0, "loss_scale_factor": 8.0},
    ],
)
def test_options_of_every_optimizer(options):
    optimizer = OPTIMIZERS.Adam(0.1, **options)
    optimizer.build([_variable()])
    fresh = renewed(optimizer)
    assert {name: getattr(fresh, name) for name in options} == options
    assert type(fresh) is type(optimizer)


def test_the_scale_that_a_loss_has_reached():
    inner = OPTIMIZERS.SGD(0.1)
    optimizer = OPTIMIZERS.LossScaleOptimizer(inner, 2.0**15)
    optimizer.build([_variable()])
    optimizer.dynamic_scale.assign(64.0)
    fresh = renewed(optimizer)
    assert float(fresh.scale_loss(ops.ones(()))) == 64.0
    fresh.build([_variable()])
    assert float(_numpy(fresh.dynamic_scale)) == 64.0
    assert fresh.inner_optimizer is not inner


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="this Keras has no MultiOptimizer",
)
def test_many_optimizers_keep_their_table():
    decaying = OPTIMIZERS.SGD(0.1, weight_decay=0.5)
    decaying.exclude_from_weight_decay(var_names=["bias"])
    table = OPTIMIZERS.OptimizerMap(decaying, {".*/kernel": decaying})
    optimizer = OPTIMIZERS.MultiOptimizer(table)
    model = _model()
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    ks.wrap_model(model, "lora", target="hidden", rank=2, trainable="head")
    fresh = model.optimizer
    assert len(fresh.optimizers) == 1 and fresh.optimizers[0] is not decaying
    fresh.build(model.trainable_variables)
    bias = model.trainable_variables[-1]
    bias.assign(np.ones(4))
    zeros = [ops.zeros(v.shape) for v in model.trainable_variables]
    fresh.apply(zeros, model.trainable_variables)
    np.testing.assert_array_equal(_numpy(bias), 1.0)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_error_comes_before_any_change(scaled):
    class Secret(OPTIMIZERS.SGD):
        def get_config(self):
            raise NotImplementedError("no configuration")

    model = _model()
    optimizer = Secret(0.1)
    if scaled:
        optimizer = OPTIMIZERS.LossScaleOptimizer(optimizer)
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    layers, count = list(model.layers), len(model.trainable_variables)
    with pytest.raises(NotImplementedError, match="no configuration"):
        ks.wrap_model(model, "lora", target="hidden", rank=2)
    assert model.layers == layers and model.optimizer is optimizer
    assert len(model.trainable_variables) == count


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_called_after_updates_is_not_saved(scaled):
    inner = optimizer = OPTIMIZERS.SGD(0.5, momentum=0.9)
    if scaled:
        optimizer = OPTIMIZERS.LossScaleOptimizer(inner, 2.0)
    variable = _variable()
    optimizer.build([variable])
    count = len(optimizer.variables)
    extra = inner.add_variable((), name="extra")
    seen = []

    def function(gradients, variables):
        seen.append((_numpy(gradients[0]), _numpy(variable)))

    after_update(optimizer, function, [extra])
    assert called_after_update(optimizer) is function
    inner.apply([ops.ones(2)], [variable])
    np.testing.assert_array_equal(seen, [(np.ones(2), np.full(2, 0.5))])
    store = {}
    optimizer.save_own_variables(store)
    assert len(store) == count and len(optimizer.variables) == count + 1
    optimizer.load_own_variables(store)
    assert optimizer.variables[-1] is extra
    stop_after_update(optimizer)
    assert called_after_update(optimizer) is None
    assert len(optimizer.variables) == count
    inner.apply([ops.ones(2)], [variable])
    assert len(seen) == 1
