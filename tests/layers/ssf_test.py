import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant

import keras_spectral as ks


def _matrix(variant, adapter, gains, shifts=None):
    kernel = np.float64(ops.convert_to_numpy(adapter.view.matrix()))
    return kernel * (gains - 1)


def _bias(variant, adapter, bias):
    gains, shifts = (
        ops.convert_to_numpy(x).reshape(bias.shape)
        for x in (adapter.gains, adapter.shifts)
    )
    return bias * gains + shifts


def _size(case, layer):
    sizes = [w.shape for w in layer.weights if w.name in ("gamma", "scale")]
    return 2 * (np.prod(sizes[0]) if sizes else layer_cases.columns(layer))


WITH_BIAS = layer_cases.named(
    "dense",
    "dense_3d",
    "einsum_heads",
    "einsum_batched",
    "conv_2d_strided",
    "conv_2d_groups",
    "conv_separable",
    "conv_2d_channels_first",
)
VARIANTS = [
    Variant(
        ks.SSF,
        "ssf",
        {},
        _matrix,
        _size,
        cases=WITH_BIAS + layer_cases.NORMS[:3],
        bias=_bias,
    ),
    Variant(
        ks.SSF,
        "ssf_scale",
        {"shift": False},
        _matrix,
        lambda case, layer: layer_cases.columns(layer),
        cases=layer_cases.named(
            "dense_no_bias", "einsum_kernel_last", "embedding"
        ),
    ),
]


def test_every_linear_layer_and_norm():
    x = inputs = keras.Input((4, 8))
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(6, "gelu", name="up")(x)
    x = keras.layers.Dense(8, name="down")(x)
    model = keras.Model(inputs, x)
    ks.wrap_model(model, "ssf", ["all-linear", "norms"])
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    # The last layer is the model's head.
    assert count == 2 * (8 + 6)


def test_shifts_without_a_bias_cannot_be_merged():
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, use_bias=False)]
    )
    ks.wrap_model(model, "ssf", "all")
    adapter = model.layers[0]
    with pytest.raises(ValueError, match="no bias to take the shifts"):
        ks.merge_model(model)
    assert model.layers[0] is adapter


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.Conv1DTranspose(3, 2), {}, "patches overlap"),
        (keras.layers.ReversibleEmbedding(5, 4), {}, "one direction"),
        (keras.layers.Dense(3), {"shift": 1}, "shift=1"),
        (keras.layers.ReLU(), {}, "holds no kernel"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.SSF(base, **options)
