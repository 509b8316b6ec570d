"""Every linear layer seen as one matrix, with thin factors on its own input.

`kernel_view(layer)` is the one entry. A new kind of layer is one new view
here, and every method of the library works on it.
"""

import math
import string

import keras
from keras import ops

_PROBE_ROWS = 512


def kernel_view(layer: keras.layers.Layer) -> "KernelView":
    """Returns the view of a built linear layer's kernel as a matrix.

    Args:
        layer: A built Dense, EinsumDense, Conv1D/2D/3D, SeparableConv1D/2D,
            Conv1D/2D/3DTranspose, Embedding or ReversibleEmbedding layer.

    Raises:
        ValueError: The layer is unbuilt, is of a kind whose kernel has no
            useful low-rank form, or has Keras's own LoRA switched on.
    """
    view_class = view_class_of(layer)
    if not layer.built:
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) has no kernel "
            "yet. Expected a built layer. Call the model on a batch or use "
            "`build(input_shape)` first."
        )
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"Layer '{layer.name}' already runs Keras's own LoRA "
            "(`enable_lora`). Expected a plain layer; build the model "
            "without `lora_rank` or `enable_lora`."
        )
    return view_class(layer)


def view_class_of(layer: keras.layers.Layer) -> type["KernelView"]:
    """Returns the view class for a layer, or raises a ValueError with why."""
    for kind, reason in _REFUSED.items():
        if isinstance(layer, kind):
            raise ValueError(
                f"Layer '{layer.name}' is a {type(layer).__name__}: {reason}"
            )
    for kind, view_class in _VIEWS.items():
        if isinstance(layer, kind):
            return view_class
    names = sorted({kind.__name__ for kind in _VIEWS})
    raise ValueError(
        f"Layer '{layer.name}' is a {type(layer).__name__}, which holds no "
        f"kernel that an adapter can use. Expected one of: {', '.join(names)}."
    )


class KernelView:
    """A layer's kernel as a matrix `K` (n_in x n_out), `y = x K + b`.

    Attributes:
        n_in: Rows of `K`: everything one output number is computed from.
        n_out: Columns of `K`.
        max_rank: The largest rank that a pair of factors can use.
        fan_in: How many inputs one code is computed from.
        kernel_name: The layer's attribute that holds the kernel.
    """

    kernel_name = "kernel"

    def __init__(self, layer):
        self.layer = layer
        self.n_in, self.n_out = self._sizes()
        self.max_rank = min(self.n_in, self.n_out)
        self.fan_in = self.n_in

    @property
    def quantized(self) -> bool:
        return self.layer.quantization_mode is not None

    def matrix(self):
        """The kernel as a float32 matrix; a quantised one is dequantised."""
        if self.quantized:
            return self._probe()
        return self.to_matrix(ops.cast(self.variable(), "float32"))

    def assign(self, matrix) -> None:
        """Writes a matrix (n_in x n_out) into the layer's kernel."""
        self.check_assignable()
        self.variable().assign(self.kernel(matrix))

    def check_assignable(self) -> None:
        """Raises a ValueError if the kernel is quantised."""
        if self.quantized:
            raise ValueError(
                f"Layer '{self.layer.name}' is quantised "
                f"({self.layer.quantization_mode}) and cannot hold a merged "
                "kernel exactly. Keep the adapter, or merge into the float "
                "model and quantise afterwards."
            )

    def kernel(self, matrix):
        """A matrix (n_in x n_out) in the kernel's own shape and dtype."""
        kernel = self.from_matrix(matrix)
        if self.quantized:
            return ops.cast(kernel, self.layer.compute_dtype)
        return ops.cast(kernel, self.variable().dtype)

    def apply(self, inputs, a, b):
        """The thin product `x A B` on the layer's input."""
        return self.up(self.down(inputs, a), b)

    def down(self, inputs, a):
        """Applies A (n_in x r) to the layer's input: codes (..., r)."""
        raise NotImplementedError

    def up(self, codes, b):
        """Applies B (r x n_out) to codes: the layer's output shape."""
        raise NotImplementedError

    def _sizes(self):
        raise NotImplementedError

    def variable(self):
        return getattr(self.layer, self.kernel_name)

    def to_matrix(self, kernel):
        return ops.reshape(kernel, (self.n_in, self.n_out))

    def from_matrix(self, matrix):
        return matrix

    def _unit_inputs(self, start, stop):
        """Inputs that pick out rows start..stop of `K`, one per example."""
        raise NotImplementedError

    def _probe(self):
        """A linear layer's matrix is its answer to unit vectors.

        This reads any quantisation scheme through the layer's public call;
        unit vectors survive the quantisation of activations exactly.
        """
        rows = []
        for start in range(0, self.n_in, _PROBE_ROWS):
            stop = min(start + _PROBE_ROWS, self.n_in)
            units = self._unit_inputs(start, stop)
            answer = self.layer(units) - self.layer(ops.zeros_like(units))
            rows.append(self._probed_rows(answer, stop - start))
        return ops.cast(ops.concatenate(rows), "float32")

    def _probed_rows(self, answer, count):
        return ops.reshape(answer, (count, self.n_out))


