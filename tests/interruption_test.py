"""An interruption anywhere leaves a model as before or as after."""

import gc
import pathlib
import sys

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks
from keras_spectral._internal.snapshot import Snapshot
from keras_spectral.layers.kernel_host import KernelHost

_HOME = str(pathlib.Path(ks.__file__).parent)
# For each of six operations; where a model's `fit` is compiled, a few.
_MOMENTS = 17 if keras.backend.backend() == "torch" else 2


class _Interrupter:
    """Raises KeyboardInterrupt at the n-th line that the library runs."""

    def __init__(self, moment=None):
        self.moment = moment
        self.lines = 0

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(_HOME):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.moment:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def _model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, activation="relu", name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(4, activation="tanh", name="second"),
            layers.Dense(3, name="head"),
        ]
    )
    model.get_layer("norm").trainable = False
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(_x(), np.ones((4, 3)), verbose=0)
    return model


def _x():
    return np.random.default_rng(0).normal(size=(4, 6)).astype("float32")


def _wrap(model):
    names = ["first", "second"]
    return ks.wrap_model(model, "lora", names, rank=2, trainable="head")


def _wrapped():
    model = _wrap(_model())
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(_x(), np.ones((4, 3)), verbose=0, epochs=2)
    return model


def _merged(model):
    with ks.merged(model):
        pass


def _state(model):
    """Outputs, classes, flags, optimizer: what a user would see."""
    return (
        ops.convert_to_numpy(model(_x())).tobytes(),
        type(model).__mro__,
        [type(layer) for layer in model.layers],
        [(x.name, x.trainable) for x in model._flatten_layers()],
        [(w.path, w.trainable) for w in model.weights],
        [ops.convert_to_numpy(w).tobytes() for w in model.weights],
        id(model.optimizer) if model.optimizer.built else None,
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    ks.save_adapters(_wrapped(), path)
    return path


OPERATIONS = {
    "wrap_model": (_model, _wrap),
    "load_adapters": (_model, "load"),
    "merge_model": (_wrapped, ks.merge_model),
    "unwrap_model": (_wrapped, ks.unwrap_model),
    "to_lora": (_wrapped, lambda model: ks.to_lora(model, rank=2)),
    "merged": (_wrapped, _merged),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_interrupted_at_random_moments(name, file):
    make, run = OPERATIONS[name]
    if run == "load":
        run = lambda model: ks.load_adapters(model, file)  # noqa: E731
    model = make()
    with _Interrupter() as dry:
        run(model)
    rng = np.random.default_rng(len(name))
    model, before = None, None
    for moment in rng.choice(dry.lines, _MOMENTS, replace=False) + 1:
        if model is None:
            model = make()
            before = _state(model)
        try:
            with _Interrupter(moment):
                run(model)
        except KeyboardInterrupt:
            gc.collect()  # ends contexts that were left half-way
        else:
            model = None  # a callback's line: it ran to its end
            continue
        state = _state(model)
        if state != before:
            again = make()
            run(again)
            after = _state(again)
            same = [a == b for a, b in zip(state, after)]
            # A fresh optimizer is another object each time.
            assert all(same[:6]), (name, moment, same)
            model = None


@pytest.mark.parametrize("place", ["computed", "written"])
def test_merging_ends_what_it_has_begun_to_write(place, monkeypatch):
    expected = ops.convert_to_numpy(ks.merge_model(_wrapped())(_x()))
    model, stops = _wrapped(), []

    def stopping(method, of):
        def stopped(thing, *args):
            result = method(thing, *args)
            if of(thing) and not stops:
                stops.append(thing)
                raise KeyboardInterrupt
            return result

        return stopped

    kernel = model.get_layer("first").layer.kernel
    if place == "computed":
        owner, name = KernelHost, "merged_values"
        of = lambda host: host.name == "first"  # noqa: E731
    else:
        owner, name = keras.Variable, "assign"
        of = lambda variable: variable is kernel  # noqa: E731
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(owner, name, stopping(getattr(owner, name), of))
        ks.merge_model(model)
    assert stops
    found = ops.convert_to_numpy(model(_x()))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert type(model.get_layer("first")) is layers.Dense
    with pytest.raises(ValueError, match="no adapters"):
        ks.unwrap_model(model)


def test_merging_keeps_values_of_no_kernel(monkeypatch):
    model = _wrapped()
    kept = []
    monkeypatch.setattr(
        Snapshot,
        "keep_values",
        lambda self, variables: kept.extend(v.shape for v in variables),
    )
    ks.merge_model(model)
    assert not any(len(shape) > 1 for shape in kept)


def test_a_failure_between_two_kernels_keeps_the_outputs(monkeypatch):
    model = _wrapped()
    before = ops.convert_to_numpy(model(_x()))
    flags = [(x.name, x.trainable) for x in model._flatten_layers()]
    method, calls = KernelHost.merged_values, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no more")
        return method(*args)

    monkeypatch.setattr(KernelHost, "merged_values", fails)
    with pytest.raises(MemoryError, match="no more") as caught:
        ks.merge_model(model)
    assert "outputs are as before" in caught.value.__notes__[0]
    assert flags == [(x.name, x.trainable) for x in model._flatten_layers()]
    found = ops.convert_to_numpy(model(_x()))
    np.testing.assert_allclose(found, before, atol=1e-6)
    assert ks.adapter_names(model) == ["default"]
    ks.merge_model(model)
    found = ops.convert_to_numpy(model(_x()))
    np.testing.assert_allclose(found, before, atol=1e-6)
    assert type(model.get_layer("first")) is layers.Dense
