"""What a layer's pair is fitted to: its outputs on the inputs it gets."""

import dataclasses

import numpy as np
from keras import ops

from keras_spectral._internal.linalg import block_diagonal
from keras_spectral._internal.linalg import leading_pair
from keras_spectral._internal.linalg import pair_along
from keras_spectral._internal.linalg import right_vectors
from keras_spectral._internal.linalg import short_side
from keras_spectral._internal.linalg import singular_values
from keras_spectral.kernels import KernelView
from keras_spectral.layers.moments import Moments

# Of each input's mean square: correlations shrink by so much, which a few
# hundred rows do not measure better, and the scales of inputs do not matter.
_DAMPING = 1e-3


@dataclasses.dataclass(frozen=True)
class Fit:
    """The least squares of one layer, `min |X K - X A B|` at a rank.

    With `C = X^T X / count = L L^T` the best pair is the truncated SVD of
    `L^T K`, taken back: with its right singular vectors V, `A B = K V V^T`
    (SVD-LLM, arXiv 2403.07378). Where the pair's bias makes up for the mean,
    it is left out of all products, which is the exact optimum with a bias
    (DALR, arXiv 1707.04693).

    Where the pair gets other inputs X', they are those of C, and K* stands
    for K: the regression of `(X + X') K / 2` on X', `K* = C^-1 (X'^T X +
    X'^T X') K / (2 count)`. Of MiniLM with 40 % of its weights that keeps
    more than to regress `X K` or `X' K` does.

    Attributes:
        view: The view of the layer that gets the pair.
        moments: Of the inputs X' that the pair gets; None for `min |K - A B|`.
        original: Of the inputs X that the layer gets in the whole model,
            where they are others.
        cross: `X'^T X / count` of both (n_in, n_in), or its diagonal.
        centred: Whether the pair's bias makes up for the means.
        source: The view whose kernel is K, if it is not `view`.
    """

    view: KernelView
    moments: Moments | None = None
    original: Moments | None = None
    cross: np.ndarray | None = None
    centred: bool = False
    source: KernelView | None = None
    _known: dict[int, np.ndarray] = dataclasses.field(
        default_factory=dict, init=False
    )

    def kernel(self) -> np.ndarray:
        """K as a matrix."""
        return ops.convert_to_numpy(self._matrix())

    def target(self) -> np.ndarray:
        """K*, which is K where X and X' are the same."""
        kernel = self.kernel()
        if self.cross is None:
            return kernel
        second = self._second()
        cross = (self._cross() + second) / 2
        damping = self._damping()  # on both sides: it draws K* to K
        if second.ndim == 1:
            found = _column((cross + damping) / (second + damping)) * kernel
            return found.astype(kernel.dtype)
        blocks = ops.convert_to_numpy(self.view.blocks(kernel))
        rows = np.arange(self.view.n_in).reshape(len(blocks), -1)
        found = []
        for own, block in zip(rows, blocks):
            damped = np.diag(damping[own])
            wanted = (_block(cross, own) + damped) @ block
            found.append(np.linalg.solve(_block(second, own) + damped, wanted))
        return block_diagonal(np.stack(found)).astype(kernel.dtype)

    def whitened(self, slices: int = 1, parts: np.ndarray | None = None):
        """`L^T K*` of each part that is factored apart, in numpy.

        Args:
            slices: How many slices of the inputs there are.
            parts: The parts of K*, if they are known.
        """
        parts = self._parts(slices) if parts is None else parts
        if self.moments is None:
            return parts
        pairs = zip(self._roots(slices), parts)
        return np.stack([_times(root, part) for root, part in pairs])

    def spectrum(self, slices: int = 1, keep: bool = False) -> np.ndarray:
        """The singular values of `whitened`.

        Args:
            slices: How many slices of the inputs there are.
            keep: Whether to keep vectors for `pair`, in the kernel's own
                precision: that takes as long as to find them then, and the
                values cost nothing.
        """
        whitened = self.whitened(slices)
        if not keep:
            return singular_values(whitened, self._precision())
        values, vectors = short_side(whitened, self._precision())
        kind = "float16" if self._is_half() else whitened.dtype
        self._known[slices] = vectors.astype(kind)
        return values

    def forget(self) -> None:
        """Frees the vectors that `spectrum` kept."""
        self._known.clear()

    def pair(self, rank: int, slices: int = 1) -> tuple[np.ndarray, ...]:
        """A (parts, rows, rank) and B (parts, rank, columns)."""
        parts, known = self._parts(slices), self._known.get(slices)
        if self.moments is None:
            return leading_pair(parts, rank, self._precision(), known)
        v = right_vectors(self.whitened(slices, parts), rank, known)
        return pair_along(parts, v.astype(parts.dtype))

    def bias(self, matrix: np.ndarray):
        """The bias beside a kernel A B, in the layer's own shape.

        `b + m K - m' A B` with the means m and m' of X and X'.
        """
        bias = self.view.bias_of()
        if not self.centred:
            return bias
        mean = np.float64((self.original or self.moments).mean)
        row = mean @ self.kernel() - np.float64(self.moments.mean) @ matrix
        row = ops.convert_to_tensor(row, "float32")
        return bias + ops.cast(self.view.on_bias(row), bias.dtype)

    def error(self, matrix: np.ndarray) -> float:
        """`|X K - X' A B| / |X K|`, less means where the bias has them."""
        kernel, matrix = np.float64(self.kernel()), np.float64(matrix)
        second = self._second()
        if self.cross is None:
            lost = kernel - matrix
            return _ratio(
                _inner(lost, second, lost), _inner(kernel, second, kernel)
            )
        total = _inner(kernel, self._second(self.original), kernel)
        lost = total - 2 * _inner(matrix, self._cross(), kernel)
        return _ratio(lost + _inner(matrix, second, matrix), total)

    def _matrix(self):
        return (self.source or self.view).matrix()

    def _parts(self, slices):
        """The parts of K* that are factored apart, in numpy."""
        if self.cross is None:
            matrix = self._matrix()
        else:
            matrix = ops.convert_to_tensor(self.target())
        return ops.convert_to_numpy(self.view.parts(matrix, slices))

    def _precision(self):
        """Kernels of half precision alone need no more than float32."""
        alone = self.moments is None
        return "float32" if self._is_half() and alone else "float64"

    def _is_half(self):
        return "16" in self.view.layer.variable_dtype

    def _second(self, moments=None):
        """The second moments in float64, less means where a bias has them."""
        moments = moments or self.moments
        second = np.float64(moments.second)
        if self.centred:
            return second - _outer(moments.mean, moments.mean, second.ndim)
        return second

    def _cross(self):
        """`cross` in float64, less means where a bias has them."""
        cross = np.float64(self.cross)
        if self.centred:
            means = self.moments.mean, self.original.mean
            return cross - _outer(*means, cross.ndim)
        return cross

    def _damping(self):
        """What is added to the diagonal of the second moments."""
        squares = np.float64(self.moments.second)
        squares = np.diag(squares) if squares.ndim == 2 else squares
        # Inputs that are always 0 have a share as well.
        least = 1e-6 * max(float(squares.mean()), 1e-30)
        return _DAMPING * np.maximum(squares, least)

    def _roots(self, slices):
        """L of each part: lower triangles, or diagonals."""
        second, damping = self._second(), self._damping()
        rows = part_rows(self.view, slices)
        if second.ndim == 1:
            return np.sqrt(np.maximum(second, 0) + damping)[rows]
        return [_root(_block(second, own), damping[own]) for own in rows]


