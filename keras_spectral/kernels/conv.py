"""Views of convolution kernels."""

import math

import keras
from keras import ops

from keras_spectral._backend import thin_product
from keras_spectral.kernels.grouped import GroupedConv1D
from keras_spectral.kernels.grouped import GroupedConv2D
from keras_spectral.kernels.grouped import GroupedConv3D
from keras_spectral.kernels.grouped import in_groups
from keras_spectral.kernels.view import KernelView

_GROUPED = {1: GroupedConv1D, 2: GroupedConv2D, 3: GroupedConv3D}
_CONV = {
    1: keras.layers.Conv1D,
    2: keras.layers.Conv2D,
    3: keras.layers.Conv3D,
}
_SEPARABLE = {
    1: keras.layers.SeparableConv1D,
    2: keras.layers.SeparableConv2D,
}
_TRANSPOSE = {
    1: keras.layers.Conv1DTranspose,
    2: keras.layers.Conv2DTranspose,
    3: keras.layers.Conv3DTranspose,
}


class ConvView(KernelView):
    """A convolution: A is a convolution with r filters and the layer's own
    strides, padding, dilation and data format; B is a 1x1.

    With groups, A has r filters for each group (rows of `K` are ordered by
    group first) and B mixes the codes of an output channel's own group, so
    `K` is block diagonal and its rank is counted per group.
    """

    def down(self, inputs, a):
        rank = a.shape[-1]
        kernel = ops.reshape(a, (self.groups, *self._row_shape, rank))
        kernel = ops.moveaxis(kernel, 0, -2)
        kernel = ops.reshape(kernel, (*self._row_shape, self.groups * rank))
        codes = self._channels_last(self.convolve(inputs, kernel))
        if self.groups == 1:
            return codes
        shape = (*ops.shape(codes)[:-1], self.groups, rank)
        return ops.reshape(codes, shape)

    def up(self, codes, b):
        if self.groups == 1:
            return self._channels_back(thin_product(codes, b))
        b = ops.reshape(b, (b.shape[0], self.groups, -1))
        outputs = ops.einsum("...gr,rgo->...go", codes, b)
        shape = (*ops.shape(outputs)[:-2], self.n_out)
        return self._channels_back(ops.reshape(outputs, shape))

    def _sizes(self):
        layer = self.layer
        shape = layer.kernel.shape
        self.groups = layer.groups
        self._row_shape = tuple(shape[:-1])
        return self.groups * math.prod(shape[:-1]), shape[-1]

    def __init__(self, layer):
        super().__init__(layer)
        self.fan_in //= self.groups
        self.max_rank = min(self.fan_in, self.n_out // self.groups)

    def to_matrix(self, kernel):
        groups = self.groups
        kernel = ops.reshape(kernel, (self.n_in // groups, groups, -1))
        eye = ops.eye(groups, dtype=kernel.dtype)
        matrix = ops.einsum("ngo,gh->gnho", kernel, eye)
        return ops.reshape(matrix, (self.n_in, self.n_out))

    def from_matrix(self, matrix):
        kernel = ops.swapaxes(self.blocks(matrix), 0, 1)
        return ops.reshape(kernel, self.variable().shape)

    def factor(self, matrix, rank):
        """Each group's block has a pair of its own."""
        return self.joined(*super().factor(self.blocks(matrix), rank))

    def blocks(self, matrix):
        groups = self.groups
        blocks = ops.reshape(matrix, (groups, self.n_in // groups, groups, -1))
        eye = ops.eye(groups, dtype=blocks.dtype)
        return ops.einsum("gnho,gh->gno", blocks, eye)

    @property
    def channels(self):
        return self.groups * self._row_shape[-1]

    def by_channel(self, matrix):
        return self._with_axis(matrix, self._row_shape, -2, 1)

    def by_offset(self, matrix):
        *sides, channels = self._row_shape
        return self._with_axis(matrix, (channels, *sides), 1, -2)

    def _with_axis(self, matrix, row_shape, old, new):
        """A matrix whose rows have shapes, one axis of them elsewhere."""
        matrix = ops.reshape(matrix, (self.groups, *row_shape, -1))
        matrix = ops.moveaxis(matrix, old, new)
        return ops.reshape(matrix, (self.n_in, -1))

    def _side_to_try(self):
        layer = self.layer
        sides = zip(layer.kernel_size, layer.dilation_rate, layer.strides)
        return max((k - 1) * d + 1 + stride for k, d, stride in sides)

    def slicings(self):
        channels = self._row_shape[-1]
        if self.groups > 1:
            return [1]
        return [n for n in range(1, channels + 1) if channels % n == 0]

    def parts(self, matrix, slices=1):
        if self.groups > 1:
            return self.blocks(matrix)
        channels = self._row_shape[-1] // slices
        shape = (-1, slices, channels, self.n_out)
        matrix = ops.swapaxes(ops.reshape(matrix, shape), 0, 1)
        return ops.reshape(matrix, (slices, -1, self.n_out))

    def positions(self, input_shape):
        shape = self.layer.compute_output_shape(input_shape)
        return _pixels(shape, self.layer.data_format)

    def thin_layers(self, rank, slices=1):
        parts = max(slices, self.groups)
        kinds = _CONV if parts == 1 else _GROUPED
        kind = kinds[len(self.layer.kernel_size)]
        shared = self._options("kernel_size", "strides", "padding")
        shared |= self._options("dilation_rate", "data_format")
        shared |= {"filters": parts * rank, "groups": parts, "use_bias": False}
        return [kind(**shared, **self._code_options()), self._pointwise()]

    def _pointwise(self):
        """A 1x1 convolution from codes to the layer's output."""
        kinds = _CONV if self.groups == 1 else _GROUPED
        kind = kinds[len(self.layer.kernel_size)]
        options = self._options("filters", "data_format", "use_bias")
        options |= {"kernel_size": 1, "groups": self.groups}
        return kind(**options, **self._output_options())

    def convolve(self, inputs, kernel):
        layer = self.layer
        padding = layer.padding
        if padding == "causal":
            past = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            edges = [[0, 0], [0, 0], [0, 0]]
            edges[1 if layer.data_format == "channels_last" else 2] = [past, 0]
            inputs, padding = ops.pad(inputs, edges), "valid"

        def convolve(x, kernel):
            return ops.conv(
                x,
                kernel,
                strides=list(layer.strides),
                padding=padding,
                dilation_rate=layer.dilation_rate,
                data_format=layer.data_format,
            )

        return in_groups(
            convolve, inputs, kernel, self.groups, layer.data_format
        )

    def bias(self, outputs):
        bias = super().bias(outputs)
        return None if bias is None else self.spread(bias, outputs)

    def spread(self, row, outputs):
        row = super().spread(row, outputs)
        if self.layer.data_format == "channels_last":
            return row
        return ops.reshape(row, (-1, *[1] * (len(outputs.shape) - 2)))

    @property
    def row_axes(self):
        return tuple(range(len(self.variable().shape) - 1))

    # Of 1x1 kernels alone: others have a row for each offset of an input.
    spread_inputs = spread

    @property
    def rows_are_inputs(self):
        return math.prod(self.layer.kernel_size) == 1

    def _channels_last(self, x):
        if self.layer.data_format == "channels_last":
            return x
        return ops.moveaxis(x, 1, -1)

    def _channels_back(self, x):
        if self.layer.data_format == "channels_last":
            return x
        return ops.moveaxis(x, -1, 1)


class SeparableConvView(ConvView):
    """A separable convolution's pointwise kernel; its input is what the
    layer's own depthwise half makes of the layer's input."""

    kernel_name = "pointwise_kernel"
    rows_are_inputs = False

    def slicings(self):
        return [1]

    def thin_layers(self, rank, slices=1):
        layer = self.layer
        shared = self._options("kernel_size", "strides", "padding")
        shared |= self._options("dilation_rate", "data_format")
        down = _SEPARABLE[len(layer.kernel_size)](
            rank,
            depth_multiplier=layer.depth_multiplier,
            use_bias=False,
            **shared,
            **self._code_options(),
        )
        self.copy_rest(down)
        return [down, self._pointwise()]

    def copy_rest(self, layer):
        layer.build(self.layer.get_build_config()["input_shape"])
        layer.depthwise_kernel.assign(self.layer.depthwise_kernel)

    def _sizes(self):
        shape = self.variable().shape
        self.groups = 1
        self._row_shape = tuple(shape[:-1])
        return math.prod(shape[:-1]), shape[-1]

    def convolve(self, inputs, kernel):
        layer = self.layer
        depthwise = ops.cast(layer.depthwise_kernel, inputs.dtype)
        return ops.separable_conv(
            inputs,
            depthwise,
            kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )


class ConvTransposeView(ConvView):
    """A transposed convolution maps one pixel's channels (n_in) to a patch
    of k x .. x k x filters (n_out): A is a 1x1, B a transposed convolution
    with the layer's own strides, padding and data format."""

    columns_are_outputs = False
    rows_are_inputs = True
    row_axes = (-1,)

    def down(self, inputs, a):
        if self.layer.data_format == "channels_last":
            return thin_product(inputs, a)
        return ops.einsum("bc...,cr->b...r", inputs, a)

    def up(self, codes, b):
        layer = self.layer
        kernel = ops.reshape(b, (b.shape[0], *layer.kernel.shape[:-1]))
        # On PyTorch Keras's products of float64 are float32.
        codes = ops.cast(self._channels_back(codes), kernel.dtype)
        return ops.conv_transpose(
            codes,
            ops.moveaxis(kernel, 0, -1),
            strides=list(layer.strides),
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def slicings(self):
        return [1]

    def parts(self, matrix, slices=1):
        return matrix[None]

    def positions(self, input_shape):
        return _pixels(input_shape, self.layer.data_format)

    def thin_layers(self, rank, slices=1):
        layer = self.layer
        sides = len(layer.kernel_size)
        shared = self._options("filters", "kernel_size", "strides", "padding")
        shared |= self._options("output_padding", "dilation_rate", "use_bias")
        codes = {"filters": rank, "kernel_size": 1, "use_bias": False}
        order = self._options("data_format")
        return [
            _CONV[sides](**codes, **order, **self._code_options()),
            _TRANSPOSE[sides](**shared, **order, **self._output_options()),
        ]

    def _sizes(self):
        shape = self.layer.kernel.shape
        self.groups, self._row_shape = 1, (shape[-1],)
        return shape[-1], math.prod(shape[:-1])

    def to_matrix(self, kernel):
        kernel = ops.moveaxis(kernel, -1, 0)
        return ops.reshape(kernel, (self.n_in, self.n_out))

    def from_matrix(self, matrix):
        shape = self.layer.kernel.shape
        kernel = ops.reshape(matrix, (self.n_in, *shape[:-1]))
        return ops.moveaxis(kernel, 0, -1)


def _pixels(shape, data_format):
    """Product of the spatial sizes; unknown ones count as 1."""
    last = data_format == "channels_last"
    sides = shape[1:-1] if last else shape[2:]
    return math.prod(side or 1 for side in sides)
