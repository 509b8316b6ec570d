"""Few values for many weights: pure functions on numpy arrays."""

import numpy as np

_ROUNDS = 100


def nearest(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """For each weight the number of the nearest of the sorted values."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, kernel)


def k_means(
    kernel: np.ndarray, count: int, start: np.ndarray | None = None
) -> np.ndarray:
    """The sorted values that Lloyd's algorithm finds for a kernel's weights.

    In turn each weight goes to its nearest value, and each value to the mean
    of its weights; the squared error never grows. A value without weights
    stays.

    Args:
        kernel: Weights of any shape.
        count: How many values.
        start: Where the values start; by default at quantiles of the
            weights, so that each has as many.
    """
    weights = np.sort(kernel, axis=None).astype("float64")
    if start is None:
        start = np.quantile(weights, (np.arange(count) + 0.5) / count)
    values = np.sort(start).astype("float64")
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    for _ in range(_ROUNDS):
        # Weights of a value stand side by side, so sums need no codes.
        borders = np.searchsorted(weights, (values[1:] + values[:-1]) / 2)
        borders = np.concatenate([[0], borders, [weights.size]])
        members = np.diff(borders)
        means = np.diff(sums[borders]) / np.maximum(members, 1)
        moved = np.where(members, means, values)
        if np.array_equal(moved, values):
            break
        values = moved
    return values


def quantize_by(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The kernel with each weight replaced by the nearest sorted value."""
    return values[nearest(values, kernel)]


def linear_scale(matrix: np.ndarray, bits: int) -> np.ndarray:
    """The step of each column (1, n_out): its largest weight is a whole
    number of steps, `2^(bits - 1) - 1` of them."""
    largest = np.abs(matrix).max(axis=0, keepdims=True)
    return np.maximum(largest, 1e-30) / (2 ** (bits - 1) - 1)


def quantize_linear(matrix: np.ndarray, bits: int) -> np.ndarray:
    """`s_j round(K_ij / s_j)` with the step s_j of `linear_scale`."""
    scale = linear_scale(matrix, bits)
    return np.round(matrix / scale) * scale
