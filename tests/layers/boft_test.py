import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks
from keras_spectral.layers.boft import butterfly


def _rotation(adapter, boft_d):
    """`R_m .. R_1` from permutation matrices."""
    n_in, size = adapter.view.n_in, adapter.block_size
    whole, eye = np.eye(n_in), np.eye(size)
    for number, d in enumerate(boft_d):
        blocks = np.zeros((n_in, n_in))
        for i, q in enumerate((d - d.transpose(0, 2, 1)) / 2):
            at = slice(i * size, (i + 1) * size)
            blocks[at, at] = (eye - q) @ np.linalg.inv(eye + q)
        order = np.eye(n_in)[butterfly(n_in, size, number)]
        whole = order.T @ blocks @ order @ whole
    return whole


def _matrix(variant, adapter, boft_d, gains):
    kernel = np.float64(ops.convert_to_numpy(adapter.view.matrix()))
    rows = ops.convert_to_numpy(adapter.view.by_channel(kernel))
    change = (_rotation(adapter, boft_d) @ rows) * gains - rows
    matrix = ops.convert_to_numpy(adapter.view.by_offset(change))
    return on_blocks(adapter, matrix)


def _size(case, layer):
    return layer_cases.rows(layer) * 2 + layer_cases.columns(layer)


def _size_of_two(case, layer):
    return layer_cases.rows(layer) * 4 + layer_cases.columns(layer)


VARIANTS = [
    Variant(
        ks.BOFTDense,
        "boft",
        {"block_size": 2, "factors": 2},
        _matrix,
        _size_of_two,
        cases=layer_cases.named(
            "einsum_merge",
            "einsum_out_first",
            "einsum_batched",
            "conv_2d_groups",
            "conv_3d",
        ),
    ),
    Variant(
        ks.BOFTDense,
        "boft_of_one",
        {"block_size": 2},
        _matrix,
        _size,
        cases=layer_cases.named("einsum_kernel_last", "conv_separable"),
    ),
]


def test_golden_numbers():
    arrays = golden.arrays_of("boft.npz", "linear_m2_b4")
    layer = ks.BOFTDense(golden.dense_of(arrays), block_size=4, factors=2)
    layer.build(arrays["x"].shape)
    layer.boft_d.assign(arrays["param.lin.boft_R"])
    layer.gains.assign(arrays["param.lin.boft_s"].ravel())
    for number, order in enumerate(arrays["buffer.lin.boft_P"]):
        ours = np.eye(16)[butterfly(16, 4, number)]
        np.testing.assert_array_equal(ours.T, order)
    gradients = {
        "boft_d": arrays["grad.lin.boft_R"],
        "gains": arrays["grad.lin.boft_s"].ravel(),
    }
    golden.check_dense(layer, arrays, gradients)


def test_four_factors_are_a_rotation_of_eight_inputs():
    layer = ks.BOFTDense(keras.layers.Dense(32), block_size=4, factors=4)
    layer.build((None, 32))
    rng = np.random.default_rng(0)
    layer.boft_d.assign(rng.normal(size=layer.boft_d.shape))
    layer.layer.kernel.assign(np.eye(32))
    rotation = ops.convert_to_numpy(layer.delta_matrix()) + np.eye(32)
    mixed = np.kron(np.eye(4), np.ones((8, 8))) > 0
    np.testing.assert_array_equal(np.abs(rotation) > 1e-6, mixed)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(32), atol=1e-5)
    expected = _rotation(layer, np.float64(layer.boft_d.numpy()))
    np.testing.assert_allclose(rotation, expected, atol=1e-5)
    x = rng.normal(size=(5, 32)).astype("float32")
    got = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(got, x @ expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "n_in", "match"),
    [
        ({"block_size": 4}, 10, "has 10 rows"),
        ({"block_size": 4, "factors": 3}, 24, r"\* 2\^\(factors - 1\) = 16"),
    ],
)
def test_sizes_that_do_not_fit(options, n_in, match):
    layer = ks.BOFTDense(keras.layers.Dense(3), **options)
    with pytest.raises(ValueError, match=match):
        layer.build((None, n_in))


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.Dense(3), {"block_size": 3}, "block_size=3"),
        (keras.layers.Dense(3), {"factors": 0}, "factors=0"),
        (keras.layers.Conv1DTranspose(3, 2), {}, "patches overlap"),
        (keras.layers.ReversibleEmbedding(5, 4), {}, "one direction"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.BOFTDense(base, **options)
