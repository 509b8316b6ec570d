"""Where a weight of a layer lies in a Hugging Face tensor."""

import functools
import inspect
import math
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import to_numpy
from keras_spectral.exchange.recorder import Source
from keras_spectral.kernels import kernel_view

# In how many layers' parts a tensor is looked for.
_MOST_PARTS = 3


class Slot(NamedTuple):
    """The part of a Hugging Face tensor that a weight is made of.

    Attributes:
        layout: How the tensor lies to the layer's matrix (n_in x n_out):
            `"linear"` (out, in), `"conv1d"` (in, out), `"conv"` (out, in,
            *kernel), `"table"` (rows, columns); `"vector"` for what is no
            kernel and in order, `"transposed"` for a second matrix.
        start: The first of the tensor's outputs that are the layer's.
        total: How many outputs the tensor has.
    """

    layout: str
    start: int
    total: int


def slot_of(source: Source) -> Slot | None:
    """The slot of a weight, None if the tensor is permuted for it.

    A converter's hook is asked by giving it the numbers of the tensor's
    entries: what comes back says where each one goes.
    """
    key = _same_hooks(source.hook), source.shape, _kind(source)
    try:
        if key in _KNOWN:
            return _KNOWN[key]
    except TypeError:  # a hook that closes over what cannot be hashed
        return _find(source)
    found = _find(source)
    if len(_KNOWN) > _MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[key] = found
    return found


_KNOWN: dict = {}
_MOST_KNOWN = 1000


def to_tensor(slot: Slot, layer: keras.layers.Layer, value) -> np.ndarray:
    """A weight's value as the Hugging Face tensor, if it is all of that."""
    value = to_numpy(value)
    if slot.layout == "vector":
        return value.reshape(-1)
    if slot.layout == "table":
        return value
    if slot.layout == "transposed":
        return value.T
    matrix = ops.convert_to_numpy(kernel_view(layer).to_matrix(value))
    if slot.layout == "conv1d":
        return matrix
    if slot.layout == "linear":
        return matrix.T
    return _conv_tensor(value)


def _find(source):
    if source.attribute == "kernel":
        return _kernel_slot(source)
    shape = source.shape
    if len(shape) == 2 and source.attribute.endswith("embeddings"):
        if _answer(source, shape, lambda n: n):
            return Slot("table", 0, shape[1])
        if _answer(source, shape[::-1], lambda n: n.T):
            return Slot("transposed", 0, shape[0])
        return None
    size = math.prod(shape)
    for parts in range(1, _MOST_PARTS + 1):
        start = _start(source, (parts * size,), np.ravel)
        if start is not None:
            return Slot("vector", start, parts * size)
    return None


def _kernel_slot(source):
    try:
        view = kernel_view(source.layer)
    except ValueError:
        return None
    matrix = functools.partial(_matrix, view)
    n_in, n_out = view.n_in, view.n_out
    if hasattr(source.layer, "kernel_size"):
        shape = (*source.shape[::-1][:2], *source.shape[:-2])
        right = _answer(source, shape, _conv_tensor)
        return Slot("conv", 0, n_out) if right else None
    for parts in range(1, _MOST_PARTS + 1):
        total = parts * n_out
        start = _start(source, (total, n_in), lambda n: matrix(n).T)
        if start is not None:
            return Slot("linear", start // n_in, total)
        found = _numbers(source, (n_in, total))
        if found is None:
            continue
        start = int(found.min())
        order = np.arange(n_in * total).reshape(n_in, total)
        columns = order[:, start : start + n_out]
        if np.array_equal(matrix(found), columns):
            return Slot("conv1d", start, total)
    return None


def _matrix(view, numbers):
    """`view.to_matrix` of whole numbers."""
    return ops.convert_to_numpy(view.to_matrix(ops.convert_to_tensor(numbers)))


def _conv_tensor(kernel):
    """(*size, in, out) as (out, in, *size)."""
    return np.moveaxis(kernel, (-1, -2), (0, 1))


def _answer(source, shape, back):
    """Whether `back` undoes what the hook does."""
    return _start(source, shape, back) == 0


def _start(source, shape, back):
    """Where the weight's entries, brought back in order, begin; else None."""
    found = _numbers(source, shape)
    if found is None:
        return None
    found = back(found).reshape(-1)
    start = int(found[0])
    right = np.array_equal(found, np.arange(start, start + found.size))
    return start if right else None


def _numbers(source, shape):
    """The numbers of the tensor's entries in the weight's order."""
    numbers = np.arange(math.prod(shape), dtype="int32").reshape(shape)
    try:
        found = source.read(numbers)
    except (ValueError, IndexError, TypeError):
        return None  # the tensor has another shape
    return found if found.shape == source.shape else None


def _kind(source):
    layer = source.layer
    order = getattr(layer, "equation", None)
    return type(layer), source.attribute, order


def _same_hooks(hook):
    """Equal for hooks that do the same."""
    if not inspect.isfunction(hook):
        return hook
    cells = [cell.cell_contents for cell in hook.__closure__ or ()]
    cells = [_same_hooks(c) if inspect.isfunction(c) else c for c in cells]
    return hook.__code__, hook.__defaults__, tuple(cells)
