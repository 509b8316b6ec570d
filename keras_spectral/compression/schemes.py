"""What a kernel may become: the C steps of `learn_compression`."""

import math

import keras
import numpy as np

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_whole
from keras_spectral.compression.codebook import k_means
from keras_spectral.compression.codebook import quantize_by
from keras_spectral.compression.codebook import quantize_linear
from keras_spectral.compression.sparsity import hard_threshold
from keras_spectral.compression.sparsity import l1_ball
from keras_spectral.compression.sparsity import largest_mask
from keras_spectral.compression.sparsity import soft_threshold
from keras_spectral.kernels import KernelView

__all__ = [
    "FixedRank",
    "KMeans",
    "L0Penalty",
    "L1Constraint",
    "L1Penalty",
    "LearnedRank",
    "Linear",
    "Magnitude",
    "Scheme",
    "Sum",
]

_ALTERNATIONS = 10


class Scheme:
    """One way to compress a kernel, given as a matrix (n_in x n_out).

    A scheme of your own supplies `project`.

    Attributes:
        has_rank: Whether a projection ends as a pair of its rank.
    """

    has_rank = False

    def project(
        self, matrix: np.ndarray, mu: float, view: KernelView
    ) -> np.ndarray:
        """The minimum T of `cost(T) + mu / 2 |matrix - T|^2`.

        Args:
            matrix: float64 array (n_in, n_out).
            mu: Weight of the distance, above 0.
            view: That of the kernel's layer, for sizes.
        """
        raise NotImplementedError

    def rank(self, matrix: np.ndarray) -> int | None:
        """The rank of a projection, None where it is of no use."""
        return rank_of(matrix) if self.has_rank else None

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({options})"


class LearnedRank(Scheme):
    """The rank r that is worth its cost: `alpha C(r) + mu/2 |K - T|^2`.

    `C(r) = r (n_in + n_out)`, T the truncation of K to rank r, so that the
    best r is found exactly. The higher mu is, the higher the rank.

    Source: Idelbayev and Carreira-Perpinan, CVPR 2020, "Low-rank compression
    of neural nets: learning the rank of each layer".

    Args:
        alpha: What a unit of C costs, in the unit of the loss. Too small a
            one ends at full rank.
        cost: `"weights"`, or `"flops"`: C times the positions at which a
            kernel is applied, as those of a convolution.
        normalize: Whether the distance is divided by `|K|^2`.
        least: The lowest rank. 0 may make a kernel zero.
    """

    has_rank = True

    def __init__(
        self,
        alpha: float,
        cost: str = "weights",
        normalize: bool = False,
        least: int = 1,
    ):
        self.alpha = check_number(alpha, "alpha", 0)
        self.cost = check_choice(cost, "cost", ("weights", "flops"))
        self.normalize = check_flag(normalize, "normalize")
        self.least = check_whole(least, "least")

    def project(self, matrix, mu, view):
        cost = view.pair_weights(1)
        if self.cost == "flops":
            cost *= view.positions(view.input_shape())
        cost *= self.alpha
        return _truncated(
            matrix, lambda s: best_rank(s, cost, mu, self.normalize, self.least)
        )


class FixedRank(Scheme):
    """The nearest matrix of rank r.

    Args:
        rank: The rank.
    """

    has_rank = True

    def __init__(self, rank: int):
        self.fixed = check_rank(rank)

    def project(self, matrix, mu, view):
        return _truncated(matrix, lambda s: self.fixed)


class Magnitude(Scheme):
    """The smallest weights are zero, a share of all (an l0 constraint).

    Args:
        share: How many, from 0 to below 1.
    """

    def __init__(self, share: float):
        self.share = check_number(share, "share", 0, 1)

    def project(self, matrix, mu, view):
        return np.where(largest_mask(matrix, self.share), matrix, 0)


class L0Penalty(Scheme):
    """Each weight that is not zero costs alpha.

    Args:
        alpha: In the unit of the loss.
    """

    def __init__(self, alpha: float):
        self.alpha = check_number(alpha, "alpha", 0)

    def project(self, matrix, mu, view):
        return hard_threshold(matrix, math.sqrt(2 * self.alpha / mu))