def compensable(view: KernelView) -> bool:
    """Whether a layer's bias can make up for the mean of its outputs."""
    if view.bias_of() is None or not view.columns_are_outputs:
        return False
    try:
        view.on_bias(ops.zeros((view.n_out,)))
    except ValueError:
        return False
    return True


def part_rows(view: KernelView, slices: int = 1) -> np.ndarray:
    """The rows of the kernel in each part (parts, rows)."""
    numbers = np.arange(view.n_in, dtype="float32")[:, None]
    numbers = np.broadcast_to(numbers, (view.n_in, view.n_out))
    parts = view.parts(ops.convert_to_tensor(numbers), slices)
    return ops.convert_to_numpy(parts)[..., 0].round().astype(int)


def joined(view: KernelView, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The matrix (n_in, n_out) of a kernel whose parts are pairs."""
    product = np.matmul(a, b)
    if product.shape[-1] < view.n_out:
        return block_diagonal(product)
    matrix = np.zeros((view.n_in, view.n_out), product.dtype)
    matrix[part_rows(view, len(product))] = product
    return matrix


def _root(second, damping):
    """The Cholesky factor of damped second moments."""
    while True:
        try:
            return np.linalg.cholesky(second + np.diag(damping))
        except np.linalg.LinAlgError:  # rounding errors of large means
            damping = 2 * damping


def _times(root, part):
    return root.T @ part if root.ndim == 2 else _column(root) * part


def _column(numbers):
    return numbers[:, None]


def _block(matrix, rows):
    return matrix[np.ix_(rows, rows)]


def _outer(left, right, ndim):
    left, right = np.float64(left), np.float64(right)
    return np.outer(left, right) if ndim == 2 else left * right


def _inner(left, second, right):
    """The sum of squares of outputs, `tr(left^T second right)`."""
    seen = second @ right if second.ndim == 2 else _column(second) * right
    return float((left * seen).sum())


def _ratio(lost, total):
    return float(np.sqrt(max(lost, 0.0) / max(total, 1e-60)))
