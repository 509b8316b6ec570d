"""Layers whose kernels take few values while they train."""

import keras
from keras import ops

from keras_spectral._backend import to_numpy
from keras_spectral._internal.checks import check_whole
from keras_spectral.compression.codebook import k_means
from keras_spectral.compression.codebook import nearest
from keras_spectral.kernels import kernel_view


class QuantizedKernel(keras.layers.Wrapper):
    """Runs a linear layer with another kernel, `quantized_kernel()`."""

    def __init__(self, layer: keras.layers.Layer, bits: int, **kwargs):
        super().__init__(layer, **{"name": layer.name, **kwargs})
        self.bits = bits
        self.supports_masking = layer.supports_masking

    def build(self, input_shape=None):
        super().build(input_shape)
        self.view = kernel_view(self.layer)

    def quantized_kernel(self):
        """The kernel that counts, in its own shape."""
        raise NotImplementedError

    def call(self, inputs):
        return self.view.with_kernel(self.quantized_kernel())(inputs)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs, mask=None):
        return self.layer.compute_mask(inputs, mask)

    def get_config(self):
        return {**super().get_config(), "bits": self.bits}


@keras.saving.register_keras_serializable("keras_spectral")
class Clustered(QuantizedKernel):
    """A layer whose weights take `2^bits` trained values.

    `K_ij = c[q_ij]`: the numbers q are fixed, the codebook c trains, so that
    a value's gradient is the sum of those of its weights.

    Args:
        layer: The layer; k-means makes codebook and numbers of its kernel.
        bits: 1 to 8.

    Call arguments:
        inputs: What the layer takes.
    """

    def __init__(self, layer: keras.layers.Layer, bits: int, **kwargs):
        super().__init__(layer, check_whole(bits, "bits", 1, 9), **kwargs)

    def build(self, input_shape=None):
        super().build(input_shape)
        variable = self.view.variable()
        variable.trainable = False
        kernel = to_numpy(variable)
        values = k_means(kernel, 2**self.bits)
        self.codebook = self.add_weight(
            shape=values.shape, name="codebook", dtype="float32"
        )
        self.codes = self.add_weight(
            shape=kernel.shape,
            name="codes",
            dtype="uint8",
            initializer="zeros",
            trainable=False,
        )
        self.codebook.assign(values)
        self.codes.assign(nearest(values, kernel).astype("uint8"))

    def quantized_kernel(self):
        return ops.take(self.codebook, ops.cast(self.codes, "int32"))


@keras.saving.register_keras_serializable("keras_spectral")
class FakeQuantized(QuantizedKernel):
    """A layer that runs with its kernel rounded to `bits` bits.

    `K'_ij = s_j round(K_ij / s_j)`, with the step s_j of a column such that
    its largest weight is `2^(bits - 1) - 1` steps. The gradient passes as if
    nothing were rounded (straight-through).

    Args:
        layer: The layer; its kernel trains on.
        bits: 2 to 8.

    Call arguments:
        inputs: What the layer takes.
    """

    def __init__(self, layer: keras.layers.Layer, bits: int, **kwargs):
        super().__init__(layer, check_whole(bits, "bits", 2, 9), **kwargs)

    def quantized_kernel(self):
        kernel = ops.convert_to_tensor(self.view.variable())
        grouped = self.view.groups > 1
        shape = (-1, kernel.shape[-1])
        matrix = (
            ops.reshape(kernel, shape)
            if grouped
            else self.view.to_matrix(kernel)
        )
        largest = ops.max(ops.abs(matrix), axis=0, keepdims=True)
        scale = ops.maximum(largest, 1e-30) / (2 ** (self.bits - 1) - 1)
        rounded = ops.round(matrix / scale) * scale
        rounded = (
            ops.reshape(rounded, kernel.shape)
            if grouped
            else self.view.from_matrix(rounded)
        )
        return kernel + ops.stop_gradient(rounded - kernel)
