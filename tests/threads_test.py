"""Several threads call one wrapped model: every answer is right."""

import os
import sys
import threading

import block_cases
import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks
from keras_spectral.layers import METHODS

ON_TORCH = keras.backend.backend() == "torch"
CALLS = int(os.environ.get("THREAD_CALLS", 25 if ON_TORCH else 10))
NAMES = [
    name
    for name, cls in sorted(METHODS.items())
    if cls.__module__.startswith("keras_spectral.")
]


BASES = {
    "conv": lambda: layers.Conv1D(4, 3),
    "norms": lambda: layers.LayerNormalization(),
    "recurrent": lambda: layers.GRU(4),
    "experts": lambda: block_cases.Experts(),
}
SMALL = {"rank": 2, "block_size": 2, "down": 3, "up": 2}


def _case(name):
    """A model with a method in it, and two inputs."""
    kind, rng = METHODS[name], np.random.default_rng(0)
    if issubclass(kind, ks.blocks.BlockAdapter):
        model, x = block_cases.model(), block_cases.inputs()
        return model, None, [x, {**x, "x": -x["x"]}]
    if issubclass(kind, ks.SoftPrompt):
        ids = keras.Input((None,), dtype="int32")
        backbone = keras.Sequential([ids, layers.Embedding(9, 4)])
        model = keras.Sequential([ids, backbone, layers.Dense(2)])
        return model, backbone, [rng.integers(0, 9, (2, 4)) for _ in "ab"]
    base = BASES.get(kind.default_target, lambda: layers.Dense(4, "tanh"))()
    model = keras.Sequential([keras.Input((5, 6)), base, layers.Dense(2)])
    return model, base, [rng.normal(size=(3, 5, 6)) for _ in "ab"]


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_call_one_model(name):
    keras.utils.set_random_seed(0)
    model, target, given = _case(name)
    known = METHODS[name].option_names()
    options = {k: v for k, v in SMALL.items() if k in known}
    if name == "deep_lora":  # whose rank takes gradients
        options = {}
    rng = np.random.default_rng(1)
    for adapter in ("one", "two"):
        ks.wrap_model(model, name, target, adapter=adapter, **options)
        for weight in model.trainable_weights:
            weight.assign(weight + rng.normal(0, 0.2, weight.shape))
    ks.set_adapters(model, {"one": 1.0, "two": 0.5})

    def out(x):
        return ops.convert_to_numpy(model(x))

    expected, wrong = [out(x) for x in given], [0, 0]

    def call(i):
        for _ in range(CALLS):
            error = np.abs(out(given[i]) - expected[i]).max()
            wrong[i] += not error < 1e-4

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert wrong == [0, 0]
    for x, outputs in zip(given, expected):
        np.testing.assert_array_equal(out(x), outputs)
