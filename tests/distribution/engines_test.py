"""Adapters on several devices, by the engines that Keras runs on.

Each engine has a process of its own, on virtual devices of the CPU, whatever
the backend of the tests: they are `slow`, which PyTorch runs once.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from keras_spectral.layers.adapter import METHODS

PROGRAM = pathlib.Path(__file__).with_name("on_devices.py")
pytestmark = pytest.mark.slow


def _run(engine):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        [sys.executable, PROGRAM, engine],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _check_alike(found, ways):
    methods = {case.partition("+")[0] for case in found}
    assert methods == METHODS.keys() - {"lora_experts", "soft_prompt"}
    for case, runs in found.items():
        for way in ways:
            assert runs[way].keys() == runs["one"].keys(), (case, way)
            for name, wanted in runs["one"].items():
                np.testing.assert_allclose(
                    runs[way][name],
                    wanted,
                    rtol=1e-5,
                    atol=1e-5,
                    err_msg=f"{case}, {way}, {name}",
                )


def test_jax_distributions():
    found = _run("jax")
    _check_alike(found, ["data", "model"])
    for case, runs in found.items():
        _check_layouts(runs["layouts"], case)


def test_jax_life_with_split_kernels():
    found = _run("jax-life")
    _check_layouts(found.pop("layouts"), "merged")
    assert len(found) == 12
    assert all(gap < 1e-5 for gap in found.values()), found


def _check_layouts(layouts, case):
    for path, axes in layouts.items():
        expected = _expected(path)
        while expected and expected[-1] == "None":  # JAX leaves them out
            expected.pop()
        assert axes[: len(expected)] == expected, (case, path)
        assert set(axes[len(expected) :]) <= {"None"}, (case, path)


def _expected(path):
    """How a kernel, or a pair beside it, is split by the rules of the run."""
    *_, layer, name = path.replace("/default", "").split("/")
    if layer in ("query", "key", "value"):
        kernel = ["None", "model", "None"]
    else:
        kernel = {
            "inner": ["None", "model"],
            "outer": ["model", "None"],
            "conv": ["None", "None", "model"],
            "attention_output": 3 * ["None"],
            "head": 2 * ["None"],
        }[layer]
    if name == "kernel":
        return kernel
    if name == "lora_a":
        return [kernel[0], "None"]
    return ["None", "model" if "model" in kernel[1:] else "None"]


def test_tensorflow_mirrored_strategy():
    _check_alike(_run("mirrored"), ["mirrored"])


def test_torch_data_parallel():
    found = _run("ddp")
    _check_alike(found, ["ddp"])
    assert all(runs["same"] for runs in found.values())
