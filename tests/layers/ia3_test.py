import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant

import keras_spectral as ks
from keras_spectral.layers.ia3 import FEED_FORWARD_OUTPUT

WITH_COLUMNS = [c for c in layer_cases.ALL if "transpose" not in c.name]


def _kernel(adapter):
    return np.float64(ops.convert_to_numpy(adapter.view.matrix()))


def _output(variant, adapter, gains):
    return _kernel(adapter) * (gains - 1)


def _input(variant, adapter, gains):
    return _kernel(adapter) * (gains - 1)[:, None]


def _scaled_bias(variant, adapter, bias):
    """Each number of the bias times the factor of its column."""
    gains = np.float32(ops.convert_to_numpy(adapter.gains))
    return bias * gains.reshape(np.shape(bias))


VARIANTS = [
    Variant(
        ks.IA3,
        "ia3_output",
        {"side": "output"},
        _output,
        lambda case, layer: layer_cases.columns(layer),
        cases=WITH_COLUMNS,
        bias=_scaled_bias,
    ),
    Variant(
        ks.IA3,
        "ia3_input",
        {"side": "input"},
        _input,
        lambda case, layer: case.size - layer_cases.columns(layer),
        cases=layer_cases.DENSE
        + layer_cases.EINSUM
        + layer_cases.named("conv_2d_1x1"),
    ),
]


@pytest.mark.parametrize(
    ("case", "side"), [("linear", "output"), ("feedforward", "input")]
)
def test_golden_numbers(case, side):
    arrays = golden.arrays_of("ia3.npz", case)
    layer = ks.IA3(golden.dense_of(arrays), side=side)
    layer.build(arrays["x"].shape)
    layer.gains.assign(arrays["param.lin.ia3_l"].ravel())
    gradient = arrays["grad.lin.ia3_l"].ravel()
    golden.check_dense(layer, arrays, {"gains": gradient})


def test_outputs_are_scaled_before_the_activation():
    layer = ks.IA3(keras.layers.Dense(3, activation="relu"))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    layer(x)
    layer.layer.bias.assign([0.1, 0.2, 0.3])
    layer.gains.assign([-1.0, 0.0, 2.0])
    linear = x @ layer.layer.kernel.numpy() + layer.layer.bias.numpy()
    expected = np.maximum(linear * [-1, 0, 2], 0)
    got = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "path",
    [
        "feedforward_output_dense",
        "transformer_layer_0/feedforward_output_dense",
        "decoder_block_1/ffw_linear",
        "layer/mlp/down_proj",
        "mlp/fc2",
        "encoder/transformer_block_0/mlp/dense_2",
        "encoder_block_11/dense_2",
        "transformer_decoder_layer_0/output_projector",
    ],
)
def test_names_of_a_second_layer(path):
    assert FEED_FORWARD_OUTPUT.fullmatch(path)
    first = path.replace("output", "input").replace("2", "1")
    first = first.replace("down", "up").replace("linear", "gating")
    assert not FEED_FORWARD_OUTPUT.fullmatch(first)


@pytest.mark.parametrize("path", ["dense_2", "fc2", "attention/output", "x/v"])
def test_other_names(path):
    assert not FEED_FORWARD_OUTPUT.fullmatch(path)


def test_the_side_follows_the_name_unless_it_is_given():
    def side(name, **options):
        return ks.IA3(keras.layers.Dense(3, name=name), **options).side

    assert side("feedforward_output_dense") == "input"
    assert side("feedforward_output_dense", side="output") == "output"
    assert side("value") == "output"


def test_default_targets_of_a_transformer():
    x = inputs = keras.Input((4, 8))
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.Dense(16, "relu", name="up_proj")(x)
    x = keras.layers.Dense(8, name="down_proj")(x)
    model = keras.Model(inputs, x)
    values = np.random.default_rng(0).normal(size=(2, 4, 8)).astype("float32")
    plain = ops.convert_to_numpy(model(values))
    ks.wrap_model(model, "ia3")
    rows = ks.adapter_summary(model).rows
    assert {row.path: row.trainable for row in rows if row.method} == {
        "attention/key": 8,
        "attention/value": 8,
        "down_proj": 16,
    }
    np.testing.assert_array_equal(ops.convert_to_numpy(model(values)), plain)
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    adapted = ops.convert_to_numpy(model(values))
    ks.merge_model(model)
    merged = ops.convert_to_numpy(model(values))
    np.testing.assert_allclose(merged, adapted, atol=1e-5)


def test_a_quantised_base_is_scaled_but_not_merged():
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(6, name="value")]
    )
    model.quantize("int8")
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    plain = ops.convert_to_numpy(model(x))
    ks.wrap_model(model, "ia3")
    model.layers[0].gains.assign(np.arange(6.0))
    got = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(got, plain * np.arange(6), atol=1e-5)
    with pytest.raises(ValueError, match="quantised"):
        ks.merge_model(model)


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        (keras.layers.Conv1D(3, 2), (None, 5, 4)),
        (keras.layers.SeparableConv1D(3, 1), (None, 5, 4)),
        (keras.layers.Embedding(5, 4), (None, 3)),
    ],
)
def test_rows_that_are_no_inputs_are_refused(base, shape):
    layer = ks.IA3(base, side="input")
    with pytest.raises(ValueError, match="rows that are not its inputs"):
        layer.build(shape)
    assert base.trainable


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.Conv1DTranspose(3, 2), {}, "patches overlap"),
        (
            ks.LowRank(
                keras.layers.Dense(2), keras.layers.Conv1DTranspose(3, 2)
            ),
            {},
            "patches overlap",
        ),
        (keras.layers.ReversibleEmbedding(5, 4), {}, "one direction"),
        (keras.layers.LayerNormalization(), {}, "holds no kernel"),
        (keras.layers.Dense(3), {"side": "both"}, "side='both'"),
        (keras.layers.Dense(3), {"rank": 2}, "rank"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.IA3(base, **options)


def test_a_bias_that_columns_share_cannot_be_merged():
    inputs = keras.Input((3, 6))
    layer = keras.layers.EinsumDense(
        "abc,cde->abde", (3, 2, 4), bias_axes="e", name="value"
    )
    after = keras.layers.Dense(4, name="after")
    model = keras.Model(inputs, after(layer(inputs)))
    ks.wrap_model(model, "ia3", ["value", "after"])
    adapters = model.layers[1:]
    for adapter in adapters:
        adapter.gains.assign(np.arange(float(adapter.gains.shape[0])))
    kernel = after.kernel.numpy()
    with pytest.raises(ValueError, match="columns share a number"):
        ks.merge_model(model)
    assert model.layers[1:] == adapters
    np.testing.assert_array_equal(after.kernel.numpy(), kernel)
