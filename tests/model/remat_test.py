"""Wrapped models in a `keras.RematScope`: the same numbers, layer by layer."""

import keras
import numpy as np
import pytest

import keras_spectral as ks

NAMES = ["hidden_0", "hidden_1"]
BACKEND = keras.backend.backend()


def _trained(method, mode=None):
    """Losses and trained weights, of a model whose layers are in a scope."""
    keras.utils.set_random_seed(0)
    options = {"output_size_threshold": 8, "layer_names": NAMES}
    with keras.RematScope(mode, **options):
        hidden = [keras.layers.Dense(32, "gelu", name=name) for name in NAMES]
        model = keras.Sequential([keras.Input((16,)), *hidden])
    ks.wrap_model(model, method, target="hidden.*", rank=4, seed=1)
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 16)), rng.normal(size=(8, 32))
    history = model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    weights = map(keras.ops.convert_to_numpy, model.trainable_variables)
    return history.history["loss"], list(weights)


# Keras's own Dense fails in the others on TensorFlow, and in "larger_than" on
# JAX: tf.recompute_grad takes no keywords, and the batch has no size.
MODES = {
    "torch": ["full", "activations", "larger_than", "list_of_layers"],
    "jax": ["full", "activations", "list_of_layers"],
    "tensorflow": ["activations"],
}


@pytest.mark.compiled
@pytest.mark.parametrize("mode", MODES[BACKEND])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_numbers_are_those_without_a_scope(method, mode):
    losses, weights = _trained(method)
    again, others = _trained(method, mode)
    np.testing.assert_allclose(again, losses, rtol=1e-5)
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch tells what it saves")
@pytest.mark.parametrize("mode", [None, "list_of_layers"])
def test_a_wrapped_layer_computes_all_of_itself_again(mode):
    import torch

    with keras.RematScope(mode, layer_names=["hidden"]):
        layer = keras.layers.Dense(32, "gelu", name="hidden")
    model = keras.Sequential([keras.Input((16,)), layer])
    ks.wrap_model(model, "lora", target="hidden", rank=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        model(np.ones((8, 16), "float32"), training=True)
    shapes = [tuple(x.shape) for x in kept if x is not None]
    assert ((8, 32) in shapes) == (mode is None)  # what gelu was given
