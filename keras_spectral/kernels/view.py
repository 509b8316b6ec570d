"""The base class of views: a layer's kernel as a matrix."""

import math
from typing import Any

import keras
from keras import ops

from keras_spectral._backend import is_in_graph
from keras_spectral._internal.linalg import all_finite
from keras_spectral._internal.linalg import nearest_pair
from keras_spectral._internal.twin import twin
from keras_spectral._internal.twin import without_ending
from keras_spectral.kernels.replaceable import Replaceable

_PROBE_ROWS = 512
_BLOCK = 2**18  # numbers that are computed at a time


class KernelView(Replaceable):
    """A layer's kernel as a matrix `K` (n_in x n_out), `y = x K + b`.

    Attributes:
        n_in: Rows of `K`: everything one output number is computed from.
        n_out: Columns of `K`.
        max_rank: The largest rank that a pair of factors can use.
        fan_in: How many inputs one code is computed from.
        kernel_name: The layer's attribute that holds the kernel.
        groups: How many blocks the kernel has on its diagonal.
        columns_are_outputs: Whether each column of `K` makes one of the
            layer's outputs, so that a factor of the one is a factor of the
            other.
        rows_are_inputs: Whether each row of `K` takes one of its inputs.
        row_axes: The axes of the kernel's own shape that its rows are made
            of, in their order.
        pointwise: Whether the layer is `flat(inputs) K`, row by row, so that
            a matrix can be applied to its inputs in place of `K`.
    """

    kernel_name = "kernel"
    groups = 1
    columns_are_outputs = True
    rows_are_inputs = True
    pointwise = False
    row_axes: tuple[int, ...] = (0,)

    def __init__(self, layer: keras.layers.Layer):
        self.layer = layer
        self.n_in, self.n_out = self._sizes()
        self.max_rank = min(self.n_in, self.n_out)
        self.fan_in = self.n_in

    @property
    def channels(self) -> int:
        """How many channels the layer's input has; n_in if rows are inputs."""
        return self.n_in

    @property
    def quantized(self) -> bool:
        return self.layer.quantization_mode is not None

    def bare(self) -> keras.layers.Layer:
        """A twin of the layer without activation, for one call."""
        return without_ending(self.layer)

    def with_change(self, change) -> keras.layers.Layer:
        """`bare` with a change, in the kernel's own shape, of its kernel."""
        dtype = self.layer.compute_dtype
        kernel = ops.cast(self.variable(), dtype) + ops.cast(change, dtype)
        return twin(self.bare(), **self._kernel_as(kernel))

    def with_kernel(self, kernel) -> keras.layers.Layer:
        """A twin with another kernel of the same shape, for one call."""
        kernel = ops.cast(kernel, self.layer.compute_dtype)
        return twin(self.layer, **self._kernel_as(kernel))

    def linear(self, inputs, kernel):
        """The layer's outputs with another kernel and without a bias."""
        dtype = self.layer.compute_dtype
        changes = {"bias": None, "use_bias": False}
        if self.quantized:
            changes["_dtype_policy"] = keras.DTypePolicy(dtype)
        kernel = self._kernel_as(ops.cast(kernel, dtype))
        return twin(self.bare(), **changes, **kernel)(inputs)

    def _kernel_as(self, value):
        """The attributes that hold the kernel, with another value."""
        names = (self.kernel_name, f"_{self.kernel_name}")
        return {name: value for name in names if name in vars(self.layer)}

    def matrix(self):
        """The kernel as a matrix, in float32 or, for such a base, float64.

        A quantised kernel is read dequantised.
        """
        if self.quantized:
            return self._probe()
        variable = self.variable()
        return self.to_matrix(ops.cast(variable, wide_dtype(variable.dtype)))

    def row_blocks(self):
        """`matrix()`, some rows after the others.

        Yields:
            A slice of the rows, and these rows.
        """
        matrix = self.to_matrix(self.variable())
        dtype = wide_dtype(matrix.dtype)
        count = max(1, _BLOCK // self.n_out)
        for start in range(0, self.n_in, count):
            place = slice(start, start + count)
            yield place, ops.cast(matrix[place], dtype)

    def rows(self, numbers: list[int]):
        """Some rows of `matrix`, in float32, without the cost of all."""
        if self.quantized:
            return self._probe(numbers)
        rows = ops.take(self.to_matrix(self.variable()), numbers, axis=0)
        return ops.cast(rows, "float32")

    def finite_matrix(self):
        """`matrix()`; a ValueError if it holds a NaN or an infinity."""
        matrix = self.matrix()
        finite = all_finite(matrix)
        if not is_in_graph(finite) and not finite:
            raise ValueError(
                f"The kernel of layer {self.label} holds NaN or infinite "
                "values. Expected finite numbers: training has probably "
                "diverged, so load an earlier checkpoint, or leave the layer "
                "out with `exclude`."
            )
        return matrix

    @property
    def label(self) -> str:
        """The layer's name, and where it is, for messages."""
        name, path = self.layer.name, getattr(self.layer, "path", None)
        return f"'{name}'" + (f" (at '{path}')" if path != name else "")

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

    def blocks(self, matrix):
        """The blocks (groups, rows, columns) on a matrix's diagonal."""
        return matrix[None]

    def joined(self, a, b):
        """A and B of pairs (groups, rows, r), (groups, r, columns)."""
        rank = a.shape[-1]
        b = ops.reshape(ops.swapaxes(b, 0, 1), (rank, self.n_out))
        return ops.reshape(a, (self.n_in, rank)), b

    def factor(self, matrix, rank):
        """The pair A, B of rank `rank` whose product is nearest to a matrix."""
        return nearest_pair(matrix, rank)

    def apply(self, inputs, a, b):
        """The thin product `x A B` on the layer's input."""
        return self.up(self.down(inputs, a), b)

    def add(self, outputs, inputs, a, b, **kwargs):
        """`outputs + x A B`, in the dtype of the outputs."""
        product = self.apply(inputs, a, b, **kwargs)
        return outputs + ops.cast(product, outputs.dtype)

    def down(self, inputs, a):
        """Applies A (n_in x r) to the layer's input: codes (..., r)."""
        raise NotImplementedError

    def input_rows(self, inputs):
        """What `K` multiplies, as rows (count, n_in)."""
        inputs = ops.cast(inputs, self.layer.compute_dtype)
        if self.pointwise:
            return ops.reshape(self.flat(inputs), (-1, self.n_in))
        eye = ops.eye(self.n_in // self.groups, dtype=inputs.dtype)
        codes = self.down(inputs, ops.tile(eye, (self.groups, 1)))
        return ops.reshape(codes, (-1, self.n_in))

    def up(self, codes, b):
        """Applies B (r x n_out) to codes: the layer's output shape."""
        raise NotImplementedError

    def bias(self, outputs):
        """The layer's bias in a shape to add to outputs; None without one."""
        bias = self.bias_of()
        return None if bias is None else ops.cast(bias, outputs.dtype)

    def spread(self, row, outputs):
        """n_out numbers, one a column, in a shape to multiply outputs."""
        return ops.cast(row, outputs.dtype)

    def spread_inputs(self, row, inputs):
        """n_in numbers, one a row, in a shape to multiply inputs."""
        return ops.cast(row, inputs.dtype)

    def flat(self, inputs):
        """Inputs as rows (..., n_in), for layers that are `pointwise`."""
        return inputs

    def unflat(self, rows, inputs):
        """Rows (..., n_in) in the shape of inputs: the way back."""
        return rows

    def shaped(self, columns):
        """What rows times a matrix are (..., n_out), in the output's shape."""
        return columns

    def by_channel(self, matrix):
        """A matrix's rows, those of one input channel side by side."""
        return matrix

    def by_offset(self, matrix):
        """Rows that stand `by_channel` in the order of `K`."""
        return matrix

    def on_bias(self, row):
        """n_out numbers in the shape of the bias; None without one.

        Raises:
            ValueError: Columns share numbers of the bias.
        """
        bias = self.bias_of()
        if bias is None:
            return None
        spread = self.spread(row, row) + ops.zeros(bias.shape, row.dtype)
        if math.prod(spread.shape) != math.prod(bias.shape):
            raise ValueError(
                f"The bias of layer {self.label} has shape "
                f"{tuple(bias.shape)}, so several of its {self.n_out} columns "
                "share a number of it. Expected one for each, which can be "
                "changed by itself: keep the adapter, or exclude the layer."
            )
        return ops.reshape(spread, bias.shape)

    def scaled_bias(self, row):
        """The bias times n_out numbers, see `on_bias`."""
        row = self.on_bias(row)
        return (
            None if row is None else row * ops.cast(self.bias_of(), row.dtype)
        )

    def bias_of(self):
        """The variable of the bias, None without one."""
        return getattr(self.layer, "bias", None)

    def trials(self, rng):
        """A few random inputs, each with what else a call takes.

        Args:
            rng: NumPy's random generator.
        """
        shape = self.input_shape() or (None, self.n_in)
        unknown = self._side_to_try()
        shape = (2, *(size or unknown for size in shape[1:]))
        inputs = rng.normal(size=shape)
        inputs[1] *= 10  # what is cut off shows
        inputs = ops.convert_to_tensor(inputs, self.layer.compute_dtype)
        return [(inputs, {})]

    def _side_to_try(self):
        """A size for dimensions that are not known."""
        return 3

    def _sizes(self):
        raise NotImplementedError

    def variable(self):
        return getattr(self.layer, self.kernel_name)

    def to_matrix(self, kernel):
        return ops.reshape(kernel, (self.n_in, self.n_out))

    def from_matrix(self, matrix):
        return matrix

    def _unit_inputs(self, numbers):
        """Inputs that pick out rows of `K`, one per example."""
        raise NotImplementedError

    def _probe(self, numbers=None):
        """A linear layer's matrix is its answer to unit vectors.

        `numbers` are the rows to read; None is all.

        This reads any quantisation scheme through the layer's public call;
        unit vectors survive the quantisation of activations exactly.
        """
        rows, layer = [], self.bare()
        numbers = list(range(self.n_in)) if numbers is None else numbers
        for start in range(0, len(numbers), _PROBE_ROWS):
            some = numbers[start : start + _PROBE_ROWS]
            units = self._unit_inputs(some)
            answer = layer(units) - layer(ops.zeros_like(units))
            rows.append(self._probed_rows(answer, len(some)))
        return ops.cast(ops.concatenate(rows), "float32")

    def _probed_rows(self, answer, count):
        return ops.reshape(answer, (count, self.n_out))


def wide_dtype(dtype: Any) -> str:
    """The dtype to compute in for numbers of a dtype: float32 or float64."""
    wide = keras.backend.standardize_dtype(dtype) == "float64"
    return "float64" if wide else "float32"
