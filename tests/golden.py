"""Numbers that a method's own implementation gave, and ours beside them."""

import os
import pathlib

import keras
import numpy as np
import pytest
from keras import ops


def folder():
    """Where the golden files are."""
    return pathlib.Path(os.environ.get("KERAS_SPECTRAL_GOLDEN", "golden"))


def arrays_of(file, case):
    """One case of a golden file as `{name: array}`."""
    if not (folder() / file).exists():
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    found = np.load(folder() / file)
    start = f"{case}/"
    return {
        name.removeprefix(start): found[name]
        for name in found.files
        if name.startswith(start)
    }


def dense_of(arrays):
    """The Dense layer of a case."""
    kernel, bias = arrays["base.lin.weight"].T, arrays["base.lin.bias"]
    layer = keras.layers.Dense(kernel.shape[1])
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    layer.bias.assign(bias)
    return layer


def check_dense(layer, arrays, gradients):
    """Compares an adapter of a Dense layer with a case of HF PEFT's.

    Args:
        layer: The adapter, with the case's weights.
        arrays: The case.
        gradients: `{weight's name: array}`, in the weights' own shapes.
    """

    def check(got, expected):
        scale = max(1.0, np.abs(expected).max())
        got = ops.convert_to_numpy(got)
        np.testing.assert_allclose(got, expected, atol=1e-5 * scale)

    x = arrays["x"]
    check(layer(x), arrays["y"])
    found = gradients_of(layer, x, arrays["g"])
    assert found.keys() == gradients.keys() | {"x"}
    for name, expected in {**gradients, "x": arrays["grad.x"]}.items():
        check(found[name], expected)
    layer.merge()
    check(layer.layer.kernel, arrays["merged.lin.weight"].T)
    check(layer.layer.bias, arrays["merged.lin.bias"])
    check(layer.layer(x), arrays["y_merged"])


def gradients_of(layer, x, g):
    """Gradients of `sum(layer(x) * g)` by the names of weights, and of x."""
    weights = layer.trainable_variables
    names = [weight.name for weight in weights] + ["x"]
    return dict(zip(names, _GRADIENTS[keras.backend.backend()](layer, x, g)))


def _of_torch(layer, x, g):
    import torch

    x = torch.tensor(x, requires_grad=True)
    values = [weight.value for weight in layer.trainable_variables]
    loss = (layer(x) * torch.tensor(g)).sum()
    return [v.detach() for v in torch.autograd.grad(loss, [*values, x])]


def _of_jax(layer, x, g):
    import jax

    frozen = layer.non_trainable_variables
    state = [v.value for v in frozen]

    def loss(values, x):
        return (layer.stateless_call(values, state, x)[0] * g).sum()

    values = [v.value for v in layer.trainable_variables]
    of_values, of_x = jax.grad(loss, (0, 1))(values, jax.numpy.asarray(x))
    return [*of_values, of_x]


def _of_tensorflow(layer, x, g):
    import tensorflow as tf

    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(layer(x) * g)
    values = [v.value for v in layer.trainable_variables]
    return tape.gradient(loss, [*values, x])


_GRADIENTS = {
    "torch": _of_torch,
    "jax": _of_jax,
    "tensorflow": _of_tensorflow,
}