class DenseView(KernelView):
    def down(self, inputs, a):
        return ops.matmul(inputs, a)

    def up(self, codes, b):
        return ops.matmul(codes, b)

    def _sizes(self):
        return self.layer.input_spec.axes[-1], self.layer.units

    def _unit_inputs(self, start, stop):
        return ops.one_hot(ops.arange(start, stop), self.n_in)


class EinsumDenseView(KernelView):
    """Factors an einsum by letter role.

    Letters that the kernel shares with the input (contracted or batch) are
    the rows of `K`; letters that the kernel alone gives to the output are
    its columns. `abc,cde->abde` becomes `abc,cr->abr` and `abr,rde->abde`.
    """

    def down(self, inputs, a):
        a = ops.reshape(a, (*self._in_shape, a.shape[-1]))
        return ops.einsum(self._down_equation, inputs, a)

    def up(self, codes, b):
        b = ops.reshape(b, (b.shape[0], *self._out_shape))
        return ops.einsum(self._up_equation, codes, b)

    def _sizes(self):
        source, kernel, target = _split_equation(self.layer)
        shape = getattr(self.layer, "original_kernel_shape", None)
        sizes = dict(zip(kernel, shape or self.layer.kernel.shape))
        rows = "".join(c for c in kernel if c in source)
        columns = "".join(c for c in kernel if c not in source)
        rank = _unused_letters(source + kernel, 1)
        codes = "".join(c for c in target if c not in columns) + rank
        self._down_equation = f"{source},{rows}{rank}->{codes}"
        self._up_equation = f"{codes},{rank}{columns}->{target}"
        self._order = [kernel.index(c) for c in rows + columns]
        self._letters = source, target, rows, columns
        self._in_shape = tuple(sizes[c] for c in rows)
        self._out_shape = tuple(sizes[c] for c in columns)
        return math.prod(self._in_shape), math.prod(self._out_shape)

    def to_matrix(self, kernel):
        kernel = ops.transpose(kernel, self._order)
        return ops.reshape(kernel, (self.n_in, self.n_out))

    def from_matrix(self, matrix):
        kernel = ops.reshape(matrix, (*self._in_shape, *self._out_shape))
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        return ops.transpose(kernel, back)

    def _probe_letter(self):
        """A letter of input and output that the kernel lacks: a batch."""
        source, target, rows, _ = self._letters
        return next(c for c in source if c in target and c not in rows)

    def _unit_inputs(self, start, stop):
        source, _, rows, _ = self._letters
        units = ops.one_hot(ops.arange(start, stop), self.n_in)
        probe = self._probe_letter()
        ones = [c for c in source if c not in rows and c != probe]
        shape = (stop - start, *[1 for _ in ones], *self._in_shape)
        letters = [probe, *ones, *rows]
        order = [letters.index(c) for c in source]
        return ops.transpose(ops.reshape(units, shape), order)

    def _probed_rows(self, answer, count):
        # Batch letters of the kernel stay in the answer; a unit vector
        # fills one place of them and leaves zeros elsewhere.
        _, target, _, columns = self._letters
        kept = [c for c in target if c in columns or c == self._probe_letter()]
        summed = [i for i, c in enumerate(target) if c not in kept]
        answer = ops.sum(answer, axis=summed) if summed else answer
        order = [kept.index(c) for c in self._probe_letter() + columns]
        return super()._probed_rows(ops.transpose(answer, order), count)


