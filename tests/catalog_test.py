import io

import block_cases
import keras
import numpy as np
import pytest
import rich.console
from keras import layers

import keras_spectral as ks
from keras_spectral.layers import METHODS
from keras_spectral.layers.adapter import register_method

pytestmark = pytest.mark.once

BASES = {
    "attention": lambda: layers.Dense(6, name="query"),
    "all-linear": lambda: layers.Dense(6, name="dense"),
    "conv": lambda: layers.Conv1D(6, 3, name="conv"),
    "key-value-ffn": lambda: layers.Dense(6, name="value"),
    "biases": lambda: layers.Dense(6, name="dense"),
    "norms": lambda: layers.LayerNormalization(),
    "recurrent": lambda: layers.GRU(4),
    "experts": lambda: block_cases.Experts(),
}


def _console(width=80):
    return rich.console.Console(width=width, file=io.StringIO())


def _printed(console):
    return console.file.getvalue()


def _transformer():
    return block_cases.model()


def test_rows_of_targets():
    model = _transformer()
    targets = ks.list_targets(model, console=_console())
    rows = {row.path: row for row in targets.rows}
    query = rows["block_0/attention/query"]
    assert query.kind == "EinsumDense"
    assert (query.shape, query.max_rank) == ((8, 8), 8)
    assert query.presets == ("attention", "all-linear", "all")
    assert (query.method, query.note) == (None, "")
    inner = rows["block_1/inner"]
    assert inner.shape == (8, 16) and inner.presets == ("all-linear", "all")
    block = rows["block_0"]
    assert block.shape is None and block.presets == ("blocks",)
    assert "block_0/norm" not in rows


def test_what_a_row_promises_holds():
    """Each preset wraps the rows that name it, and no others."""
    rows = ks.list_targets(_transformer(), "lora", _console()).rows
    for preset in ("attention", "all-linear", "all"):
        model = ks.wrap_model(_transformer(), "lora", target=preset, rank=2)
        wrapped = {
            row.path
            for row in ks.list_targets(model, "lora", _console()).rows
            if row.method == "lora"
        }
        assert wrapped == {r.path for r in rows if preset in r.presets}


def test_targets_of_one_method():
    model = _transformer()
    blocks = ks.list_targets(model, "bottleneck", _console())
    assert {row.kind for row in blocks.rows} == {"Block", "MultiHeadAttention"}
    assert not ks.list_targets(model, ks.ConvLoRA, _console()).rows
    with pytest.raises(ValueError, match="Did you mean 'lora'"):
        ks.list_targets(model, "LoRA")


def test_targets_need_a_built_model():
    model = keras.Sequential([layers.Dense(4)])
    with pytest.raises(ValueError, match="not built"):
        ks.list_targets(model)
    for value in (None, 3, "model"):
        with pytest.raises(ValueError, match="Expected a Keras model"):
            ks.list_targets(value)
    with pytest.raises(ValueError, match="Received console='out'"):
        ks.list_targets(_transformer(), console="out")


def test_targets_print_within_80_columns():
    inputs = keras.Input((4, 8))
    x = inputs
    for i in range(3):
        x = layers.MultiHeadAttention(2, 4, name=f"attention_{i}")(x, x)
    model = keras.Model(inputs, x)
    console = _console()
    ks.list_targets(model, console=console)
    printed = _printed(console)
    assert "3 x .../query" in printed and "3 x attention_*" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_methods_are_all_there_with_their_options():
    console = _console()
    rows = {row.name: row for row in ks.methods(console).rows}
    assert rows.keys() == METHODS.keys()
    for name, row in rows.items():
        assert row.cls is METHODS[name]
        assert list(row.options) == row.cls.option_names()
        assert row.trains and row.target
        assert name in _printed(console)
    assert rows["lora"].options["rank"] == 8
    assert max(map(len, _printed(console).splitlines())) <= 80


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_that_merge_do_and_others_refuse(name):
    cls = METHODS[name]
    x = np.ones((1, 4, 6), "float32")
    if cls.default_target in BASES:
        base = BASES[cls.default_target]()
        model = keras.Sequential([keras.Input((4, 6)), base])
    elif cls.default_target == "blocks":
        model, x = _transformer(), block_cases.inputs()
        base = model.get_layer("block_0")
    else:
        x = np.ones((1, 4), "int32")
        ids = keras.Input((None,), dtype="int32")
        base = keras.Sequential([ids, layers.Embedding(9, 4)])
        model = keras.Sequential([ids, base])
    small = {"rank": 2, "block_size": 2, "down": 3, "up": 2}
    if name == "deep_lora":  # whose rank takes gradients
        small = {}
    options = {k: v for k, v in small.items() if k in cls.option_names()}
    ks.wrap_model(model, name, target=base, **options)
    model(x)
    if cls.merges:
        ks.merge_model(model)
    else:
        with pytest.raises(ValueError, match="cannot be merged"):
            ks.merge_model(model)


def test_a_method_of_ones_own_is_described_by_its_docstring():
    @register_method("own")
    class Own(ks.AdapterLayer):
        """Adds nothing at all.

        More of that.
        """

        def build_adapter(self):
            pass

    try:
        rows = {row.name: row for row in ks.methods(_console()).rows}
        assert rows["own"].trains == "Adds nothing at all."
    finally:
        del METHODS["own"]


def test_summary_groups_equal_rows_but_not_its_data():
    inputs = keras.Input((4, 8))
    x = inputs
    for i in range(4):
        x = layers.MultiHeadAttention(2, 4, name=f"attention_{i}")(x, x)
    model = keras.Model(inputs, x)
    ks.wrap_model(model, "lora", rank=2, overrides={".*_3/query": {"rank": 4}})
    console = _console()
    summary = ks.adapter_summary(model, console)
    printed = _printed(console)
    assert len(summary.rows) == 8
    assert "4 x .../value" in printed and "3 x .../query" in printed
    assert "attention_3/query" in printed
    assert max(map(len, printed.splitlines())) <= 80
    row = next(r for r in summary.rows if r.path == "attention_0/value")
    line = next(x for x in printed.splitlines() if "4 x .../value" in x)
    assert f"{4 * row.trainable:,}" in line and f"{4 * row.total:,}" in line


@pytest.mark.parametrize("value", [None, 3, "model"])
def test_summary_needs_a_model(value):
    with pytest.raises(ValueError, match="Expected a Keras model"):
        ks.adapter_summary(value)
