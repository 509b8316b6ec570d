import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks


def _skew(numbers, size):
    q = np.zeros((len(numbers), size, size))
    rows, columns = np.triu_indices(size, 1)
    q[:, rows, columns] = numbers
    return q - q.transpose(0, 2, 1)


def _rotation(adapter, oft_q):
    """R as a whole matrix."""
    size, eye = adapter.block_size, np.eye(adapter.block_size)
    blocks = _skew(oft_q, size)
    if adapter.eps is not None:
        limit = adapter.eps / np.sqrt(len(blocks))
        norms = np.linalg.norm(blocks, axis=(1, 2), keepdims=True)
        blocks = blocks * limit / np.maximum(norms, limit)
    if adapter.neumann_terms:
        assert adapter.neumann_terms == 4
        found = [eye + 2 * q + 2 * q @ q + q @ q @ q for q in blocks]
    else:
        found = [(eye - q) @ np.linalg.inv(eye + q) for q in blocks]
    found *= adapter.view.n_in // size if adapter.block_share else 1
    rotation = np.zeros((adapter.view.n_in, adapter.view.n_in))
    for i, block in enumerate(found):
        at = slice(i * size, (i + 1) * size)
        rotation[at, at] = block
    return rotation


def _matrix(variant, adapter, oft_q):
    kernel = np.float64(ops.convert_to_numpy(adapter.view.matrix()))
    rows = ops.convert_to_numpy(adapter.view.by_channel(kernel))
    change = _rotation(adapter, oft_q) @ rows - rows
    matrix = ops.convert_to_numpy(adapter.view.by_offset(change))
    return on_blocks(adapter, matrix)


EVEN = layer_cases.named(
    "einsum_heads",
    "einsum_merge",
    "einsum_kernel_last",
    "einsum_out_first",
    "einsum_ellipsis",
    "einsum_batched",
    "conv_2d_dilated",
    "conv_2d_groups",
    "conv_separable",
    "conv_3d",
)
NINES = layer_cases.named("embedding", "conv_1d")
SOME = layer_cases.named("einsum_kernel_last", "conv_2d_groups")
VARIANTS = [
    Variant(
        ks.OFTDense,
        "oft",
        {"block_size": 2},
        _matrix,
        lambda case, layer: layer_cases.rows(layer) // 2,
        cases=EVEN,
    ),
    Variant(
        ks.OFTDense,
        "oft_of_three",
        {"block_size": 3},
        _matrix,
        lambda case, layer: layer_cases.rows(layer),
        cases=NINES
        + layer_cases.named("conv_2d_strided", "conv_2d_1x1", "conv_transpose"),
    ),
    Variant(
        ks.OFTDense,
        "oft_constrained",
        {"block_size": 3, "eps": 0.1},
        _matrix,
        lambda case, layer: layer_cases.rows(layer),
        cases=SOME,
    ),
    Variant(
        ks.OFTDense,
        "oft_shared",
        {"block_size": 2, "block_share": True},
        _matrix,
        lambda case, layer: 1,
        cases=SOME,
    ),
    Variant(
        ks.OFTDense,
        "oft_series",
        {"block_size": 3, "neumann_terms": 4},
        _matrix,
        lambda case, layer: layer_cases.rows(layer),
        cases=SOME,
    ),
]


def test_golden_numbers():
    arrays = golden.arrays_of("oft.npz", "cayley_exact")
    layer = ks.OFTDense(golden.dense_of(arrays), block_size=4)
    layer.build(arrays["x"].shape)
    layer.oft_q.assign(arrays["param.lin.oft_R.weight"])
    gradient = arrays["grad.lin.oft_R.weight"]
    golden.check_dense(layer, arrays, {"oft_q": gradient})


def _layer(base=None, n_in=12, **options):
    layer = ks.OFTDense(base or keras.layers.Dense(6), **options)
    layer.build((None, n_in))
    rng = np.random.default_rng(0)
    layer.oft_q.assign(rng.normal(size=layer.oft_q.shape))
    return layer


def test_lengths_and_angles_of_columns_stay():
    layer = _layer(block_size=4)
    before = layer.layer.kernel.numpy()
    layer.merge()
    after = layer.layer.kernel.numpy()
    assert np.abs(after - before).max() > 0.1
    np.testing.assert_allclose(after.T @ after, before.T @ before, atol=1e-5)


def test_a_constrained_rotation_has_a_limit_and_a_gradient_at_zero():
    layer = _layer(block_size=4, eps=0.01)
    turns = ops.convert_to_numpy(layer.rotations())
    assert np.linalg.norm(turns - np.eye(4)) < 0.03
    layer.oft_q.assign(np.zeros(layer.oft_q.shape))
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(np.ones((4, 12)), np.ones((4, 6)), verbose=0)
    moved = layer.oft_q.numpy()
    assert np.isfinite(moved).all() and np.abs(moved).max() > 0


def test_the_series_turns_the_other_way():
    layer = _layer(block_size=4, neumann_terms=40)
    layer.oft_q.assign(0.1 * layer.oft_q)
    exact = _layer(block_size=4)
    exact.oft_q.assign(layer.oft_q)
    turns = ops.convert_to_numpy(layer.rotations())
    expected = ops.convert_to_numpy(exact.rotations())
    expected = expected.transpose(0, 2, 1)
    np.testing.assert_allclose(turns, expected, atol=1e-5)


def test_a_quantised_base_is_turned():
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.quantize("int8")
    x = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    base = model.layers[0]
    ks.wrap_model(model, "oft", target="all", block_size=4)
    adapter = model.layers[0]
    adapter.oft_q.assign(np.ones(adapter.oft_q.shape))
    turned = x @ _rotation(adapter, adapter.oft_q.numpy())
    expected = ops.convert_to_numpy(base(turned.astype("float32")))
    got = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(got, expected, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"block_size": 2.0}, "block_size=2"),
        ({"eps": 0}, "eps=0"),
        ({"block_share": 1}, "block_share=1"),
        ({"neumann_terms": 1}, "neumann_terms=1"),
    ],
)
def test_what_it_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        ks.OFTDense(keras.layers.Dense(3), **options)


def test_a_size_that_does_not_fit_names_those_that_do():
    layer = ks.OFTDense(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="has 100 rows.*20 or 25"):
        layer.build((None, 100))
    with pytest.raises(ValueError, match="one direction"):
        ks.OFTDense(keras.layers.ReversibleEmbedding(5, 4))
