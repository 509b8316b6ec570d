import re

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places

pytestmark = pytest.mark.once


def _mlp():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, name="hidden"),
            layers.Dense(3, name="head"),
        ],
        name="mlp",
    )


def _blocks():
    x = inputs = keras.Input((4, 8))
    for i in range(3):
        x = layers.MultiHeadAttention(2, 4, name=f"attention_{i}")(x, x)
    return keras.Model(inputs, x, name="blocks")


def _wrapped(model):
    return [place.path for place in adapter_places(model)]


@pytest.mark.parametrize(
    "target, meant",
    [
        ("query", r"r'.*/query' (as 'attention_0/query', which matches 3"),
        (["q_proj"], "preset 'attention', or what it stands for here, "),
        (["q_proj", "v_proj"], "r'.*/(query|value)'"),
        ("query|value", "r'.*/(query|value)' (as 'attention_0/query', which "),
        ("qery", "r'.*/query'"),
        ("all_linear", "the preset 'all-linear'"),
        ("Attention", "the preset 'attention'"),
        ("attention_0/querry", "'attention_0/query'"),
    ],
)
def test_what_a_target_was_meant_to_be(target, meant):
    with pytest.raises(ValueError) as caught:
        ks.wrap_model(_blocks(), "lora", target=target)
    message = str(caught.value)
    assert "Nothing in model 'blocks' matches target=" in message
    assert f"Did you mean {meant}" in message or meant in message
    for word in ("attention", "backbone", "blocks", "all-linear", "conv"):
        assert repr(word) in message
    assert "whole path" in message


def test_a_name_at_the_top():
    with pytest.raises(ValueError, match="Did you mean 'hidden'"):
        ks.wrap_model(_mlp(), "lora", target="hiden")
    with pytest.raises(ValueError, match="exclude has 'hed'.*mean 'head'"):
        ks.wrap_model(_mlp(), "lora", target="all", exclude="hed")
    with pytest.raises(ValueError, match="trainable has 'hed'.*mean 'head'"):
        ks.wrap_model(_mlp(), "lora", target="hidden", trainable="hed")


def test_every_pattern_of_a_list_has_to_match():
    with pytest.raises(ValueError, match="target='hiden'"):
        ks.wrap_model(_mlp(), "lora", target=["hiden", "head"])


def test_layers_are_targets():
    model = _mlp()
    hidden, head = model.layers
    ks.wrap_model(model, "lora", target=hidden, rank=1)
    ks.wrap_model(model, "lora", target=[head], rank=1)
    assert _wrapped(model) == ["hidden", "head"]
    ks.unwrap_model(model)
    ks.wrap_model(model, "lora", target="all", exclude=head, rank=1)
    assert _wrapped(model) == ["hidden"]
    foreign = layers.Dense(2, name="foreign")
    with pytest.raises(ValueError, match="foreign.*no layer of model 'mlp'"):
        ks.wrap_model(model, "lora", target=foreign)


@pytest.mark.parametrize(
    "options",
    [
        {"target": 3},
        {"target": "hidden", "exclude": 3},
        {"target": "hidden", "trainable": 3},
        {"target": "hidden", "trainable": [3]},
        {"target": "hidden", "overrides": ["hidden"]},
        {"target": "hidden", "overrides": {"hidden": 2}},
        {"target": "hidden", "overrides": {3: {"rank": 2}}},
    ],
)
def test_other_things_are_no_targets(options):
    with pytest.raises(ValueError, match="Received .*Expected"):
        ks.wrap_model(_mlp(), "lora", **options)


def test_exclude_helps_against_tied_tables():
    inputs = keras.Input((4,), dtype="int32")
    table = layers.ReversibleEmbedding(9, 8, name="table")
    x = layers.Dense(8, name="hidden")(table(inputs))
    model = keras.Model(inputs, table(x, reverse=True))
    with pytest.raises(ValueError, match="'table'.*ReversibleEmbedding"):
        ks.wrap_model(model, "lora", target=".*", rank=1)
    ks.wrap_model(
        model, "lora", target=["table", "hidden"], exclude="table", rank=1
    )
    assert _wrapped(model) == ["hidden"]


