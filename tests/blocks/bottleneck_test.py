import block_cases
import keras
import numpy as np
import pytest
from block_cases import WIDTH
from block_cases import net_size
from keras import ops
from variants import BlockVariant

import keras_spectral as ks

VARIANTS = [
    BlockVariant(ks.BottleneckAdapter, "pfeiffer", {"size": 2}, net_size(2)),
    BlockVariant(
        ks.BottleneckAdapter,
        "houlsby",
        {"size": 2, "placement": "houlsby", "activation": "gelu"},
        2 * net_size(2),
    ),
    BlockVariant(
        ks.BottleneckAdapter,
        "parallel",
        {"placement": "parallel", "strength": 4.0},
        net_size(1),
    ),
    BlockVariant(
        ks.BottleneckAdapter,
        "post",
        {"size": 2, "placement": "post", "channel_scale": True},
        net_size(2) + WIDTH,
    ),
]


def _numpy(x):
    return ops.convert_to_numpy(x)


def _adapted(**options):
    """A block with a randomized adapter, its inputs, the adapter's weights."""
    keras.utils.set_random_seed(0)
    block = block_cases.Block()
    layer = ks.BottleneckAdapter(block, size=3, **options)
    given = block_cases.inputs()
    layer(given["x"], padding_mask=given["mask"])
    rng = np.random.default_rng(1)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(0, 0.7, weight.shape))
    own = {w.name: np.float64(_numpy(w)) for w in layer.trainable_weights}
    return layer, block, given, own


def _net(own, z, activation, name="adapter"):
    down = z @ own[f"{name}_down_kernel"] + own[f"{name}_down_bias"]
    inner = _numpy(keras.activations.get(activation)(np.float32(down)))
    outputs = inner @ own[f"{name}_up_kernel"] + own[f"{name}_up_bias"]
    return outputs * own.get(f"{name}_channels", 1.0)


def _pieces(block, x, mask):
    """The block step by step, by its own layers."""
    attended = block.attention(x, x, attention_mask=mask[:, None] == 1)
    return _numpy(attended)


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_equals_its_formula(placement, strength):
    layer, block, given, own = _adapted(
        placement=placement, activation="tanh", strength=strength
    )
    x, mask = given["x"], given["mask"]
    got = _numpy(layer(x, padding_mask=mask))
    z = _pieces(block, x, mask)
    if placement == "houlsby":
        z = z + strength * _net(own, z, "tanh", "attention")
    y = _numpy(block.norm(np.float32(x + z)))
    z = _numpy(block.outer(block.inner(y)))
    source = y if placement == "parallel" else z
    if placement == "pfeiffer":
        source = _numpy(block.last_norm(np.float32(y + z)))
    z = z + strength * _net(own, source, "tanh")
    expected = _numpy(block.last_norm(np.float32(y + z)))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_after_the_block_with_a_scale_for_each_channel():
    layer, block, given, own = _adapted(
        placement="post", activation="gelu", channel_scale=True
    )
    call = {"padding_mask": given["mask"]}
    z = _numpy(block(given["x"], **call))
    expected = z + _net(own, z, "gelu")
    got = _numpy(layer(given["x"], **call))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert own["adapter_channels"].shape == (block_cases.WIDTH,)


def test_size_follows_from_the_width():
    keras.utils.set_random_seed(0)
    layer = ks.BottleneckAdapter(block_cases.Block(width=32))
    layer(np.zeros((1, 2, 32), "float32"))
    assert layer.net.size == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"placement": "before"}, "placement='before'"),
        ({"strength": "big"}, "strength='big'"),
    ],
)
def test_bad_options_raise(options, message):
    block = block_cases.Block()
    with pytest.raises(ValueError, match=message):
        ks.BottleneckAdapter(block, **options)


def test_only_after_the_whole_of_a_bare_attention_layer():
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 8))
    attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    model = keras.Model(x, attention(x, x))
    with pytest.raises(ValueError, match="no feed-forward net"):
        ks.wrap_model(model, "bottleneck")
    ks.wrap_model(model, "bottleneck", placement="post")
