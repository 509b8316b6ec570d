"""The layers of a pair, in the place of a kernel."""

import contextlib
from typing import NamedTuple

import keras
from keras import ops

from keras_spectral._internal.linalg import block_diagonal
from keras_spectral.compression.fit import Fit
from keras_spectral.compression.fit import joined
from keras_spectral.compression.spectrum import Choice
from keras_spectral.kernels import KernelView
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view


class Pair(NamedTuple):
    """A layer's pair, and its `Fit.error` where that is of outputs."""

    layer: LowRank
    error: float | None


def fitted_pair(fit: Fit, choice: Choice) -> Pair:
    """The pair that fits best at a rank, as a layer."""
    a, b = fit.pair(choice.rank, choice.slices)
    bias, error = None, None
    if fit.moments is not None:
        matrix = joined(fit.view, a, b)
        bias, error = fit.bias(matrix), fit.error(matrix)
    layer = low_rank_layer(fit.view, a, b, bias)
    layer.trainable = fit.view.layer.trainable
    return Pair(layer, error)


def low_rank_layer(view: KernelView, a, b, bias=None) -> LowRank:
    """A built pair of layers that does a layer's work with kernel A B.

    Args:
        view: The view of the layer that it is to replace.
        a: Tensor (parts, rows, rank).
        b: Tensor (parts, rank, columns).
        bias: In the place of the layer's own.
    """
    base = view.layer
    down, up = view.thin_layers(a.shape[-1], a.shape[0])
    layer = LowRank(down, up, name=base.name, dtype=base.dtype_policy)
    with _zero_start(down, up):
        layer.build(base.get_build_config()["input_shape"])
    a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
    grouped = b.shape[-1] < view.n_out
    stacked = b.reshape(-1, view.n_out)
    kernel_view(down).assign(block_diagonal(a))
    kernel_view(up).assign(block_diagonal(b) if grouped else stacked)
    if bias is None:
        bias = view.bias_of()
    if bias is not None:
        up.bias.assign(bias)
    return layer


@contextlib.contextmanager
def _zero_start(*layers):
    """Layers built within it draw no random weights, only to be overwritten:
    JAX compiles that draw again for each shape, half a second a time."""
    drawn = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if name.endswith("_initializer")
    ]
    for layer, name, _ in drawn:
        setattr(layer, name, keras.initializers.Zeros())
    try:
        yield
    finally:
        for layer, name, value in drawn:
            setattr(layer, name, value)