class ConvView(KernelView):
    """A convolution: A is a convolution with r filters and the layer's own
    strides, padding, dilation and data format; B is a 1x1.

    With groups, A has r filters for each group (rows of `K` are ordered by
    group first) and B mixes the codes of an output channel's own group, so
    `K` is block diagonal and its rank is counted per group.
    """

    def down(self, inputs, a):
        rank = a.shape[-1]
        kernel = ops.reshape(a, (self._groups, *self._row_shape, rank))
        kernel = ops.moveaxis(kernel, 0, -2)
        kernel = ops.reshape(kernel, (*self._row_shape, self._groups * rank))
        codes = self._channels_last(self.convolve(inputs, kernel))
        if self._groups == 1:
            return codes
        shape = (*ops.shape(codes)[:-1], self._groups, rank)
        return ops.reshape(codes, shape)

    def up(self, codes, b):
        if self._groups == 1:
            return self._channels_back(ops.matmul(codes, b))
        b = ops.reshape(b, (b.shape[0], self._groups, -1))
        outputs = ops.einsum("...gr,rgo->...go", codes, b)
        shape = (*ops.shape(outputs)[:-2], self.n_out)
        return self._channels_back(ops.reshape(outputs, shape))

    def _sizes(self):
        layer = self.layer
        shape = layer.kernel.shape
        self._groups = layer.groups
        self._row_shape = tuple(shape[:-1])
        return self._groups * math.prod(shape[:-1]), shape[-1]

    def __init__(self, layer):
        super().__init__(layer)
        self.fan_in //= self._groups
        self.max_rank = min(self.fan_in, self.n_out // self._groups)

    def to_matrix(self, kernel):
        groups = self._groups
        kernel = ops.reshape(kernel, (self.n_in // groups, groups, -1))
        matrix = ops.einsum("ngo,gh->gnho", kernel, ops.eye(groups))
        return ops.reshape(matrix, (self.n_in, self.n_out))

    def from_matrix(self, matrix):
        groups = self._groups
        blocks = ops.reshape(matrix, (groups, self.n_in // groups, groups, -1))
        kernel = ops.einsum("gnho,gh->ngo", blocks, ops.eye(groups))
        return ops.reshape(kernel, self.variable().shape)

    def convolve(self, inputs, kernel):
        layer = self.layer
        padding = layer.padding
        if padding == "causal":
            past = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            edges = [[0, 0], [0, 0], [0, 0]]
            edges[1 if layer.data_format == "channels_last" else 2] = [past, 0]
            inputs, padding = ops.pad(inputs, edges), "valid"
        return ops.conv(
            inputs,
            kernel,
            strides=list(layer.strides),
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def add_bias(self, outputs):
        """The layer's own bias on the output of `convolve`."""
        if self.layer.bias is None:
            return outputs
        bias = ops.cast(self.layer.bias, outputs.dtype)
        if self.layer.data_format == "channels_first":
            bias = ops.reshape(bias, (-1, *[1] * (len(outputs.shape) - 2)))
        return outputs + bias

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

    def _sizes(self):
        shape = self.variable().shape
        self._groups = 1
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

    def down(self, inputs, a):
        if self.layer.data_format == "channels_last":
            return ops.matmul(inputs, a)
        return ops.einsum("bc...,cr->b...r", inputs, a)

    def up(self, codes, b):
        layer = self.layer
        kernel = ops.reshape(b, (b.shape[0], *layer.kernel.shape[:-1]))
        return ops.conv_transpose(
            self._channels_back(codes),
            ops.moveaxis(kernel, 0, -1),
            strides=list(layer.strides),
            padding=layer.padding,
            output_padding=layer.output_padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def _sizes(self):
        shape = self.layer.kernel.shape
        self._groups = 1
        return shape[-1], math.prod(shape[:-1])

    def to_matrix(self, kernel):
        kernel = ops.moveaxis(kernel, -1, 0)
        return ops.reshape(kernel, (self.n_in, self.n_out))

    def from_matrix(self, matrix):
        shape = self.layer.kernel.shape
        kernel = ops.reshape(matrix, (self.n_in, *shape[:-1]))
        return ops.moveaxis(kernel, 0, -1)


class EmbeddingView(KernelView):
    """An embedding table: A is indexed by token id."""

    kernel_name = "embeddings"

    def down(self, inputs, a):
        return ops.take(a, ops.cast(inputs, "int32"), axis=0)

    def up(self, codes, b):
        return ops.matmul(codes, b)

    def _sizes(self):
        return self.layer.input_dim, self.layer.output_dim

    def _probe(self):
        table = self.layer(ops.arange(self.n_in))
        return ops.cast(table, "float32")


class ReversibleEmbeddingView(EmbeddingView):
    """A table that is also the output projection: `x K^T` in reverse."""

    def apply(self, inputs, a, b, reverse=False):
        if not reverse:
            return super().apply(inputs, a, b)
        if not self.layer.tie_weights:
            return ops.zeros((), inputs.dtype)
        return ops.matmul(
            ops.matmul(inputs, ops.transpose(b)), ops.transpose(a)
        )


def _split_equation(layer):
    """Input, kernel and output letters of an einsum that can be factored."""
    source, rest = layer.equation.replace(" ", "").split(",")
    kernel, target = rest.split("->")
    if "..." in source:
        count = layer.input_spec.ndim - len(source.replace("...", ""))
        spread = _unused_letters(source + kernel + target, count)
        source = source.replace("...", spread)
        target = target.replace("...", spread)
    problem = None
    if any(len(set(part)) < len(part) for part in (source, kernel, target)):
        problem = "a letter repeats within one term"
    elif any(c not in source + target for c in kernel):
        problem = "the kernel has a letter that neither input nor output has"
    elif not any(c in source for c in kernel):
        problem = "the kernel shares no letter with the input"
    elif all(c in source for c in kernel):
        problem = "the kernel gives no letter to the output, it only scales"
    if problem:
        raise ValueError(
            f"Layer '{layer.name}' has equation '{layer.equation}', which is "
            f"not a matrix applied to the input: {problem}. Exclude the layer."
        )
    return source, kernel, target


def _unused_letters(used, count):
    free = [c for c in string.ascii_letters if c not in used]
    return "".join(free[:count])


_DEPTHWISE = (
    "a depthwise kernel keeps channels apart (k x k numbers a channel), so "
    "there is no matrix over channels to give a low rank. Train the layer "
    "itself (`trainable=`), or exclude it."
)
_REFUSED = {
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
}
# The first match counts, so a subclass stands before its parent.
_VIEWS = {
    keras.layers.ReversibleEmbedding: ReversibleEmbeddingView,
    keras.layers.Dense: DenseView,
    keras.layers.EinsumDense: EinsumDenseView,
    keras.layers.SeparableConv1D: SeparableConvView,
    keras.layers.SeparableConv2D: SeparableConvView,
    keras.layers.Conv1DTranspose: ConvTransposeView,
    keras.layers.Conv2DTranspose: ConvTransposeView,
    keras.layers.Conv3DTranspose: ConvTransposeView,
    keras.layers.Conv1D: ConvView,
    keras.layers.Conv2D: ConvView,
    keras.layers.Conv3D: ConvView,
    keras.layers.Embedding: EmbeddingView,
}