class L1Penalty(Scheme):
    """Weights cost alpha times their size.

    Args:
        alpha: In the unit of the loss.
    """

    def __init__(self, alpha: float):
        self.alpha = check_number(alpha, "alpha", 0)

    def project(self, matrix, mu, view):
        return soft_threshold(matrix, self.alpha / mu)


class L1Constraint(Scheme):
    """The sizes of all weights sum up to at most `radius`.

    Args:
        radius: Above 0.
    """

    def __init__(self, radius: float):
        self.radius = check_number(radius, "radius", 1e-30)

    def project(self, matrix, mu, view):
        return l1_ball(matrix, self.radius)


class KMeans(Scheme):
    """Weights take `2^bits` values, which k-means finds.

    Args:
        bits: 1 to 8.
    """

    def __init__(self, bits: int):
        self.bits = check_whole(bits, "bits", 1, 9)

    def project(self, matrix, mu, view):
        return quantize_by(k_means(matrix, 2**self.bits), matrix)


class Linear(Scheme):
    """Weights are whole multiples of a step, one for each column.

    Args:
        bits: 2 to 8.
    """

    def __init__(self, bits: int):
        self.bits = check_whole(bits, "bits", 2, 9)

    def project(self, matrix, mu, view):
        return quantize_linear(matrix, self.bits)


class Sum(Scheme):
    """The sum of two compressions, found by projecting in turn.

    The result is a plain kernel, whatever its parts are.

    Args:
        first: A scheme.
        second: Another one, of what the first leaves over.
    """

    def __init__(self, first: Scheme, second: Scheme):
        self.first = check_scheme(first, "first")
        self.second = check_scheme(second, "second")

    def project(self, matrix, mu, view):
        second = np.zeros_like(matrix)
        for _ in range(_ALTERNATIONS):
            first = self.first.project(matrix - second, mu, view)
            second = self.second.project(matrix - first, mu, view)
        return first + second


def check_scheme(scheme, name: str) -> Scheme:
    """Raises a ValueError unless it is a scheme."""
    if not isinstance(scheme, Scheme):
        raise ValueError(
            f"Received {name}={scheme!r}. Expected a scheme such as "
            "ks.schemes.LearnedRank(1e-6)."
        )
    return scheme


def _truncated(matrix, choose):
    """The nearest matrix of the rank that its singular values decide."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = choose(s)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def best_rank(
    values: np.ndarray,
    cost: float,
    mu: float,
    normalize: bool = False,
    least: int = 1,
) -> int:
    """The r that minimises `cost r + mu / 2 sum of s_i^2 beyond r`.

    Args:
        values: Singular values, descending.
        cost: What one rank costs.
        mu: Weight of the distance.
        normalize: Whether the distance is divided by the sum of all s_i^2.
        least: The lowest r.
    """
    squares = values.astype("float64") ** 2
    beyond = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    if normalize:
        beyond = beyond / max(beyond[0], 1e-60)
    ranks = np.arange(len(values) + 1)
    total = cost * ranks + mu / 2 * beyond
    least = min(least, len(values))
    return least + int(np.argmin(total[least:]))


def rank_of(matrix: np.ndarray) -> int:
    """The numerical rank, by singular values beside the largest."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return int(np.sum(values > 1e-6 * max(values[0], 1e-30)))


def check_schemes(model: keras.Model, compressions) -> None:
    """Raises a ValueError unless it is a mapping of regexes to schemes."""
    expected = "a mapping such as {'.*/dense': ks.schemes.LearnedRank(1e-6)}"
    if not isinstance(compressions, dict) or not compressions:
        raise ValueError(
            f"Received compressions={compressions!r} for model "
            f"'{model.name}'. Expected {expected}."
        )
    for pattern, scheme in compressions.items():
        check_scheme(scheme, f"compressions[{pattern!r}]")
