import os
import pathlib

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from lora_test import lora_matrix
from variants import Variant

import keras_spectral as ks
from keras_spectral.layers.conv_lora import loralib_kernel


def _channel(variant, adapter, **weights):
    return lora_matrix(adapter, 4 / 2, **weights)


def _loralib(variant, adapter, lora_a, lora_b):
    size, _, c_in, c_out = adapter.layer.kernel.shape
    flat = (lora_b @ lora_a).reshape(-1)
    kernel = np.zeros((size, size, c_in, c_out), "float32")
    for i, j, c, o in np.ndindex(*kernel.shape):
        kernel[i, j, c, o] = flat[((o * c_in + c) * size + i) * size + j]
    return ops.convert_to_numpy(adapter.view.to_matrix(kernel))


def _loralib_size(case, layer):
    size, _, c_in, c_out = layer.kernel.shape
    return 2 * size**2 * (c_in * layer.groups + c_out // layer.groups)


VARIANTS = [
    Variant(
        ks.ConvLoRA,
        "channel",
        {"rank": 2, "alpha": 4},
        _channel,
        cases=layer_cases.PLAIN_CONV,
    ),
    Variant(
        ks.ConvLoRA,
        "loralib",
        {"rank": 2, "factorization": "loralib"},
        _loralib,
        _loralib_size,
        cases=layer_cases.named(
            "conv_2d", "conv_2d_strided", "conv_2d_1x1", "conv_2d_groups"
        ),
    ),
]


def test_loralib_view_elementwise():
    size, c_in, c_out, rank = 3, 2, 4, 1
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rank * size, c_in * size)).astype("float32")
    b = rng.normal(size=(c_out * size, rank * size)).astype("float32")
    got = ops.convert_to_numpy(loralib_kernel(b @ a, size, c_in, c_out))
    flat = (b @ a).reshape(-1)
    for i, j, c, o in np.ndindex(size, size, c_in, c_out):
        entry = flat[((o * c_in + c) * size + i) * size + j]
        assert got[i, j, c, o] == entry


def test_golden_loralib_convolution():
    """Numbers of microsoft/LoRA's own Conv2d."""
    folder = pathlib.Path(os.environ.get("KERAS_SPECTRAL_GOLDEN", "golden"))
    if not (folder / "convlora_g1.npz").exists():
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    golden = np.load(folder / "convlora_g1.npz")
    conv = keras.layers.Conv2D(8, 3, padding="same")
    layer = ks.ConvLoRA(
        conv,
        rank=int(golden["rank"]),
        alpha=int(golden["alpha"]),
        factorization="loralib",
    )
    x = golden["x_nchw"].transpose(0, 2, 3, 1)
    layer.build(x.shape)
    conv.kernel.assign(golden["W_oihw"].transpose(2, 3, 1, 0))
    conv.bias.assign(golden["bias"])
    layer.lora_a.assign(golden["A"])
    layer.lora_b.assign(golden["B"])
    got = ops.convert_to_numpy(layer(x)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, golden["y_nchw"], atol=1e-5)


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.Dense(3), {}, "expects Conv1D"),
        (keras.layers.Conv1D(3, 3), {"factorization": "loralib"}, "square"),
        (
            keras.layers.Conv2D(3, (3, 2)),
            {"factorization": "loralib"},
            "square",
        ),
        (
            keras.layers.Conv2D(3, 3),
            {"factorization": "loralib", "dropout": 0.1},
            "'kaiming' and 0",
        ),
        (
            keras.layers.Conv2D(3, 3),
            {"factorization": "loralib", "initializer": "pissa"},
            "'kaiming' and 0",
        ),
        (keras.layers.Conv2D(3, 3), {"factorization": "tucker"}, "tucker"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.ConvLoRA(base, **options)


def test_loralib_rank_limit():
    layer = ks.ConvLoRA(
        keras.layers.Conv2D(8, 3), rank=4, factorization="loralib"
    )
    with pytest.raises(ValueError, match="at most 3"):
        layer.build((None, 8, 8, 3))
