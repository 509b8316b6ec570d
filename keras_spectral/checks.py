"""Checks of arguments, with errors that say what was expected."""

import math
import numbers


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


def is_small(dtype) -> bool:
    """Whether a dtype has 16 bits, too few for steps of an optimizer."""
    return dtype in ("bfloat16", "float16")
