"""Adapters on several devices, by the engines that Keras runs on.

Each engine has a process of its own, on virtual devices of the CPU, whatever
the backend of the tests: they are `slow`, which PyTorch runs once. Compiling
takes its time, so they run a method of each kind; with EVERY_METHOD=1 in the
environment all of them.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_spectral.layers.adapter import METHODS

PROGRAM = pathlib.Path(__file__).with_name("on_devices.py")
EXAMPLE = PROGRAM.parents[2] / "examples" / "distributed.py"
AND_PEFT = pathlib.Path(__file__).with_name("example_and_peft.py")
pytestmark = pytest.mark.slow


# Of pairs, shared pairs, steps that count, singular vectors, blocks, draws,
# gates, and what follows steps.
SOME = "lora vera decaying_lora spectral prefix".split()
SOME += ["conditional_spectral", "unipelt+gates", "adalora+budget", "lora+ivon"]


def _run(engine, cases=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    done = subprocess.run(
        [sys.executable, PROGRAM, engine, *cases],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def _run_cases(engine):
    every = "EVERY_METHOD" in os.environ
    found = _run(engine, [] if every else SOME)
    methods = {case.partition("+")[0] for case in found}
    if every:
        assert methods == METHODS.keys() - {"lora_experts", "soft_prompt"}
    else:
        assert found.keys() == set(SOME)
    return found


def _check_alike(found, ways):
    for case, runs in found.items():
        if case == "conditional_spectral" and ways[0] != "data":
            # A draw for each example, in each replica by itself.
            for losses in (runs[way]["loss"] for way in ways):
                assert losses[-1] < 0.9 * losses[0]
            continue
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
    found = _run_cases("jax")
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
    _check_alike(_run_cases("mirrored"), ["mirrored"])


def test_torch_data_parallel():
    found = _run_cases("ddp")
    _check_alike(found, ["ddp"])
    assert all(runs["same"] for runs in found.values())


@pytest.mark.parametrize("flags", [[], ["--virtual=4", "--split=2"]])
def test_example_on_one_and_four_devices(flags, tmp_path):
    path = tmp_path / "adapters.safetensors"
    done = subprocess.run(
        [sys.executable, EXAMPLE, *flags, "--out", path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = _accuracy(done.stdout)
    assert accuracy[-1] > 0.85 > accuracy[0]
    assert ("P(None, 'model')" in done.stdout) == bool(flags)
    assert path.exists()


def test_example_in_two_processes(tmp_path):
    """As on two machines of two devices, with kernels in two parts.

    And folders for HF PEFT are written as by one process.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = ["{}:{}".format(*each.getsockname()) for each in sockets]
    for each in sockets:
        each.close()
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": str(EXAMPLE.parents[1]),
    }
    flags = [f"--hosts={','.join(hosts)}", "--virtual=2", "--split=2"]
    many, one = tmp_path / "many.safetensors", tmp_path / "one.safetensors"
    unwritten = tmp_path / "second.safetensors"
    runs = [
        [*flags, f"--process={i}", "--out", path]
        for i, path in enumerate((many, unwritten))
    ]
    started = [
        subprocess.Popen(
            [sys.executable, AND_PEFT, EXAMPLE, *run],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for run in [*runs, ["--out", one]]
    ]
    done = [(*each.communicate(), each.returncode) for each in started]
    assert [code for *_, code in done] == [0, 0, 0], done[0][1][-3000:]
    first, second, alone = (_accuracy(out) for out, *_ in done)
    assert first == second and not unwritten.exists()
    np.testing.assert_allclose(first, alone, atol=0.005)
    assert "P(None, 'model')" in done[0][0]
    assert not pathlib.Path(f"{unwritten}.peft").exists()
    for name in ("", ".peft/adapter_model.safetensors"):
        expected, got = (load_file(f"{path}{name}") for path in (one, many))
        assert got.keys() == expected.keys()
        for key, value in got.items():
            np.testing.assert_allclose(value, expected[key], atol=1e-3)


def _accuracy(printed):
    line = next(x for x in printed.splitlines() if x.startswith("accuracy"))
    return json.loads(line.partition(": ")[2])
