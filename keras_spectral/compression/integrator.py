"""Steps of dynamical low-rank training: pure functions on tensors.

Bases are buffers of fixed width. With rank r the first r columns count, and
the others are zero, so that no shape changes with the rank.
"""

from keras import ops


def grown_basis(step, old, rank):
    """An orthonormal basis of what r columns of two buffers span together.

    Args:
        step: Tensor (n, any), the new columns.
        old: Tensor (n, width), the old ones.
        rank: How many columns of each count.

    Returns:
        A tensor (n, width) of which the first min(2 r, width) columns count.
    """
    width = old.shape[1]
    column = ops.arange(width)
    last = step.shape[1] - 1
    new = ops.take(step, ops.minimum(column, last), axis=1)
    old = ops.take(old, ops.maximum(column - rank, 0), axis=1)
    # Columns that count come first, or others would bend them.
    both = ops.where(column < rank, new, _first(old, 2 * rank))
    basis, _ = ops.qr(both)
    return _first(basis, 2 * rank)


def turned_core(basis_u, u, s, v, basis_v):
    """`(Uh^T U) S (V^T Vh)`: the same kernel in other bases."""
    left = ops.matmul(ops.transpose(basis_u), u)
    right = ops.matmul(ops.transpose(v), basis_v)
    return ops.matmul(ops.matmul(left, s), right)


def truncated(basis_u, core, basis_v, theta, most):
    """The factors of least rank within a tolerance.

    With `S = P D Q^T` the least r' is kept whose tail
    `|D_(r'+1), ..|` is at most `theta |D|`, at least 1 and at most `most`.

    Returns:
        U, S, V in buffers of the same shapes, and r'.
    """
    p, d, qt = ops.svd(core, full_matrices=False)
    squares = ops.square(d)
    tails = ops.flip(ops.cumsum(ops.flip(squares, 0), 0), 0)
    above = ops.cast(tails > theta**2 * tails[0], "int32")
    rank = ops.clip(ops.sum(above), 1, most)
    d = _first(d[None], rank)[0]
    u = _first(ops.matmul(basis_u, p), rank)
    v = _first(ops.matmul(basis_v, ops.transpose(qt)), rank)
    rows, columns = core.shape
    s = _wide(_wide(ops.diag(d), rows, 0), columns, 1)
    return _wide(u, rows, 1), s, _wide(v, columns, 1), rank


def _first(columns, count):
    """A matrix whose columns from `count` on are zero."""
    kept = ops.arange(columns.shape[1]) < count
    return ops.where(kept, columns, ops.zeros_like(columns))


def _wide(matrix, size, axis):
    """A matrix with zeros behind along one axis."""
    missing = size - matrix.shape[axis]
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, missing)
    return ops.pad(matrix, widths) if missing else matrix
