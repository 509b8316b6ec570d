"""Rotations from trained numbers, as OFT and BOFT use them."""

import math

from keras import ops


def skew(numbers):
    """Skew matrices (.., b, b) from their strict upper triangles, by row.

    Args:
        numbers: Tensor (.., b (b - 1) / 2).
    """
    # Nothing of numpy, whose arrays break the graphs of `torch.compile`.
    count = numbers.shape[-1]
    size = int((1 + math.sqrt(1 + 8 * count)) / 2)
    columns = ops.arange(size)
    rows = ops.reshape(columns, (size, 1))
    low, high = ops.minimum(rows, columns), ops.maximum(rows, columns)
    places = low * (2 * size - low - 1) // 2 + high - low - 1
    # The diagonal's places mean nothing: its signs are 0.
    places = ops.reshape(ops.maximum(places, 0), (-1,))
    found = ops.take(numbers, places, axis=-1)
    found = ops.reshape(found, (*numbers.shape[:-1], size, size))
    return found * ops.cast(ops.sign(columns - rows), found.dtype)


def cayley_series(q, terms):
    """Nearly the rotations `(I + Q) (I - Q)^-1`, the other direction.

    `I + 2 Q + 2 Q^2 + .. + Q^(terms - 1)`, the last power once.
    """
    power, total = q, ops.eye(q.shape[-1], dtype=q.dtype)
    for number in range(1, terms):
        total = total + (power if number == terms - 1 else 2 * power)
        power = ops.matmul(power, q)
    return total


def rotated(rows, blocks):
    """Rows (.., n) times a block-diagonal matrix.

    Args:
        rows: Tensor (.., n).
        blocks: Tensor (n / b, b, b), or (1, b, b) for one that all share.
    """
    size = blocks.shape[-1]
    shape = ops.shape(rows)
    if blocks.shape[0] == 1:
        cut = ops.reshape(rows, (*shape[:-1], -1, size))
        return ops.reshape(ops.matmul(cut, blocks[0]), shape)
    # Block by block: TensorFlow's einsum takes twenty times as long.
    cut = ops.reshape(rows, (-1, blocks.shape[0], size))
    found = ops.matmul(ops.swapaxes(cut, 0, 1), blocks)
    return ops.reshape(ops.swapaxes(found, 0, 1), shape)


def turned(matrix, blocks):
    """A block-diagonal matrix times a matrix (n, m).

    Args:
        matrix: Tensor (n, m).
        blocks: Tensor (n / b, b, b), or (1, b, b) for one that all share.
    """
    cut = ops.reshape(matrix, (-1, blocks.shape[-1], matrix.shape[-1]))
    return ops.reshape(ops.matmul(blocks, cut), matrix.shape)
