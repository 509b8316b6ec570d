"""How important single weights are: pure functions of their statistics."""

import math

from keras import ops


def sensitivity(importance, uncertainty):
    """`Ibar * Ubar`: smoothed |w g| times its smoothed variation.

    Args:
        importance: Ibar, the moving average of |w g|.
        uncertainty: Ubar, the moving average of | |w g| - Ibar |.
    """
    return importance * uncertainty


def snr(mean, deviation):
    """`|m| / sigma`, the signal-to-noise ratio of a Gaussian weight."""
    return ops.abs(mean) / deviation


def magnitude(mean, deviation):
    """`|m|`."""
    return ops.abs(mean)


def precision(mean, deviation):
    """`1 / sigma`."""
    return 1 / deviation


def snr_abs(mean, deviation):
    """`E|t| / sd|t|` for t ~ N(m, sigma^2).

    With z = |m| / sigma and
    `d = sqrt(2/pi) exp(-z^2/2) - z (1 - erf(z/sqrt 2))`, the mean of |t| is
    sigma (z + d) and its variance sigma^2 (1 - 2 z d - d^2). Unlike the
    difference of squares in the definition, that loses no digits where z is
    large.
    """
    z = ops.abs(mean) / deviation
    tail = 1 - ops.erf(z / math.sqrt(2))
    d = math.sqrt(2 / math.pi) * ops.exp(-ops.square(z) / 2) - z * tail
    return (z + d) / ops.sqrt(1 - 2 * z * d - ops.square(d))


BAYESIAN = {
    "snr": snr,
    "mean": magnitude,
    "precision": precision,
    "snr_abs": snr_abs,
}
CRITERIA = ("sensitivity", *BAYESIAN)
