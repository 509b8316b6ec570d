"""Whether the numbers of a base are those that adapters were trained on."""

import json
import os
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import to_numpy
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.kernels import kernel_view
from keras_spectral.layers.host import Host
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import subject

_ROWS, _COLUMNS = 4, 8  # numbers of each wrapped kernel that are kept
_WEIGHTS, _NUMBERS = 32, 8  # other weights, and numbers of each
_DIGITS = 5
# What rounding may change, relative to the numbers' norm. Numbers of another
# base differ by about 1.4.
_FLOAT, _BYTE, _NIBBLE = 0.005, 0.2, 0.8
# Frozen weights that are factors of the base's kernel.
_OWN_FACTORS = ("u", "start_a")


def base_values(found: list[Place]) -> dict[str, Any]:
    """A few numbers of each wrapped kernel and of some other base weights.

    Layers that train beside the adapters are left out.
    """
    wrapped = [
        p
        for p in found
        if isinstance(p.layer, Host) and not isinstance(p.layer, TrainedCopy)
    ]
    others = sorted(_other_weights(found).items())
    picked = _spread(len(others), _WEIGHTS)
    return {
        "kernels": {
            p.key: _kernel_values(p.layer.layer)
            for p in wrapped
            if has_kernel(p.layer.layer)
        },
        "weights": {
            name: _round(_sample(variable))
            for name, variable in (others[i] for i in picked)
        },
    }


def check_base_values(
    found: list[Place],
    metadata: dict[str, Any],
    names: set[str],
    path: str | os.PathLike,
    strict: bool = True,
) -> str | None:
    """Compares a base with the one that a file's adapters were trained on.

    Args:
        found: The model's places.
        metadata: The file's, decoded; files of version 0.1 hold no values.
        names: Those of the file's tensors.
        path: The file, for messages.
        strict: Whether adapters that hold factors of the kernel itself are
            refused on another one.

    Returns:
        What to warn of, if there is something.
    """
    values = metadata.get("values")
    if values is None:
        return None
    kernels = _differing_kernels(found, values["kernels"])
    weights = _differing_weights(found, values["weights"])
    if not kernels and not weights:
        return None
    shown = [*kernels, *weights]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    message = (
        f"{path} was trained on another base: numbers differ, by more than "
        f"rounding does, at {', '.join(map(repr, shown[:3]))}{more}. Load the "
        "base's own weights into the model first."
    )
    # Names are `key/adapter/method/weight`.
    split = [name.rsplit("/", 3) for name in names]
    own = {parts[0] for parts in split if parts[-1] in _OWN_FACTORS}
    held = [key for key in kernels if key in own]
    if held and strict:
        raise ValueError(
            f"{message} The adapter at {held[0]!r} holds factors of that "
            "base's kernel and is of no use without it; "
            "`load_adapters(..., strict=False)` loads it all the same."
        )
    return message


def check_values_form(values: Any) -> None:
    """Raises a TypeError unless a file's values are such as are written."""
    if not isinstance(values, dict) or set(values) != {"kernels", "weights"}:
        raise TypeError("values")
    for numbers in values["weights"].values():
        _check_numbers(numbers)
    for entry in values["kernels"].values():
        if not isinstance(entry, dict) or set(entry) != {"mode", "numbers"}:
            raise TypeError("values of a kernel")
        if not isinstance(entry["mode"], str | None):
            raise TypeError(f"mode is {entry['mode']!r}")
        _check_numbers(entry["numbers"])


def _check_numbers(numbers):
    kinds = {type(n) for n in numbers} if isinstance(numbers, list) else {str}
    if not kinds <= {int, float} or not np.all(np.isfinite(numbers)):
        raise TypeError("numbers of the base")


def has_kernel(base: keras.layers.Layer) -> bool:
    """Whether a layer is one linear map, and not a block of layers."""
    try:
        kernel_view(base)
    except ValueError:
        return False
    return True


def _kernel_values(base):
    view = kernel_view(base)
    rows = view.rows(_spread(view.n_in, _ROWS))
    rows = ops.take(rows, _spread(view.n_out, _COLUMNS), axis=1)
    numbers = to_numpy(rows).ravel()
    return {"mode": base.quantization_mode, "numbers": _round(numbers)}


def _differing_kernels(found, kernels):
    differing = []
    for place in found:
        base = subject(place.layer)
        if place.key not in kernels or not has_kernel(base):
            continue
        saved, present = kernels[place.key], _kernel_values(base)
        limit = max(_limit(saved["mode"]), _limit(present["mode"]))
        if not _are_near(saved["numbers"], present["numbers"], limit):
            differing.append(place.key)
    return differing


def _differing_weights(found, weights):
    """Names of weights whose numbers differ, where both bases have floats."""
    present = _other_weights(found, weights)
    return [
        name
        for name, variable in present.items()
        if not _are_near(weights[name], _round(_sample(variable)), _FLOAT)
    ]


def _other_weights(found, wanted=None):
    """Frozen floating weights by name, or those of some names.

    What adapters and trained copies hold is not among them.
    """
    named = {}
    for place in found:
        if isinstance(place.layer, Host):
            continue
        own = own_variables(place.layer)
        if wanted is None and any(variable.trainable for variable in own):
            continue  # it trains as it is
        for variable in filter(_is_float, own):
            name = f"{place.key}/{variable.name}"
            if wanted is None or name in wanted:
                named[name] = variable
    return named


def _is_float(variable):
    kind = keras.backend.standardize_dtype(variable.dtype)
    known = ("float64", "float32", "float16", "bfloat16")
    return kind in known and 0 not in variable.shape


def _sample(variable):
    flat = ops.reshape(variable, (-1,))
    numbers = ops.take(flat, _spread(flat.shape[0], _NUMBERS), axis=0)
    return to_numpy(numbers)


def _spread(size, count):
    """Up to `count` places from 0 to `size` - 1, evenly spread."""
    return np.linspace(0, size - 1, min(size, count)).astype(int).tolist()


def _round(numbers):
    finite = np.nan_to_num(numbers)  # or JSON could not hold them
    return [float(f"{float(number):.{_DIGITS}g}") for number in finite]


def _are_near(saved, present, limit):
    if len(saved) != len(present):
        return False
    saved, present = np.float64(saved), np.float64(present)
    size = max(np.linalg.norm(saved), np.linalg.norm(present))
    return bool(np.linalg.norm(saved - present) <= limit * size)


def _limit(mode):
    if mode is None:
        return _FLOAT
    return _BYTE if mode.startswith(("int8", "float8")) else _NIBBLE


def encoded(values: dict[str, Any]) -> str:
    """Values as a file holds them."""
    return json.dumps(values, separators=(",", ":"))
