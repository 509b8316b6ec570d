"""Sparse arrays nearest to given ones: pure functions on numpy arrays."""

import numpy as np


def largest_mask(kernel: np.ndarray, share: float) -> np.ndarray:
    """Where the largest numbers are, by size; `share` of all are left out.

    Exactly `round(share * size)` numbers are left out, whatever is equal.
    """
    return most_important(np.abs(kernel), share)


def most_important(scores: np.ndarray, share: float) -> np.ndarray:
    """Where scores are highest; `share` of all are left out."""
    dropped = round(share * scores.size)
    mask = np.ones(scores.size, bool)
    mask[np.argsort(scores, axis=None, kind="stable")[:dropped]] = False
    return mask.reshape(scores.shape)


def n_of_m_mask(matrix: np.ndarray, n: int, m: int) -> np.ndarray:
    """Where the n largest of each m numbers are that follow down a column.

    The numbers of a column multiply inputs that stand side by side, as
    hardware for 2:4 sparsity wants them. What is left over at the end counts
    as a group of its own, in which at most n stay.

    Args:
        matrix: Array (n_in, n_out).
        n: How many stay.
        m: Of how many.
    """
    rows, columns = matrix.shape
    padded = np.full((-(-rows // m) * m, columns), -1.0)
    padded[:rows] = np.abs(matrix)
    groups = padded.reshape(-1, m, columns)
    order = np.argsort(-groups, axis=1, kind="stable")
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, order[:, :n], True, axis=1)
    return mask.reshape(padded.shape)[:rows]


def soft_threshold(kernel: np.ndarray, threshold: float) -> np.ndarray:
    """The minimum of `threshold |x|_1 + |x - kernel|^2 / 2`."""
    return np.sign(kernel) * np.maximum(np.abs(kernel) - threshold, 0)


def hard_threshold(kernel: np.ndarray, threshold: float) -> np.ndarray:
    """The minimum of `threshold^2 / 2 |x|_0 + |x - kernel|^2 / 2`."""
    return np.where(np.abs(kernel) > threshold, kernel, 0)


def l1_ball(kernel: np.ndarray, radius: float) -> np.ndarray:
    """The nearest array whose numbers' sizes sum up to at most `radius`.

    Source: Duchi et al. 2008, doi 10.1145/1390156.1390191.
    """
    sizes = np.sort(np.abs(kernel), axis=None)[::-1]
    if sizes.sum() <= radius:
        return kernel
    excess = (np.cumsum(sizes) - radius) / np.arange(1, sizes.size + 1)
    last = np.flatnonzero(sizes > excess)[-1]
    return soft_threshold(kernel, excess[last])
