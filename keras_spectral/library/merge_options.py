"""The methods of merges, and checks of what they are given."""

import numbers
from collections.abc import Sequence

import numpy as np

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank

PAIR_METHODS = (
    "cat",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
)
DELTA_METHODS = ("svd", *(f"{name}_svd" for name in PAIR_METHODS[2:]))
METHODS = PAIR_METHODS + DELTA_METHODS
SIGNS = ("total", "frequency")


def check_options(
    method: str,
    density: float | None = None,
    sign: str = "total",
    methods: Sequence[str] = METHODS,
) -> None:
    """Raises unless the options of a merge fit together."""
    check_choice(method, "method", methods)
    check_choice(sign, "sign", SIGNS)
    if method in ("cat", "linear", "svd"):
        if density is not None:
            raise ValueError(
                f"Received density={density!r} with method={method!r}, which "
                "prunes nothing. Expected None, or a method that prunes, such "
                "as 'ties_svd'."
            )
        return
    real = isinstance(density, numbers.Real) and not isinstance(density, bool)
    if not real or not 0 < density <= 1:
        raise ValueError(
            f"Received density={density!r} with method={method!r}. Expected "
            "the share of entries that stay, a number above 0 and at most 1 "
            "(which prunes nothing), such as 0.5."
        )


def check_weights(weights: Sequence[float], count: int) -> list[float]:
    """Raises unless there is a finite weight for each of `count` adapters."""
    if not isinstance(weights, Sequence | np.ndarray) or not count:
        raise ValueError(
            f"Received {count} adapters with weights={weights!r}. Expected at "
            "least one adapter, and a list with a number for each."
        )
    if len(weights) != count:
        raise ValueError(
            f"Received {len(weights)} weights for {count} adapters. Expected "
            "one for each."
        )
    return [float(check_number(w, "weight")) for w in weights]


def finite_matrices(parts, name):
    """Float32 matrices of what was given, all of them finite."""
    parts = [np.asarray(part, "float32") for part in parts]
    for part in parts:
        if part.ndim != 2 or not np.isfinite(part).all():
            raise ValueError(
                f"Received {name} of shape {part.shape}. Expected a matrix "
                "of finite numbers."
            )
    return parts


def check_pairs(many_a, many_b, method):
    """Raises unless the pairs change one kernel and fit the method."""
    for a, b in zip(many_a, many_b):
        if a.shape[1] != len(b):
            raise ValueError(
                f"Received A of shape {a.shape} with B of shape {b.shape}. "
                "Expected (n_in, r) with (r, n_out)."
            )
    kernels = [(len(a), b.shape[1]) for a, b in zip(many_a, many_b)]
    check_alike(kernels, "shapes of changes")
    ranks = [len(b) for b in many_b]
    if method != "cat" and len(set(ranks)) > 1:
        raise ValueError(
            f"Received ranks {ranks}. Expected equal ones for method="
            f"{method!r}, which works on factors. Use 'cat', 'svd' or another "
            "method whose name ends in 'svd', which take any ranks."
        )


def check_alike(kinds, what):
    """Raises unless all are equal."""
    if len(set(kinds)) > 1:
        raise ValueError(f"Received {what} {kinds}. Expected equal ones.")


def check_fits(rank, shape):
    """Raises unless a matrix of that shape has the rank."""
    if check_rank(rank) > min(shape):
        raise ValueError(
            f"Received rank={rank} for a change of shape {shape}. Expected "
            f"at most {min(shape)}."
        )
