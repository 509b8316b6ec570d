"""Weighted merges of changes of one kernel, in numpy.

The names are those of HF PEFT's `add_weighted_adapter`. A name that ends in
"svd" works on whole changes, delta = s A B (n_in x n_out), of which
`truncated` makes a pair again; the others work on the factors themselves. But
for "cat" they are quick approximations: A and B are merged apart, so that
their product has cross terms A_i B_j of unlike adapters.
"""

import math
from collections.abc import Sequence

import numpy as np

from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_seed
from keras_spectral.library.merge_options import DELTA_METHODS
from keras_spectral.library.merge_options import METHODS
from keras_spectral.library.merge_options import PAIR_METHODS
from keras_spectral.library.merge_options import SIGNS
from keras_spectral.library.merge_options import check_alike
from keras_spectral.library.merge_options import check_fits
from keras_spectral.library.merge_options import check_options
from keras_spectral.library.merge_options import check_pairs
from keras_spectral.library.merge_options import check_weights
from keras_spectral.library.merge_options import finite_matrices

__all__ = [
    "DELTA_METHODS",
    "METHODS",
    "PAIR_METHODS",
    "SIGNS",
    "combine_deltas",
    "combine_pairs",
    "truncated",
    "truncated_product",
]


def combine_pairs(
    pairs: Sequence[tuple],
    weights: Sequence[float],
    method: str,
    density: float | None = None,
    sign: str = "total",
    rng: np.random.Generator | int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Merges low-rank pairs by their factors.

    With t_i = w_i s_i, the scale of the result is 1:

    - "cat": A = [t_1 A_1, t_2 A_2, ...], B stacked. Exact; ranks add up.
    - "linear": A = sum sign(t_i) sqrt|t_i| A_i, B = sum sqrt|t_i| B_i.
    - The others take the same weights for A and for B, and what
      `combine_deltas` does with whole changes they do with each of the two.

    Args:
        pairs: For each adapter A (n_in x r), B (r x n_out) and the number s
            that their product is scaled with. Only "cat" takes unlike ranks.
        weights: A number w_i for each; negative ones take away.
        method: One of `PAIR_METHODS`.
        density: Share of entries that stay, as in `combine_deltas`.
        sign: "total" or "frequency", as in `combine_deltas`.
        rng: Generator or seed of the draws of "dare_linear" and "dare_ties":
            first for A of each adapter, then for B of each.

    Returns:
        A (n_in x r) and B (r x n_out), float32, the change being A B.

    Raises:
        ValueError: An unknown method, a density that is missing, out of
            range or not used, weights or numbers that are not finite, shapes
            or ranks that do not fit together.

    Example:

    >>> one, two = np.ones((3, 1)), np.ones((1, 2))
    >>> pairs = [(one, two, 2.0), (one, two, 1.0)]
    >>> a, b = combine_pairs(pairs, [1.0, -0.5], "cat")
    >>> a.shape, (a @ b)[0].tolist()
    ((3, 2), [1.5, 1.5])
    """
    check_options(method, density, sign, PAIR_METHODS)
    weights = check_weights(weights, len(pairs))
    many_a = finite_matrices([a for a, _, _ in pairs], "A")
    many_b = finite_matrices([b for _, b, _ in pairs], "B")
    weights = [w * check_number(p[2], "scale") for w, p in zip(weights, pairs)]
    check_pairs(many_a, many_b, method)
    if method == "cat":
        many_a = [w * a for w, a in zip(weights, many_a)]
        return np.concatenate(many_a, axis=1), np.concatenate(many_b)
    roots = [math.sqrt(abs(w)) for w in weights]
    signed = [math.copysign(root, w) for root, w in zip(roots, weights)]
    rng = _generator(rng)
    return (
        _merge(many_a, signed, method, density, sign, rng),
        _merge(many_b, roots, method, density, sign, rng),
    )


def combine_deltas(
    deltas: Sequence,
    weights: Sequence[float],
    method: str,
    density: float | None = None,
    sign: str = "total",
    rng: np.random.Generator | int | None = None,
) -> np.ndarray:
    """Merges whole changes of a kernel, of any adapters.

    - "svd": sum w_i D_i.
    - "magnitude_prune_svd": sum w_i P(D_i), where P keeps the
      int(density * size) entries of largest size and makes the rest 0.
    - "dare_linear_svd": sum w_i M_i D_i / density, where the entries of M_i
      are 1 with probability `density`, else 0.
    - "ties_svd": each entry elects a sign, that of the sum of P(D_i)
      ("total") or of the sum of their signs ("frequency"), + if it is 0;
      the entries w_i P(D_i) with that sign before weights are summed and
      divided by their number.
    - "dare_ties_svd": the same election among M_i D_i / density.

    Sources: Yadav et al. 2023, arXiv 2306.01708 (TIES); Yu et al. 2023, arXiv
    2311.03099 (DARE).

    Args:
        deltas: D_i (n_in x n_out) for each adapter, its scale included.
        weights: A number w_i for each; negative ones take away.
        method: One of `DELTA_METHODS`.
        density: Share of entries that stay, above 0 and at most 1, which
            prunes nothing. None for "svd".
        sign: "total" or "frequency", for the two with an election.
        rng: Generator or seed of the draws, one for each adapter.

    Returns:
        The change (n_in x n_out), float32.

    Raises:
        ValueError: As `combine_pairs`.

    Example:

    >>> deltas = [np.array([[4.0, -1.0]]), np.array([[-3.0, -2.0]])]
    >>> combine_deltas(deltas, [1.0, 1.0], "ties_svd", density=1.0).tolist()
    [[4.0, -1.5]]
    """
    check_options(method, density, sign, DELTA_METHODS)
    weights = check_weights(weights, len(deltas))
    deltas = finite_matrices(deltas, "delta")
    check_alike([d.shape for d in deltas], "shapes of changes")
    return _merge(deltas, weights, method, density, sign, _generator(rng))


def truncated(delta, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair A (n_in x rank), B (rank x n_out) nearest to a change.

    A = U sqrt(S), B = sqrt(S) V^T of its first singular triplets, computed in
    float64.

    Raises:
        ValueError: A rank that the matrix does not have.

    Example:

    >>> a, b = truncated(np.diag([3.0, 1.0, 2.0]), rank=2)
    >>> np.diag(a @ b).round(4).tolist()
    [3.0, 0.0, 2.0]
    """
    (delta,) = finite_matrices([delta], "delta")
    check_fits(rank, delta.shape)
    u, s, vt = np.linalg.svd(np.float64(delta), full_matrices=False)
    root = np.sqrt(s[:rank])
    return np.float32(u[:, :rank] * root), np.float32(root[:, None] * vt[:rank])


def truncated_product(a, b, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`truncated(a @ b, rank)` of thin factors, which never forms a @ b.

    After "cat" it is "svd" at a fraction of the cost. A rank above that of
    the factors gives columns and rows of zeros.

    Raises:
        ValueError: A rank that the product does not have.

    Example:

    >>> a, b = truncated_product(np.ones((5, 2)), np.ones((2, 4)), rank=1)
    >>> a.shape, b.shape, bool(np.allclose(a @ b, 2.0))
    ((5, 1), (1, 4), True)
    """
    (a,), (b,) = finite_matrices([a], "A"), finite_matrices([b], "B")
    check_pairs([a], [b], "cat")
    check_fits(rank, (len(a), b.shape[1]))
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    core = r_a @ r_b.T
    a, b = truncated(core, min(rank, *core.shape))
    missing = (0, rank - len(b))
    a = np.pad(q_a @ a, ((0, 0), missing))
    return a, np.pad(b @ q_b.T, (missing, (0, 0)))


def _merge(parts, weights, method, density, sign, rng):
    """The weighted sum of what pruning leaves, or of what an election does."""
    prunes = density is not None and density < 1
    if prunes and "dare" in method:
        parts = [_random_share(p, density, rng) for p in parts]
    elif prunes:
        parts = [_largest_share(p, density) for p in parts]
    if "ties" not in method:
        return sum(w * p for w, p in zip(weights, parts))
    votes = sum(np.sign(p) if sign == "frequency" else p for p in parts)
    elected = np.where(votes < 0, -1, 1)
    agree = [np.float32(np.sign(p) == elected) for p in parts]
    total = sum(w * p * yes for w, p, yes in zip(weights, parts, agree))
    return total / np.maximum(sum(agree), 1)


def _largest_share(part, density):
    """Of entries of equal size at the limit, the first ones stay."""
    count = int(density * part.size)
    if not count:
        return np.zeros_like(part)
    size = np.abs(part).ravel()
    limit = np.partition(size, -count)[-count]
    stays = size > limit
    equal = np.flatnonzero(size == limit)
    stays[equal[: count - np.count_nonzero(stays)]] = True
    return part * stays.reshape(part.shape)


def _random_share(part, density, rng):
    stays = rng.random(part.shape, dtype="float32") < density
    return part * stays / float(density)


def _generator(rng):
    if isinstance(rng, np.random.Generator):
        return rng
    return np.random.default_rng(check_seed(rng, "rng"))
