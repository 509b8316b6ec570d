"""`benchmarks/gpu.sh` says why it measures nothing, and stops."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.once


def _run(folder, path, **variables):
    return subprocess.run(
        ["/bin/sh", SCRIPT],
        cwd=folder,
        env={"PATH": path, **variables},
        capture_output=True,
        text=True,
    )


def _write_program(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


def test_without_a_card(tmp_path):
    done = _run(tmp_path, str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == (
        "gpu.sh: nvidia-smi finds no NVIDIA card, so nothing is measured.\n"
    )
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_without_a_backend_that_sees_the_card(tmp_path):
    _write_program(tmp_path / "nvidia-smi", 'echo "a card, 1.2, 3 MiB"')
    answers = '[ "$1" = - ] || { echo "It is not there."; exit 1; }'
    _write_program(tmp_path / "python", answers)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = _run(tmp_path, path, PYTHON=str(tmp_path / "python"))
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "card, driver, memory: a card, 1.2, 3 MiB",
        "torch is left out: It is not there.",
        "jax is left out: It is not there.",
        "tensorflow is left out: It is not there.",
        "gpu.sh: no backend sees the card, so nothing is measured.",
    ]
    assert not (tmp_path / "gpu.jsonl").exists()
