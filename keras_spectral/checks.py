"""Checks of arguments, with errors that say what was expected."""

import math
import numbers
from typing import Any

_LAST_SEED = 2**31


def check_rank(rank, name="rank"):
    """Raises unless `rank` is a whole number above zero."""
    whole = isinstance(rank, numbers.Integral) and not isinstance(rank, bool)
    if not whole or rank < 1:
        raise ValueError(
            f"Received {name}={rank!r}. Expected a whole number of at least "
            "1, such as 8."
        )


def check_number(value, name, low=-math.inf, high=math.inf):
    """Raises unless `value` is a number with `low <= value < high`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value < high:
        raise ValueError(
            f"Received {name}={value!r}. Expected a number with "
            f"{low} <= {name} < {high}."
        )


def check_choice(value, name, choices):
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"Received {name}={value!r}. Expected one of {list(choices)}."
        )


def check_whole(
    value: Any, name: str, low: int = 0, high: float = math.inf
) -> int:
    """Raises unless `value` is a whole number with `low <= value < high`."""
    if not is_whole(value) or not low <= value < high:
        above = "" if high == math.inf else f" and below {high}"
        raise ValueError(
            f"Received {name}={value!r}. Expected a whole number of at least "
            f"{low}{above}."
        )
    return int(value)


def check_flag(value: Any, name: str) -> bool:
    """Raises unless `value` is True or False."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"Received {name}={value!r}. Expected True or False.")
    return bool(value)


def check_seed(seed: Any, name: str = "seed") -> int | None:
    """Raises unless `seed` is None or a whole number that backends take."""
    if seed is None:
        return None
    if not is_whole(seed) or not 0 <= seed < _LAST_SEED:
        raise ValueError(
            f"Received {name}={seed!r}. Expected a whole number from 0 to "
            f"{_LAST_SEED - 1}, or None."
        )
    return int(seed)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_small(dtype) -> bool:
    """Whether a dtype has 16 bits, too few for steps of an optimizer."""
    return dtype in ("bfloat16", "float16")
