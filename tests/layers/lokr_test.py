import golden
import keras
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks
from keras_spectral.layers.lokr import split


def _product(name, weights):
    if name in weights:
        return weights[name]
    return weights[f"{name}_a"] @ weights[f"{name}_b"]


def _matrix(variant, adapter, **weights):
    """The Kronecker product, channel by channel in a convolution."""
    matrix = np.kron(_product("w1", weights), _product("w2", weights))
    matrix = ops.convert_to_numpy(adapter.view.by_offset(matrix))
    return on_blocks(adapter, matrix * adapter.alpha / adapter.rank)


def _size(case, layer):
    view = ks.LoKrDense(layer, rank=1).view_of(layer)
    i1, i2 = split(view.channels, -1)
    o1, o2 = split(view.n_out, -1)
    rows = i2 * view.n_in // view.channels
    return i1 * o1 + (rows + o2 if max(i2, o2) > 2 else rows * o2)


VARIANTS = [
    Variant(
        ks.LoKrDense,
        "lokr",
        {"rank": 1, "alpha": 6},
        _matrix,
        _size,
    ),
]


def test_golden_numbers():
    arrays = golden.arrays_of("lokr.npz", "w1full_w2lowrank")
    layer = ks.LoKrDense(golden.dense_of(arrays), rank=1, alpha=6)
    layer.build(arrays["x"].shape)
    gradients = {}
    for ours, theirs in (
        ("w1", "lokr_w1"),
        ("w2_a", "lokr_w2_b"),
        ("w2_b", "lokr_w2_a"),
    ):
        getattr(layer, ours).assign(arrays[f"param.lin.{theirs}"].T)
        gradients[ours] = arrays[f"grad.lin.{theirs}"].T
    golden.check_dense(layer, arrays, gradients)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (12, -1, (3, 4)),
        (40, -1, (5, 8)),
        (16, -1, (4, 4)),
        (7, -1, (1, 7)),
        (12, 6, (6, 2)),
        (12, 5, (3, 4)),
        (36, 4, (4, 9)),
        (36, 5, (4, 9)),
        (768, 8, (8, 96)),
    ],
)
def test_sizes_are_split(size, factor, expected):
    assert split(size, factor) == expected


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"rank": 1}, ["w1", "w2_a", "w2_b"]),
        ({"rank": 8}, ["w1", "w2"]),
        (
            {"rank": 1, "decompose_both": True},
            ["w1_a", "w1_b", "w2_a", "w2_b"],
        ),
    ],
)
def test_which_parts_are_pairs(options, names):
    layer = ks.LoKrDense(keras.layers.Dense(12), seed=0, **options)
    layer.build((None, 16))
    assert [w.name for w in layer.trainable_weights] == names
    x = np.random.default_rng(0).normal(size=(3, 16)).astype("float32")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(layer(x)), ops.convert_to_numpy(layer.layer(x))
    )
    for weight in layer.trainable_weights:
        weight.assign(np.ones(weight.shape))
    got = ops.convert_to_numpy(layer(x))
    weights = {w.name: w.numpy() for w in layer.trainable_weights}
    delta = _matrix(None, layer, **weights)
    kernel = layer.layer.kernel.numpy()
    np.testing.assert_allclose(got, x @ (kernel + delta), atol=1e-4)


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.ReversibleEmbedding(5, 4), {}, "one direction"),
        (keras.layers.Dense(3), {"factor": 0}, "factor=0"),
        (keras.layers.Dense(3), {"decompose_both": 1}, "decompose_both=1"),
        (keras.layers.Dense(3), {"rank": 0}, "rank=0"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.LoKrDense(base, **options)
