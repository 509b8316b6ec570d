import keras
import layer_cases
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral._internal.linalg import all_finite
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels import view as view_module

CASES = pytest.mark.parametrize(
    "case", layer_cases.ALL, ids=lambda case: case.name
)


def _linear(case):
    """The case's layer, built, with activation and bias out of the way."""
    layer = case.make()
    layer(case.inputs())
    if hasattr(layer, "activation"):
        layer.activation = None
    return layer


@CASES
def test_thin_product_is_the_layer_with_the_product_as_kernel(case):
    layer = _linear(case)
    view = kernel_view(layer)
    rng = np.random.default_rng(1)
    a = rng.normal(size=(view.n_in, 2)).astype("float32")
    b = rng.normal(size=(2, view.n_out)).astype("float32")
    thin = view.apply(ops.convert_to_tensor(case.inputs()), a, b)
    zeros = ops.zeros((view.n_in, view.n_out))
    view.assign(zeros)
    bias_only = layer(case.inputs())
    view.assign(a @ b)
    expected = layer(case.inputs()) - bias_only
    np.testing.assert_allclose(
        ops.convert_to_numpy(thin), ops.convert_to_numpy(expected), atol=2e-5
    )


@CASES
def test_sizes_and_matrix_round_trip(case):
    layer = _linear(case)
    view = kernel_view(layer)
    assert view.n_in + view.n_out == case.size
    assert view.max_rank == case.max_rank
    before = [w.numpy() for w in layer.weights]
    view.assign(view.matrix())
    for weight, value in zip(layer.weights, before):
        np.testing.assert_array_equal(weight.numpy(), value)


@CASES
def test_blocks_of_rows_are_the_matrix(case, monkeypatch):
    view = kernel_view(_linear(case))
    monkeypatch.setattr(view_module, "_BLOCK", 2 * view.n_out)
    matrix = ops.convert_to_numpy(view.matrix())
    places, blocks = zip(*view.row_blocks())
    assert [place.start for place in places] == list(range(0, view.n_in, 2))
    for place, rows in zip(places, blocks):
        assert rows.dtype == view.matrix().dtype
        assert tuple(rows.shape) == matrix[place].shape
    together = ops.convert_to_numpy(ops.concatenate(blocks))
    np.testing.assert_array_equal(together, matrix)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite_matrices_are_told_from_others(bad):
    matrix = np.full((3, 5), 3e38, "float32")
    assert all_finite(ops.convert_to_tensor(matrix))
    matrix[1, 2] = bad
    assert not all_finite(ops.convert_to_tensor(matrix))
    matrix[1, 3] = -bad
    assert not all_finite(ops.convert_to_tensor(matrix))


def _scaled(case, by):
    """The layer's outputs with its kernel's rows or columns scaled."""
    layer = _linear(case)
    view = kernel_view(layer)
    rng = np.random.default_rng(1)
    row = rng.normal(size=getattr(view, by)).astype("float32")
    if getattr(layer, "bias", None) is not None:
        layer.bias.assign(rng.normal(size=layer.bias.shape))
    return layer, view, ops.convert_to_tensor(row)


@CASES
def test_scaled_columns_are_scaled_outputs(case):
    layer, view, row = _scaled(case, "n_out")
    outputs = layer(case.inputs())
    if not view.columns_are_outputs:
        assert "transpose" in case.name
        return
    outputs = outputs * view.spread(row, outputs)
    view.assign(view.matrix() * row)
    bias = view.scaled_bias(row)
    assert (bias is None) == (getattr(layer, "bias", None) is None)
    if bias is not None:
        layer.bias.assign(bias)
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs),
        ops.convert_to_numpy(layer(case.inputs())),
        atol=2e-5,
    )


@CASES
def test_scaled_rows_are_scaled_inputs(case):
    layer, view, row = _scaled(case, "n_in")
    inputs = ops.convert_to_tensor(case.inputs())
    if not view.rows_are_inputs:
        assert case.name.startswith(("conv", "embedding"))
        return
    outputs = layer(inputs * view.spread_inputs(row, inputs))
    view.assign(view.matrix() * row[:, None])
    np.testing.assert_allclose(
        ops.convert_to_numpy(outputs),
        ops.convert_to_numpy(layer(inputs)),
        atol=2e-5,
    )


def test_rows_of_1x1_kernels_alone_are_inputs():
    fitting = {
        case.name
        for case in layer_cases.CONV + layer_cases.GROUPED
        if kernel_view(_linear(case)).rows_are_inputs
    }
    assert {"conv_2d_1x1", "conv_transpose"} <= fitting
    assert all("1x1" in name or "transpose" in name for name in fitting)


def test_a_factorised_layer_scales_as_its_halves():
    layer = ks.LowRank(
        keras.layers.Conv2D(2, 1, use_bias=False), keras.layers.Conv2D(4, 3)
    )
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype("float32")
    outputs = layer(x)
    view = kernel_view(layer)
    assert view.columns_are_outputs and view.rows_are_inputs
    row = np.arange(1, 5, dtype="float32")
    outputs = ops.convert_to_numpy(outputs * view.spread(row, outputs))
    layer.up.kernel.assign(layer.up.kernel * row)
    got = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(got, outputs, atol=1e-5)
    got = ops.convert_to_numpy(view.spread_inputs(row[:3], outputs))
    np.testing.assert_array_equal(got, row[:3])


def test_a_bias_that_columns_share_is_not_scaled():
    layer = keras.layers.EinsumDense("abc,cde->abde", (3, 2, 4), bias_axes="e")
    layer.build((None, 3, 6))
    with pytest.raises(ValueError, match=r"shape \(4,\), so several of its 8"):
        kernel_view(layer).scaled_bias(ops.ones((8,)))


