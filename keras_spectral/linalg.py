"""Matrix decompositions shared by the methods."""

from keras import ops


def truncated_svd(matrix, rank):
    """The first `rank` singular triplets of a matrix, signs made definite.

    `matrix ~ U diag(S) V^T`. The entry of largest size in each column of U
    is positive, so the same matrix gives the same factors on every backend.

    Args:
        matrix: Tensor (n_in x n_out), taken to float32 if it is smaller.
        rank: How many triplets, at most min(n_in, n_out).

    Returns:
        `U` (n_in x rank), `S` (rank, descending), `V` (n_out x rank).

    Example:

    >>> u, s, v = truncated_svd(keras.ops.diag([1.0, 3.0, 2.0]), 2)
    >>> [round(float(x), 4) for x in s]
    [3.0, 2.0]
    """
    matrix = ops.convert_to_tensor(matrix)
    if matrix.dtype not in ("float32", "float64"):
        matrix = ops.cast(matrix, "float32")
    u, s, vt = ops.svd(matrix, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    largest = ops.argmax(ops.abs(u), axis=0, keepdims=True)
    signs = ops.sign(ops.take_along_axis(u, largest, axis=0))
    return u * signs, s, ops.transpose(vt) * signs
