"""Checks of arguments, with errors that say what was expected.

Those of numbers return plain Python values, which files and configurations
can hold.
"""

import difflib
import hashlib
import math
import numbers
import os
import re
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import keras

_LAST_SEED = 2**31
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def check_rank(rank: Any, name: str = "rank") -> int:
    """Raises unless `rank` is a whole number above zero."""
    if not is_whole(rank) or rank < 1:
        raise ValueError(
            f"Received {name}={rank!r}. Expected a whole number of at least "
            "1, such as 8."
        )
    return int(rank)


def check_adapter_name(name: Any) -> str:
    """Raises unless `name` can name an adapter: in paths and in files."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"Received adapter={name!r}. Expected a name of letters, digits, "
            "'_', '-' and '.', such as 'mrpc'."
        )
    return name


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


def check_number(
    value: Any, name: str, low: float = -math.inf, high: float = math.inf
) -> float:
    """Raises unless `value` is finite, with `low <= value < high`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value < high or abs(value) == math.inf:
        limits = [f"at least {low:g}"] * (low > -math.inf)
        limits += [f"below {high:g}"] * (high < math.inf)
        raise ValueError(
            f"Received {name}={value!r}. Expected a finite number"
            + (", " if limits else "")
            + " and ".join(limits)
            + "."
        )
    return int(value) if is_whole(value) else float(value)


def check_alpha(alpha: Any, name: str = "alpha") -> float:
    """Raises unless `alpha` is a finite number that is not 0."""
    if check_number(alpha, name) == 0:
        raise ValueError(
            f"Received {name}=0. Expected a number that is not 0: nothing "
            "would train."
        )
    return check_number(alpha, name)


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


def check_choice(value: Any, name: str, choices: Iterable) -> Any:
    """Raises unless `value` is one of `choices`, strings or None."""
    choices = list(choices)
    known = value is None or isinstance(value, str)
    if not known or value not in choices:
        raise ValueError(
            f"Received {name}={value!r}. Expected one of {choices}."
            + did_you_mean(value, [c for c in choices if c is not None])
        )
    return value


def check_path(path: Any, name: str = "path") -> Any:
    """Raises unless `path` names a file or a folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"Received {name}={path!r}. Expected a path.")
    return path


def check_mapping(value: Any, name: str, expected: str) -> Mapping:
    """Raises unless `value` is a mapping with something in it."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"Received {name}={value!r}. Expected {expected}.")
    return value


def check_layer(layer: Any, name: str = "layer") -> keras.layers.Layer:
    """Raises unless `layer` is a Keras layer."""
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            f"Received {name}={layer!r}. Expected a Keras layer, such as "
            "keras.layers.Dense(8)."
        )
    return layer


def check_model(model: Any) -> keras.layers.Layer:
    """Raises unless `model` is a Keras model, or a layer that stands in."""
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            f"Received a {type(model).__name__}. Expected a Keras model."
        )
    return model


def activation_name(activation: Any) -> str:
    """The name that stands for an activation in configurations.

    Raises:
        ValueError: It is none of Keras's activations, nor a function that is
            registered.
    """
    name = activation
    if activation is None:
        name = "linear"
    elif callable(activation):
        known = getattr(activation, "__name__", "")
        same = getattr(keras.activations, known, None) is activation
        name = known if same else keras.saving.get_registered_name(activation)
    if not isinstance(name, str) or _activation(name) is None:
        raise ValueError(
            f"Received activation={activation!r}. Expected the name of one of "
            "Keras's activations, such as 'gelu', or a function of "
            "keras.activations or one that is registered by "
            "`keras.saving.register_keras_serializable`, so that files can "
            "name it." + did_you_mean(activation, dir(keras.activations))
        )
    return name


def activation_function(name: str):
    """The function of an `activation_name`."""
    return _activation(activation_name(name))


def _activation(name):
    try:
        return keras.activations.get(name)
    except ValueError:
        return keras.saving.get_registered_object(name)


def derived_seed(seed: int | None, name: str) -> int | None:
    """A seed of its own for each of several starts that share one.

    Two variables of one shape that draw by the same seed hold the same
    numbers. None stays None; a number gives another one for each name, the
    same in every process.
    """
    seed = check_seed(seed)
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % _LAST_SEED


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """The end of a message: the nearest known word, or nothing."""
    near = nearest(word, known)
    return f" Did you mean {near!r}?" if near is not None else ""


def nearest(word: Any, known: Iterable[str], least: float = 0.6) -> str | None:
    """The known word that a mistyped one is nearest to, if one is near.

    Args:
        word: What was given.
        known: What there is.
        least: How similar they have to be, 0 to 1.
    """
    plain = {_plain(k): k for k in reversed(list(known))}
    if not isinstance(word, str):
        return None
    found = difflib.get_close_matches(_plain(word), plain, 1, least)
    return plain[found[0]] if found else None


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _plain(word):
    return word.lower().replace("_", "-").replace(" ", "-")


def is_small(dtype) -> bool:
    """Whether a dtype has 16 bits, too few for steps of an optimizer."""
    return dtype in ("bfloat16", "float16")
