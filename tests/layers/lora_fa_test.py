import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from lora_test import lora_matrix
from variants import Variant

import keras_spectral as ks


def _matrix(variant, adapter, lora_a, lora_b):
    return lora_matrix(adapter, 6 / 2, lora_a, lora_b)


VARIANTS = [
    Variant(
        ks.LoRAFADense,
        "lora_fa",
        {"rank": 2, "alpha": 6},
        _matrix,
        lambda case, layer: 2 * layer_cases.columns(layer),
    )
]


def test_golden_steps():
    """Four steps of Adam as HF PEFT's optimizer for LoRA-FA takes them."""
    arrays = golden.arrays_of("lora_optimizers.npz", "lorafa")
    whole = np.load(golden.folder() / "lora_optimizers.npz")
    base = keras.layers.Dense(16)
    base.build((None, 12))
    base.kernel.assign(whole["W"].T)
    base.bias.assign(whole["bias"])
    layer = ks.LoRAFADense(base, rank=3, alpha=6)
    model = keras.Sequential([keras.Input((12,)), layer])
    layer.lora_a.assign(arrays["A0"].T)
    layer.lora_b.assign(arrays["B0"].T)
    model.compile(keras.optimizers.Adam(0.01, epsilon=1e-6), "mse")
    x, y = whole["x"], whole["target"]
    for step in range(4):
        history = model.fit(x, y, batch_size=20, verbose=0)
        loss = history.history["loss"][0]
        np.testing.assert_allclose(loss, arrays["loss"][step], rtol=1e-5)
        got = ops.convert_to_numpy(layer.lora_b)
        np.testing.assert_allclose(got, arrays["B"][step].T, atol=1e-5)
        got = ops.convert_to_numpy(layer.lora_a)
        np.testing.assert_array_equal(got, arrays["A"][step].T)


def test_the_correction_is_an_option():
    x = np.random.default_rng(0).normal(size=(5, 12)).astype("float32")
    g = np.random.default_rng(1).normal(size=(5, 6)).astype("float32")
    found = {}
    for project in (False, True):
        layer = ks.LoRAFADense(
            keras.layers.Dense(6), rank=3, alpha=6, project=project, seed=0
        )
        layer.build((None, 12))
        found[project] = ops.convert_to_numpy(
            golden.gradients_of(layer, x, g)["lora_b"]
        )
        a = layer.lora_a.numpy()
    np.testing.assert_allclose(found[False], 2 * a.T @ x.T @ g, atol=1e-4)
    expected = np.linalg.inv(4 * (a.T @ a)) @ found[False]
    np.testing.assert_allclose(found[True], expected, rtol=1e-3, atol=1e-4)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="project='no'"):
        ks.LoRAFADense(keras.layers.Dense(3), project="no")
