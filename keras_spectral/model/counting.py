"""Numbers of weights, also of kernels that are stored in packed bytes."""

import math
from collections.abc import Iterable

import keras

from keras_spectral._internal.layer_tools import all_layers
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.kernels import kernel_view

_KERNELS = ("kernel", "embeddings", "quantized_kernel", "reverse_embeddings")
_RECORDS = ("_scale", "_zero", "_history", "g_idx")


def count_weights(layer: keras.layers.Layer, trainable: bool = False) -> int:
    """How many weights a layer or a model holds, sublayers included.

    Quantised layers count as what they were: numbers of their kernels, not
    the bytes that two or more of them may share, and no scales.

    Args:
        layer: A layer or a model.
        trainable: Whether only those count that train.
    """
    weights = layer.trainable_weights if trainable else layer.weights
    return count_variables(weights, all_layers(layer))


def count_variables(
    variables: Iterable[keras.Variable], owners: Iterable[keras.layers.Layer]
) -> int:
    """How many numbers some variables of these layers stand for."""
    sizes = {}
    for layer in owners:
        sizes |= _quantized_sizes(layer)
    return sum(sizes.get(id(v), math.prod(v.shape)) for v in variables)


def _quantized_sizes(layer):
    """How many numbers a quantised layer's variables stand for, by id."""
    if getattr(layer, "quantization_mode", None) is None or not layer.built:
        return {}
    try:
        view = kernel_view(layer)
    except ValueError:
        return {}
    sizes = {}
    for variable in own_variables(layer):
        if variable.name in _KERNELS:
            sizes[id(variable)] = view.n_in * view.n_out // view.groups
        elif variable.name.endswith(_RECORDS):
            sizes[id(variable)] = 0
    return sizes