class Tied(keras.Model):
    """An embedding that is the head as well, as Gemma 3n does it."""

    def __init__(self):
        super().__init__()
        self.table = layers.Embedding(9, 8, name="table")
        self.hidden = layers.Dense(8, name="hidden")

    def call(self, ids):
        x = self.hidden(self.table(ids))
        return ops.matmul(x, ops.transpose(self.table.embeddings))


class Borrowed(keras.layers.Layer):
    """A layer that computes with another one's kernel."""

    def __init__(self, lender, **kwargs):
        super().__init__(**kwargs)
        self.lender = [lender]

    def build(self, input_shape):
        self.weight = self.lender[0].kernel

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.weight))


def _tied():
    model = Tied()
    model(np.zeros((1, 4), "int32"))
    return model, "table", layers.Embedding


def _borrowed():
    inputs = keras.Input((8,))
    hidden = layers.Dense(6, name="hidden")
    x = hidden(inputs)
    model = keras.Model(inputs, Borrowed(hidden, name="back")(x))
    return model, "hidden", layers.Dense


@pytest.mark.parametrize("make", [_tied, _borrowed])
def test_kernels_with_a_second_use_are_refused(make):
    model, path, kind = make()
    for target in (path, lambda layer: layer.name == path):
        with pytest.raises(ValueError, match=f"'{path}'.*changes both"):
            ks.wrap_model(model, "lora", target=target, rank=1)
    rows = ks.list_targets(model, "lora").rows
    row = next(row for row in rows if row.path == path)
    assert row.presets == () and "as well" in row.note
    ks.wrap_model(model, "lora", target=kind, rank=1)
    assert path in _wrapped(model)
    ks.unwrap_model(model)
    ks.wrap_model(model, "lora", target=model.get_layer(path), rank=1)
    assert _wrapped(model) == [path]


def test_an_adapter_of_a_tied_table_changes_both_uses_and_merges():
    model, path, kind = _tied()
    ids = np.arange(8).reshape(2, 4)
    ks.wrap_model(model, "lora", target=kind, rank=2)
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    adapted = ops.convert_to_numpy(model(ids))
    ks.merge_model(model)
    got = ops.convert_to_numpy(model(ids))
    np.testing.assert_allclose(got, adapted, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_a_wrapper_rewrites_is_refused():
    inner = layers.Dense(6, name="inner")
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.SpectralNormalization(inner, name="normed"),
            layers.Dense(4, name="plain"),
        ]
    )
    for target in ("normed/inner", layers.Dense, inner, "all"):
        with pytest.raises(ValueError, match="SpectralNormalization 'normed'"):
            ks.wrap_model(model, "lora", target=target, rank=1)
    assert [r.path for r in ks.list_targets(model).rows] == ["plain"]
    ks.wrap_model(model, "lora", target="all", exclude="normed/.*", rank=1)
    assert _wrapped(model) == ["plain"]


def test_wrappers_that_leave_the_kernel_alone_are_fine():
    model = keras.Sequential(
        [
            keras.Input((3, 8)),
            layers.TimeDistributed(layers.Dense(4, name="plain"), name="time"),
        ]
    )
    ks.wrap_model(model, "lora", target=re.escape("time/plain"), rank=1)
    assert _wrapped(model) == ["time/plain"]


def test_gemma_3n_ties_its_table():
    from hub_models import MODELS

    (case,) = (case for case in MODELS if case.name == "gemma3n_backbone")
    model = case.make()
    path = "text_model/embed_tokens/embedding"
    rows = {row.path: row for row in ks.list_targets(model, "lora").rows}
    assert rows[path].note == "tied: is read by 'text_model' as well"
    with pytest.raises(ValueError, match=f"'{path}'.*changes both"):
        ks.wrap_model(model, "lora", target=".*/embedding", rank=1)
