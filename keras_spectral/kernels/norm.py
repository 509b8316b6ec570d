"""The view of a norm's scale and shift."""

import math

import keras
from keras import ops

from keras_spectral._internal.twin import twin
from keras_spectral.kernels.view import KernelView


def is_norm(layer: keras.layers.Layer) -> bool:
    """Whether a layer is, by its class's name, a norm."""
    return type(layer).__name__.endswith(("Norm", "Normalization"))


def scale_name(layer: keras.layers.Layer) -> str | None:
    """The attribute that holds a norm's scale, None without one."""
    for name in ("gamma", "scale"):
        if isinstance(getattr(layer, name, None), keras.Variable):
            return name
    return None


class NormView(KernelView):
    """A norm's scale as a matrix of one row: `y = normalised * gamma + beta`.

    Its shift is the bias. For methods that change what a layer gives and not
    what it is given; `kernel_view` knows no norms.

    Raises:
        ValueError: The layer has no scale that trains.
    """

    rows_are_inputs = False

    def __init__(self, layer):
        self.kernel_name = scale_name(layer)
        if self.kernel_name is None:
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) has no trained "
                "scale. Expected a norm with one."
            )
        super().__init__(layer)

    def _sizes(self):
        return 1, math.prod(self.variable().shape)

    def from_matrix(self, matrix):
        return ops.reshape(matrix, self.variable().shape)

    def spread(self, row, outputs):
        row = ops.reshape(row, self.variable().shape)
        return ops.cast(along_axes(self.layer, row, outputs), outputs.dtype)

    def bias_of(self):
        return getattr(self.layer, "beta", None)

    def on_bias(self, row):
        beta = self.bias_of()
        return None if beta is None else ops.reshape(row, beta.shape)

    def with_weights(self, scale, shift=None):
        """A twin with another scale and, if it has one, another shift."""
        changes = self._kernel_as(ops.cast(scale, self.layer.compute_dtype))
        if shift is not None:
            changes["beta"] = ops.cast(shift, self.layer.compute_dtype)
        return twin(self.bare(), **changes)


def along_axes(layer, numbers, outputs):
    """A layer's own numbers in a shape to multiply its outputs."""
    axis = getattr(layer, "axis", None)  # of a norm
    if axis is None and getattr(layer, "data_format", "") == "channels_first":
        axis = 1
    if axis is None:  # the last ones
        return ops.convert_to_tensor(numbers)
    sizes = [1] * len(outputs.shape)
    for one, size in zip(
        [axis] if isinstance(axis, int) else axis, numbers.shape
    ):
        sizes[one] = size
    return ops.reshape(numbers, sizes)