def test_group_matrix_is_block_diagonal():
    layer = keras.layers.Conv1D(4, 1, groups=2, use_bias=False)
    layer.build((None, 3, 6))
    matrix = ops.convert_to_numpy(kernel_view(layer).matrix())
    assert matrix.shape == (6, 4)
    assert not matrix[:3, 2:].any() and not matrix[3:, :2].any()
    kernel = layer.kernel.numpy()[0]
    np.testing.assert_array_equal(matrix[:3, :2], kernel[:, :2])
    np.testing.assert_array_equal(matrix[3:, 2:], kernel[:, 2:])


# Keras itself cannot quantise an einsum with an ellipsis (3.15).
QUANTISABLE = [
    case
    for case in layer_cases.DENSE[:2]
    + layer_cases.EINSUM
    + layer_cases.EMBEDDING
    if case.name != "einsum_ellipsis"
]


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize(
    "case",
    layer_cases.on_this_backend(QUANTISABLE),
    ids=lambda case: case.name,
)
def test_quantised_kernel_is_read_dequantised(case, mode):
    layer = _linear(case)
    view = kernel_view(layer)
    float_matrix = ops.convert_to_numpy(view.matrix())
    layer.quantize(mode)
    view = kernel_view(layer)
    matrix = ops.convert_to_numpy(view.matrix())
    step = np.abs(float_matrix).max() / (127 if mode == "int8" else 7)
    assert matrix.shape == float_matrix.shape
    assert np.abs(matrix - float_matrix).max() <= step
    assert np.abs(matrix - float_matrix).max() > 0
    with pytest.raises(ValueError, match="quantised"):
        view.assign(matrix)


@pytest.mark.parametrize(
    ("equation", "output", "shape", "why"),
    [
        ("ab,b->ab", (4,), (2, 4), "only scales"),
        ("ab,cd->abcd", (4, 2, 3), (2, 4), "shares no letter"),
    ],
)
def test_einsum_that_is_no_matrix_is_refused(equation, output, shape, why):
    layer = keras.layers.EinsumDense(equation, output)
    layer.build(shape)
    with pytest.raises(ValueError, match=why):
        kernel_view(layer)


def test_layers_without_a_view_say_why():
    depthwise = keras.layers.DepthwiseConv2D(3)
    with pytest.raises(ValueError, match="channels apart"):
        kernel_view(depthwise)
    with pytest.raises(ValueError, match="LayerNormalization"):
        kernel_view(keras.layers.LayerNormalization())
    with pytest.raises(ValueError, match="no kernel yet"):
        kernel_view(keras.layers.Dense(3))
    with_lora = keras.layers.Dense(3, lora_rank=2)
    with_lora.build((None, 4))
    with pytest.raises(ValueError, match="Keras's own LoRA"):
        kernel_view(with_lora)


# JAX has no float64 unless it is switched on.
WIDE = "float32" if keras.backend.backend() == "jax" else "float64"


def _wide_model(case):
    plain = case.make()
    layer = type(plain).from_config(
        {**plain.get_config(), "dtype": WIDE, "name": "base"}
    )
    x = case.inputs()
    x = x if case.tokens else x.astype(WIDE)
    inputs = keras.Input(x.shape[1:], dtype=str(x.dtype))
    return keras.Sequential([inputs, layer]), x


WIDE_CASES = pytest.mark.parametrize(
    "case",
    layer_cases.named("conv_2d_groups", "conv_transpose"),
    ids=lambda case: case.name,
)


@WIDE_CASES
def test_convolutions_of_float64_are_adapted(case):
    model, x = _wide_model(case)
    plain = ops.convert_to_numpy(model(x))
    ks.wrap_model(model, "lora", target="base", rank=2)
    start = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(start, plain, atol=1e-5)
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    adapted = ops.convert_to_numpy(model(x))
    assert np.abs(adapted - plain).max() > 1e-4
    layer = model.layers[0]
    name = kernel_view(layer.layer).kernel_name
    effective = ops.convert_to_numpy(getattr(layer, name))
    ks.merge_model(model)
    np.testing.assert_allclose(
        getattr(layer.layer, name).numpy(), effective, atol=1e-6
    )
    merged = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(merged, adapted, atol=1e-5)
    assert kernel_view(model.layers[0]).variable().dtype == WIDE


@WIDE_CASES
def test_convolutions_of_float64_are_compressed(case):
    model, x = _wide_model(case)
    small = ks.compress_model(model, max_error=0.9, target="base")
    assert {weight.dtype for weight in small.weights} == {WIDE}
    assert small(x).shape == model(x).shape


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_by_channel(groups):
    """Channels first and offsets behind, as in PyTorch's kernels."""
    layer = keras.layers.Conv2D(6, (3, 2), groups=groups)
    layer.build((None, 7, 7, 4))
    view = kernel_view(layer)
    kernel = np.random.default_rng(0).normal(size=layer.kernel.shape)
    matrix = ops.convert_to_numpy(view.to_matrix(kernel))
    own = np.zeros((4, 3, 2, 6))
    for channel in range(4):
        group, inner = divmod(channel, 4 // groups)
        filters = slice(group * 6 // groups, (group + 1) * 6 // groups)
        own[channel, :, :, filters] = kernel[:, :, inner, filters]
    expected = own.reshape(24, 6)
    got = ops.convert_to_numpy(view.by_channel(matrix))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    back = ops.convert_to_numpy(view.by_offset(expected))
    np.testing.assert_allclose(back, matrix, atol=1e-6)
