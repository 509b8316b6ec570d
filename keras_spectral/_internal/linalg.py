"""Matrix decompositions shared by the methods."""

import numpy as np
from keras import ops

from keras_spectral._backend import solve_positive
from keras_spectral._backend import symmetric_eigen

_TINY = 1e-7  # beside 1, hardly more than float32's rounding


def truncated_svd(matrix, rank):
    """The first `rank` singular triplets of a matrix, signs made definite.

    `matrix ~ U diag(S) V^T`. The entry of largest size in each column of U
    is positive, so the same matrix gives the same factors on every backend.

    Args:
        matrix: Tensor (..., n_in, n_out), taken to float32 if it is smaller.
        rank: How many triplets, at most min(n_in, n_out).

    Returns:
        `U` (..., n_in, rank), `S` (..., rank), descending, and
        `V` (..., n_out, rank).

    Example:

    >>> u, s, v = truncated_svd(keras.ops.diag([1.0, 3.0, 2.0]), 2)
    >>> [round(float(x), 4) for x in s]
    [3.0, 2.0]
    """
    u, s, vt = ops.svd(_at_least_float32(matrix), full_matrices=False)
    v = _transpose(vt[..., :rank, :])
    return _fix_signs(u[..., :rank], s[..., :rank], v)


def randomized_svd(matrix, rank, oversampling=4, num_blocks=6, seed=0):
    """The first `rank` singular triplets by block Krylov iteration.

    A random block of `rank + oversampling` directions is multiplied by the
    matrix and its transpose in turn, made orthonormal by QR each time; the
    triplets come from the space that all `num_blocks` blocks span. Keeping
    the earlier blocks makes it far more exact than subspace iteration with
    the same products. It costs a few products with a thin matrix where a
    whole SVD costs min(n_in, n_out) of them. Where the singular values hardly
    fall, the directions found are some of the leading ones, mixed. Whatever
    the error, `matrix^T U = V diag(S)` holds to rounding.

    Source: Musco and Musco 2015, arXiv 1504.05477, algorithm 2.

    Args:
        matrix: Tensor (..., n_in, n_out), taken to float32 if it is smaller.
        rank: How many triplets, at most min(n_in, n_out).
        oversampling: Directions in each block beside them.
        num_blocks: How many blocks, fewer where they span all there is.
        seed: Integer seed of the first block, equal on every backend.

    Returns:
        `U` (..., n_in, rank), `S` (..., rank), `V` (..., n_out, rank), and
        the error (...): an estimate of the sine of the largest angle between
        the columns of U and the true subspace, at most 1.

    Example:

    >>> matrix = keras.ops.diag([2.0 ** -i for i in range(40)])
    >>> u, s, v, error = randomized_svd(matrix, 3)
    >>> [round(float(x), 4) for x in s], bool(error < 1e-4)
    ([1.0, 0.5, 0.25], True)
    """
    matrix = _at_least_float32(matrix)
    transposed = _transpose(matrix)
    n_in, n_out = matrix.shape[-2:]
    smaller = min(n_in, n_out)
    width = min(rank + oversampling, smaller)
    rng = np.random.default_rng(seed)
    start = ops.cast(rng.normal(size=(n_out, width)), matrix.dtype)
    basis, images = [], []
    for _ in range(max(1, min(num_blocks, smaller // width))):
        block = ops.matmul(matrix, images[-1] if images else start)
        noise = ops.cast(rng.normal(size=(n_in, width)), matrix.dtype)
        basis.append(_new_directions(block, basis, _TINY * noise))
        images.append(ops.matmul(transposed, basis[-1]))
    v, s, inner = ops.svd(ops.concatenate(images, -1), full_matrices=False)
    inner = _still_orthonormal(_transpose(inner)[..., :rank])
    u, v = ops.matmul(ops.concatenate(basis, -1), inner), v[..., :rank]
    residual = ops.matmul(matrix, v) - u * s[..., None, :rank]
    error = _subspace_error(residual, s, rank)
    return *_fix_signs(u, s[..., :rank], v), error


def nearest_pair(matrix, rank):
    """The pair A, B whose product is nearest to a matrix at a rank.

    `A = U sqrt(S)`, `B = sqrt(S) V^T`; the first columns of A and rows of B
    are the nearest pair of a smaller rank.

    Args:
        matrix: Tensor (..., n_in, n_out), taken to float32 if it is smaller.
        rank: At most min(n_in, n_out).

    Returns:
        `A` (..., n_in, rank) and `B` (..., rank, n_out).
    """
    u, s, v = truncated_svd(matrix, rank)
    root = ops.sqrt(s)[..., None, :]
    return u * root, _transpose(v * root)


def singular_values(
    matrix: np.ndarray, precision: str = "float64"
) -> np.ndarray:
    """All singular values of a numpy matrix, descending.

    They are the roots of the eigenvalues of K K^T or K^T K, the smaller one.
    In float64 that is as exact as an SVD in float32, and several times as
    fast; in float32 values below 3e-4 of the largest are rounding, as they
    are in a kernel of half precision.

    Args:
        matrix: K (..., n_in, n_out).
        precision: `"float64"` or `"float32"`.
    """
    return _short_side(matrix, precision, vectors=False)[0]


def short_side(
    matrix: np.ndarray, precision: str = "float64"
) -> tuple[np.ndarray, np.ndarray]:
    """All `singular_values` and the singular vectors of the smaller side.

    Returns:
        (..., m), descending, and (..., m, m) with m the smaller of n_in and
        n_out: vectors of the right side unless n_in is the smaller one.
    """
    return _short_side(matrix, precision, vectors=True)


def right_vectors(
    matrix: np.ndarray, rank: int, known: np.ndarray | None = None
) -> np.ndarray:
    """The first right singular vectors of a numpy matrix, in float64.

    In the order of descending values, and by the same way as
    `singular_values`. Those of values that are only rounding are zeros, if
    there are more columns than rows.

    Args:
        matrix: K (..., n_in, n_out).
        rank: How many, at most min(n_in, n_out).
        known: The vectors of `short_side`, which then are not computed.

    Returns:
        (..., n_out, rank).
    """
    matrix = np.float64(matrix)
    vectors = short_side(matrix)[1] if known is None else known
    vectors = np.float64(vectors[..., :rank])
    if matrix.shape[-1] <= matrix.shape[-2]:
        return vectors
    images = np.swapaxes(matrix, -1, -2) @ vectors
    sizes = np.linalg.norm(images, axis=-2, keepdims=True)
    real = sizes > _TINY * sizes.max(axis=-1, keepdims=True)
    return np.where(real, images, 0) / np.where(real, sizes, 1)


def pair_along(matrix: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, ...]:
    """The pair A, B of equal sizes whose product is `K V V^T`.

    Each column of A is as long as that row of B. With the right singular
    vectors of K that is its `nearest_pair`.

    Args:
        matrix: K (..., n_in, n_out).
        v: V (..., n_out, rank), columns orthonormal or zeros.

    Returns:
        `A` (..., n_in, rank) and `B` (..., rank, n_out).
    """
    a = np.matmul(matrix, v)
    root = np.sqrt(np.linalg.norm(a, axis=-2, keepdims=True))
    root = np.where(root > 0, root, 1)
    return a / root, np.swapaxes(v * root, -1, -2)


def leading_pair(
    matrix: np.ndarray,
    rank: int,
    precision: str = "float64",
    known: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """`nearest_pair` of a numpy matrix, by the way of `singular_values`.

    Args:
        matrix: K (..., n_in, n_out).
        rank: At most min(n_in, n_out).
        precision: `"float64"` or `"float32"`.
        known: The vectors of `short_side`, which then are not computed.
    """
    vectors = short_side(matrix, precision)[1] if known is None else known
    v = vectors[..., :rank].astype(matrix.dtype)
    if matrix.shape[-1] <= matrix.shape[-2]:
        return pair_along(matrix, v)
    b, a = pair_along(np.swapaxes(matrix, -1, -2), v)
    return np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)


def _short_side(matrix, precision, vectors):
    matrix = matrix.astype(precision, copy=False)
    turned = np.swapaxes(matrix, -1, -2)
    n_in, n_out = matrix.shape[-2:]
    product = matrix @ turned if n_in < n_out else turned @ matrix
    squares, found = symmetric_eigen(product, vectors)
    values = np.sqrt(np.maximum(squares[..., ::-1], 0))
    return values, found[..., ::-1] if vectors else None


def all_finite(matrix):
    """Whether no number of a matrix (rows x columns) is NaN or infinite.

    By the means of its rows: one reading, where `isfinite` fills a matrix of
    its own.
    """
    columns = matrix.shape[-1]
    share = ops.full((columns, 1), 1 / columns, matrix.dtype)
    return ops.all(ops.isfinite(ops.matmul(matrix, share)))


def block_diagonal(blocks):
    """A numpy matrix with blocks (parts, rows, columns) on its diagonal."""
    parts, rows, columns = blocks.shape
    if parts == 1:
        return blocks[0]
    matrix = np.einsum(
        "prc,pq->prqc", blocks, np.eye(parts, dtype=blocks.dtype)
    )
    return matrix.reshape(parts * rows, parts * columns)


def cayley(matrix):
    """The Cayley map: any square matrix to a rotation.

    `Q(X) = (I - Z)(I + Z)^-1` with `Z = (X - X^T) / 2`. `Q(0) = I`. `I + Z`
    is never singular, and the two factors commute, so one solve does it.

    Args:
        matrix: Tensor (..., r, r).

    Returns:
        An orthogonal matrix of the same shape.

    Example:

    >>> q = cayley(keras.ops.convert_to_tensor([[0.0, 2.0], [0.0, 0.0]]))
    >>> [[round(float(x), 4) + 0.0 for x in row] for row in q]
    [[0.0, -1.0], [1.0, 0.0]]
    """
    matrix = ops.convert_to_tensor(matrix)
    skew = (matrix - _transpose(matrix)) / 2
    eye = ops.eye(matrix.shape[-1], dtype=skew.dtype)
    return solve_positive(eye + skew, ops.broadcast_to(eye, skew.shape) - skew)


def _at_least_float32(matrix):
    matrix = ops.convert_to_tensor(matrix)
    if matrix.dtype in ("float32", "float64"):
        return matrix
    return ops.cast(matrix, "float32")


def _transpose(matrix):
    return ops.swapaxes(matrix, -1, -2)


def _new_directions(block, basis, noise):
    """An orthonormal block, orthogonal to those in the basis.

    Where nothing new is left, rounding errors may lie within the basis;
    a little noise gives the second round something to keep.
    """
    block, _ = ops.qr(block)
    for extra in (noise, 0.0):
        for known in basis:
            shadow = ops.matmul(_transpose(known), block)
            block = block - ops.matmul(known, shadow)
        block, _ = ops.qr(block + extra)
    return block


def _still_orthonormal(directions):
    """Corrects directions of almost no weight, oblique on TensorFlow."""
    q, r = ops.qr(directions)
    diagonal = ops.diagonal(r, axis1=-2, axis2=-1)[..., None, :]
    return ops.where(diagonal < 0, -q, q)


def _fix_signs(u, s, v):
    largest = ops.argmax(ops.abs(u), axis=-2, keepdims=True)
    signs = ops.sign(ops.take_along_axis(u, largest, axis=-2))
    return u * signs, s, v * signs


def _subspace_error(residual, s, rank):
    """Bounds the angle by what the subspace misses, over the gap behind it.

    What is missing altogether counts against the values beyond the subspace;
    a mix-up of the last triplet kept with the first one dropped, both inside
    the subspace, is of second order.
    """
    tiny = 1e-6 * s[..., 0] + 1e-30
    missed = ops.sqrt(ops.sum(residual**2, axis=(-2, -1)))
    last, beyond = s[..., rank - 1], s[..., -1]
    first_dropped = s[..., min(rank, s.shape[-1] - 1)]
    outside = missed / ops.maximum(last - beyond, tiny)
    inside = missed**2 / ops.maximum(last * (last - first_dropped), tiny**2)
    exact = missed <= ops.sqrt(float(rank)) * tiny
    return ops.where(exact, 0.0, ops.minimum(outside + inside, 1.0))
