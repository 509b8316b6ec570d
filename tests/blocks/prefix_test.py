import block_cases
import keras
import numpy as np
import pytest
from block_cases import HEADS
from block_cases import TOKENS
from block_cases import WIDTH
from keras import ops
from variants import BlockVariant

import keras_spectral as ks

VARIANTS = [
    BlockVariant(
        ks.PrefixTuning,
        "flat",
        {"length": 3},
        6 * WIDTH,
        starts_as_base=False,
    ),
    BlockVariant(
        ks.PrefixTuning,
        "hidden",
        {"length": 3, "hidden": 4},
        3 * WIDTH + WIDTH * 4 + 4 + 4 * 2 * WIDTH + 2 * WIDTH,
        starts_as_base=False,
    ),
]


def _numpy(x):
    return ops.convert_to_numpy(x)


def _attention(**call):
    """A model of one attention layer, and that layer."""
    keras.utils.set_random_seed(0)
    x = keras.Input((TOKENS, WIDTH))
    layer = keras.layers.MultiHeadAttention(HEADS, 4, name="attention")
    return keras.Model(x, layer(x, x, **call)), layer


def _oracle(layer, x, rows, causal):
    """Attention with a prefix, in float64."""
    w = {w.path.split("/")[-2]: [] for w in layer.weights}
    for weight in layer.weights:
        w[weight.path.split("/")[-2]].append(np.float64(_numpy(weight)))
    query, key, value = (
        np.einsum("btd,dhe->bthe", x, w[name][0]) + w[name][1]
        for name in ("query", "key", "value")
    )
    batch, tokens, _, size = query.shape
    shape = (len(rows), HEADS, size)
    pre_key = rows[:, : HEADS * size].reshape(shape)
    pre_value = rows[:, HEADS * size :].reshape(shape)
    key = np.concatenate([np.stack([pre_key] * batch), key], axis=1)
    value = np.concatenate([np.stack([pre_value] * batch), value], axis=1)
    scores = np.einsum("bthe,bshe->bhts", query, key) / np.sqrt(size)
    if causal:
        later = np.arange(tokens)[None] > np.arange(tokens)[:, None]
        scores[..., len(rows) :][..., later] = -1e30
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    attended = np.einsum("bhts,bshe->bthe", scores, value)
    kernel, bias = w["attention_output"]
    return np.einsum("bthe,hed->btd", attended, kernel) + bias


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", [None, 6])
def test_equals_its_formula(causal, hidden):
    model, layer = _attention(use_causal_mask=causal)
    ks.wrap_model(model, "prefix", length=3, hidden=hidden)
    adapter = model.get_layer("attention")
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.7, weight.shape))
    own = {w.name: np.float64(_numpy(w)) for w in adapter.trainable_weights}
    rows = own["prefix_rows"]
    if hidden:
        rows = rows @ own["prefix_down_kernel"] + own["prefix_down_bias"]
        rows = np.tanh(rows) @ own["prefix_up_kernel"] + own["prefix_up_bias"]
    x = block_cases.inputs()["x"]
    got = _numpy(model(x))
    expected = _oracle(layer, np.float64(x), rows, causal)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_no_token_sees_a_later_one():
    model, _ = _attention(use_causal_mask=True)
    ks.wrap_model(model, "prefix", length=3)
    x = block_cases.inputs()["x"]
    before = _numpy(model(x))
    x[:, -1] = 9.0
    np.testing.assert_array_equal(_numpy(model(x))[:, :-1], before[:, :-1])


def test_dropout_and_scores_of_the_attention_go_on():
    keras.utils.set_random_seed(0)
    x = block_cases.inputs()["x"]
    attention = keras.layers.MultiHeadAttention(
        HEADS, 4, dropout=0.5, name="attention"
    )
    attention(x, x)
    layer = ks.PrefixTuning(attention, length=3)
    outputs, scores = layer(x, x, return_attention_scores=True)
    assert tuple(scores.shape) == (len(x), HEADS, TOKENS, 3 + TOKENS)
    np.testing.assert_allclose(_numpy(scores).sum(-1), 1, rtol=1e-5)
    drawn = [_numpy(layer(x, x, training=True)) for _ in range(2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    np.testing.assert_allclose(_numpy(layer(x, x)), _numpy(outputs), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 0}, "length=0"), ({"hidden": 1.5}, "hidden=1.5")],
)
def test_bad_options_raise(options, message):
    block = block_cases.Block()
    with pytest.raises(ValueError, match=message):
        ks.PrefixTuning(block, **options)
