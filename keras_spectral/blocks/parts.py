"""Functions that the parts of block adapters share."""

import keras
from keras import ops

from keras_spectral._backend import thin_product
from keras_spectral.layers.adapter import AdapterLayer

Weights = tuple[keras.Variable, keras.Variable]


def dense_weights(
    adapter: AdapterLayer, name: str, n_in: int, n_out: int, start
) -> Weights:
    """A kernel and a bias of zeros, as weights of an adapter."""
    kernel = adapter.add_weight(
        name=f"{name}_kernel", shape=(n_in, n_out), initializer=start
    )
    bias = adapter.add_weight(
        name=f"{name}_bias", shape=(n_out,), initializer="zeros"
    )
    return kernel, bias


def dense(inputs, kernel, bias):
    """`inputs kernel + bias` in the inputs' dtype."""
    outputs = thin_product(inputs, ops.cast(kernel, inputs.dtype))
    return outputs + ops.cast(bias, inputs.dtype)


def spread(values, like):
    """Values () or (batch,) in the dtype and for the rank of a tensor."""
    if len(values.shape):
        values = ops.reshape(values, (-1, *[1] * (len(like.shape) - 1)))
    return ops.cast(values, like.dtype)
