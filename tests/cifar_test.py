"""Real ResNets on real images: the benchmark's loader and its adapters."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def _run(*options):
    data = os.environ.get("KERAS_SPECTRAL_DATA")
    if not data or not pathlib.Path(data, "weights").is_dir():
        pytest.skip("set KERAS_SPECTRAL_DATA to a folder with weights/")
    command = [sys.executable, ROOT / "benchmarks" / "cifar.py", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.strip().split("\n")]


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.8103), (56, 0.8320)])
def test_the_loaded_resnets_have_their_published_accuracy(depth, accuracy):
    options = ["--depth", str(depth), "--examples", "1"]
    (result,) = _run("--methods", "none", *options)
    assert result["accuracy"] == pytest.approx(accuracy, abs=2e-3)
    assert result["trainable"] == 0


@pytest.mark.slow
def test_an_adapter_learns_the_jpeg_images():
    sizes = ["--examples", "1000", "--test-examples", "1000", "--epochs", "2"]
    none, adapted = _run("--methods", "none", "gated_spectral k=16", *sizes)
    assert adapted["trainable"] == 19 * 16
    assert adapted["accuracy"] > none["accuracy"]
