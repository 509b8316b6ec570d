"""Views of Dense and EinsumDense kernels."""

import math
import string

import keras
from keras import ops

from keras_spectral._backend import multiply_add
from keras_spectral._backend import thin_factor
from keras_spectral._backend import thin_product
from keras_spectral.kernels.view import KernelView


class DenseView(KernelView):
    pointwise = True

    def add(self, outputs, inputs, a, b, **kwargs):
        codes = self.down(inputs, a)
        total = multiply_add(outputs, codes, b)
        if total is None:
            total = outputs + ops.cast(self.up(codes, b), outputs.dtype)
        return total

    def down(self, inputs, a):
        return thin_product(inputs, a)

    def up(self, codes, b):
        return thin_product(codes, b)

    def thin_layers(self, rank, slices=1):
        options = self._options("units", "use_bias") | self._output_options()
        return [
            keras.layers.Dense(rank, use_bias=False, **self._code_options()),
            keras.layers.Dense(**options),
        ]

    def _sizes(self):
        return self.layer.input_spec.axes[-1], self.layer.units

    def _unit_inputs(self, numbers):
        return ops.one_hot(ops.convert_to_tensor(numbers), self.n_in)


class EinsumDenseView(KernelView):
    """Factors an einsum by letter role.

    Letters that the kernel shares with the input (contracted or batch) are
    the rows of `K`; letters that the kernel alone gives to the output are
    its columns. `abc,cde->abde` becomes `abc,cr->abr` and `abr,rde->abde`.
    """

    def down(self, inputs, a):
        source, target, rows, columns = self._letters
        kept = _without(source, rows)
        if source.endswith(rows) and kept == _without(target, columns):
            shape = ops.shape(inputs)[: len(kept)]
            return thin_product(ops.reshape(inputs, (*shape, self.n_in)), a)
        a = ops.reshape(a, (*self._in_shape, a.shape[-1]))
        return ops.einsum(self._down_equation, inputs, thin_factor(a))

    def up(self, codes, b):
        if self._in_order():
            product = thin_product(codes, b)
            shape = (*ops.shape(codes)[:-1], *self._out_shape)
            return ops.reshape(product, shape)
        b = ops.reshape(b, (b.shape[0], *self._out_shape))
        return ops.einsum(self._up_equation, codes, b)

    def add(self, outputs, inputs, a, b, **kwargs):
        codes, total = self.down(inputs, a), None
        if self._in_order():
            total = multiply_add(outputs, codes, b)
        if total is None:
            total = outputs + ops.cast(self.up(codes, b), outputs.dtype)
        return total

    def _in_order(self):
        """Whether B's columns are those of the outputs, side by side."""
        _, target, _, columns = self._letters
        return columns and target.endswith(columns)

    def spread(self, row, outputs):
        _, target, _, columns = self._letters
        return ops.cast(self._along(target, row, columns), outputs.dtype)

    def spread_inputs(self, row, inputs):
        source, _, rows, _ = self._letters
        return ops.cast(self._along(source, row, rows), inputs.dtype)

    @property
    def row_axes(self):
        return tuple(self._order[: len(self._in_shape)])

    @property
    def pointwise(self):
        source, target, rows, _ = self._letters
        kept = set(source) - set(rows)
        return kept <= set(target) and not set(rows) & set(target)

    def flat(self, inputs):
        source, _, rows, _ = self._letters
        rows_last = [*_without(source, rows), *rows]
        inputs = ops.transpose(inputs, [source.index(c) for c in rows_last])
        kept = ops.shape(inputs)[: len(source) - len(rows)]
        return ops.reshape(inputs, (*kept, self.n_in))

    def unflat(self, rows, inputs):
        source, _, letters, _ = self._letters
        rows = ops.reshape(rows, (*ops.shape(rows)[:-1], *self._in_shape))
        rows_last = [*_without(source, letters), *letters]
        return ops.transpose(rows, [rows_last.index(c) for c in source])

    def shaped(self, columns):
        source, target, rows, letters = self._letters
        shape = (*ops.shape(columns)[:-1], *self._out_shape)
        found = [*_without(source, rows), *letters]
        columns = ops.reshape(columns, shape)
        return ops.transpose(columns, [found.index(c) for c in target])

    def _along(self, term, numbers, letters):
        """Numbers with an axis for each of some letters, as in a term."""
        sizes = self._letter_sizes
        order = [letters.index(c) for c in term if c in letters]
        numbers = ops.reshape(numbers, [sizes[c] for c in letters])
        shape = [sizes[c] if c in letters else 1 for c in term]
        return ops.reshape(ops.transpose(numbers, order), shape)

    def positions(self, input_shape):
        source, _, rows, _ = self._letters
        sizes = dict(zip(source, input_shape))
        free = [c for c in source[1:] if c not in rows]
        return math.prod(sizes[c] or 1 for c in free)

    def flops(self, input_shape, rank=None, slices=1):
        if rank is None:
            return super().flops(input_shape)
        # Batch letters of the kernel are in the codes as well.
        _, target, rows, _ = self._letters
        times = math.prod(self._letter_sizes[c] for c in rows if c in target)
        weights = rank * (self.n_in + times * self.n_out)
        return 2 * weights * self.positions(input_shape)

    def thin_layers(self, rank, slices=1):
        target = self._letters[1]
        codes = self._down_equation.split("->")[1]
        given = self.layer.get_config()["output_shape"]
        sizes = dict(zip(self._sized(target), given))
        sizes |= {**self._letter_sizes, codes[-1]: rank}
        return [
            keras.layers.EinsumDense(
                self._with_ellipsis(self._down_equation),
                tuple(sizes.get(c) for c in self._sized(codes)),
                **self._code_options(),
            ),
            keras.layers.EinsumDense(
                self._with_ellipsis(self._up_equation),
                tuple(sizes.get(c) for c in self._sized(target)),
                bias_axes=self.layer.bias_axes,
                **self._output_options(),
            ),
        ]

    def _with_ellipsis(self, equation):
        """The equation with `...` where the layer's own has it."""
        return (
            equation.replace(self._spread, "...") if self._spread else equation
        )

    def _sized(self, letters):
        """The letters of a term whose sizes Keras's `output_shape` lists."""
        if self._spread:
            term = self._with_ellipsis(letters)
            return term.replace("...", "")[0 if term.startswith("...") else 1 :]
        return letters[1:]

    def _sizes(self):
        source, kernel, target, self._spread = _split_equation(self.layer)
        shape = getattr(self.layer, "original_kernel_shape", None)
        sizes = dict(zip(kernel, shape or self.layer.kernel.shape))
        rows = "".join(c for c in kernel if c in source)
        columns = "".join(c for c in kernel if c not in source)
        rank = _unused_letters(source + kernel, 1)
        codes = "".join(c for c in target if c not in columns) + rank
        self._down_equation = f"{source},{rows}{rank}->{codes}"
        self._up_equation = f"{codes},{rank}{columns}->{target}"
        self._order = [kernel.index(c) for c in rows + columns]
        self._letter_sizes = sizes
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

    def _unit_inputs(self, numbers):
        source, _, rows, _ = self._letters
        units = ops.one_hot(ops.convert_to_tensor(numbers), self.n_in)
        probe = self._probe_letter()
        ones = [c for c in source if c not in rows and c != probe]
        shape = (len(numbers), *[1 for _ in ones], *self._in_shape)
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


def _without(letters, others):
    return [c for c in letters if c not in others]


def _split_equation(layer):
    """Input, kernel and output letters of an einsum that can be factored.

    The fourth are those that stand for its `...`.
    """
    source, rest = layer.equation.replace(" ", "").split(",")
    kernel, target = rest.split("->")
    spread = ""
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
    return source, kernel, target, spread


def _unused_letters(used, count):
    free = [c for c in string.ascii_letters if c not in used]
    return "".join(free[:count])
