"""A training with RankBudget that stops half way, and goes on."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.optimizers import IVON

pytestmark = pytest.mark.compiled


def _numpy(x):
    return ops.convert_to_numpy(x)


def _optimizer(kind):
    if kind == "ivon":
        return IVON(0.05, ess=100, seed=0)
    adam = keras.optimizers.Adam(0.02)
    if kind == "scaled":
        return keras.optimizers.LossScaleOptimizer(adam, initial_scale=8.0)
    return adam


def _model(kind="adam"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="first"),
            keras.layers.Dense(5, name="second"),
        ]
    )
    ks.wrap_model(model, "adalora", target=["first", "second"], rank=4, seed=1)
    model.compile(_optimizer(kind), "mse")
    return model


def _fit(model, *callbacks, **options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype("float32")
    y = rng.normal(size=(32, 5)).astype("float32")
    options = {"epochs": 6, "batch_size": 8, **options}
    model.fit(x, y, shuffle=False, verbose=0, callbacks=callbacks, **options)


def _budget():
    return ks.callbacks.RankBudget(
        1.5, warmup=3, final=6, interval=2, total_steps=24
    )


def _pair(path, first):
    """The two callbacks, in one order or the other."""
    pair = [keras.callbacks.BackupAndRestore(path / first), _budget()]
    return pair if first == "backup" else pair[::-1]


class _Kill(keras.callbacks.Callback):
    """Stops in the middle of the third epoch."""

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 10:
            raise KeyboardInterrupt


def _end(model):
    """All weights and the optimizer's state, without its own counters."""
    variables = [*model.weights, *model.optimizer.variables]
    return [_numpy(v) for v in variables]


def _assert_same(got, wanted):
    for value, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(value, other)


ONCE = [pytest.param(x, marks=pytest.mark.once) for x in ("ivon", "scaled")]


@pytest.mark.parametrize("kind", ["adam", *ONCE[:1]])
def test_a_backup_goes_on_wherever_it_is_in_the_list(kind, tmp_path):
    straight = _model(kind)
    budget = _budget()
    _fit(straight, budget)
    assert budget.ranks[1] != budget.ranks[-1]
    for first in ("backup", "budget"):
        with pytest.raises(KeyboardInterrupt):
            _fit(_model(kind), *_pair(tmp_path, first), _Kill())
        model = _model(kind)
        callbacks = _pair(tmp_path, first)
        _fit(model, *callbacks)
        _assert_same(_end(model), _end(straight))
        resumed = next(c for c in callbacks if hasattr(c, "ranks"))
        assert resumed.ranks == budget.ranks[2:]


@pytest.mark.parametrize("kind", ["adam", *ONCE])
def test_a_checkpoint_goes_on(kind, tmp_path):
    path = tmp_path / "{epoch}.keras"
    straight = _model(kind)
    _fit(straight, _budget(), keras.callbacks.ModelCheckpoint(path))
    model = keras.models.load_model(tmp_path / "2.keras")
    assert int(model.optimizer.iterations) == 8
    model.save(tmp_path / "again.keras")  # a file of it knows as much
    model = keras.models.load_model(tmp_path / "again.keras")
    _fit(model, _budget(), initial_epoch=2)
    _assert_same(_end(model), _end(straight))
    last = keras.models.load_model(tmp_path / "6.keras")
    _assert_same(_end(last), _end(straight))


def test_goes_on_after_an_interruption_and_begins_anew_after_an_end():
    model = _model()
    with pytest.raises(KeyboardInterrupt):
        _fit(model, _budget(), _Kill())
    budget = _budget()
    steps = []

    class Steps(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            steps.append(int(budget.allocation.step))

    _fit(model, budget, Steps(), epochs=4, batch_size=16)
    assert not any(layer.progress() for layer in model.layers)
    _fit(model, budget, Steps())
    assert steps == [10, 0]


def test_weights_of_another_criterion_are_taken_as_far_as_they_go(tmp_path):
    model = _model("ivon")
    _fit(
        model,
        _budget(),
        keras.callbacks.ModelCheckpoint(tmp_path / "a.keras"),
        epochs=2,
    )
    state = keras.models.load_model(tmp_path / "a.keras").layers[0].progress()
    assert int(state["step"]) == 8
    assert {"importance_e", "uncertainty_b"} < set(state)
    model = keras.models.load_model(tmp_path / "a.keras")
    options = {"warmup": 3, "final": 6, "interval": 2, "total_steps": 24}
    budget = ks.callbacks.RankBudget(1.5, "snr", **options)
    _fit(model, budget, initial_epoch=2)
    assert int(budget.allocation.step) == 24
    assert sum(budget.ranks[-1].values()) == 3


def test_adapter_files_hold_nothing_of_it(tmp_path):
    model = _model()
    with pytest.raises(KeyboardInterrupt):
        _fit(model, _budget(), _Kill())
    assert model.layers[0].progress()
    ks.save_adapters(model, tmp_path / "a.safetensors")
    again = _model()
    ks.load_adapters(again, tmp_path / "a.safetensors")
    for weight, other in zip(model.weights, again.weights):
        np.testing.assert_array_equal(_numpy(weight), _numpy(other))
    assert not again.layers[0].progress()
