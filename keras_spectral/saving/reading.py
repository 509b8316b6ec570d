"""Reads adapter files, of which nothing is trusted."""

import collections
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors

from keras_spectral.saving.checksum import check_values_form

FORMAT = "keras_spectral.adapters"
VERSION = 1


def read_adapters(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of an adapter file and its checked, decoded metadata."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no adapter file {path}.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            kinds = {n: file.get_slice(n).get_dtype() for n in names}
            other = {n: kind for n, kind in kinds.items() if kind != "F32"}
            tensors = {n: file.get_tensor(n) for n in names if not other}
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). It may be "
            "damaged or of another kind; save it again with `save_adapters`."
        ) from error
    metadata = _decoded(metadata, path)
    for name, kind in other.items():
        raise ValueError(
            f"{path}: tensor '{name}' is of type {kind}. Expected F32 "
            "(float32), which `save_adapters` writes."
        )
    check_finite(tensors, path)
    return tensors, metadata


def check_finite(
    tensors: dict[str, np.ndarray], path: str | os.PathLike
) -> None:
    """Raises a ValueError if a tensor holds NaN or infinities."""
    for name, tensor in tensors.items():
        if not np.all(np.isfinite(tensor)):
            raise ValueError(
                f"{path}: tensor '{name}' holds NaN or infinite values. The "
                "training probably diverged; expected adapters from before."
            )


def _decoded(metadata, path):
    """The metadata with its JSON read, if it is that of an adapter file."""
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not one of keras_spectral: "
            f"format={metadata.get('format')!r}, expected {FORMAT!r}."
        )
    if metadata.get("format_version") != str(VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')!r}; "
            f"this keras_spectral reads version {VERSION}. Upgrade it."
        )
    metadata = dict(metadata)
    try:
        for name in ("adapters", "trainable", "values"):
            if name in metadata or name != "values":
                metadata[name] = json.loads(metadata[name])
        metadata["base"]
        _check_entries(metadata["adapters"])
        _check_keys(metadata["trainable"], metadata["adapters"])
        if "values" in metadata:
            check_values_form(metadata["values"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} has damaged metadata: {error!r}.") from error
    except RecursionError as error:
        raise ValueError(
            f"{path} has damaged metadata: JSON that is nested too deeply."
        ) from error
    return metadata


def _check_entries(entries):
    """Raises unless there is one well-formed entry for each adapter."""
    kinds = {"path": str, "method": str, "options": dict}
    optional = {"shared": int, "scale": int | float}
    if not isinstance(entries, list) or not entries:
        raise TypeError("no list of adapters")
    for entry in entries:
        if not isinstance(entry, dict):
            raise TypeError(f"an adapter is {_short(entry)}")
        for name, kind in (kinds | optional).items():
            if name in optional and entry.get(name) is None:
                continue
            value = entry[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise TypeError(f"{name} is {_short(value)}")
    _check_once([entry["path"] for entry in entries])


def _check_keys(keys, entries):
    """Raises unless keys name trained layers, each once."""
    if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise TypeError(f"trainable is {_short(keys)}")
    _check_once([*keys, *(entry["path"] for entry in entries)])


def _check_once(keys):
    for key, count in collections.Counter(keys).items():
        if count > 1:
            raise ValueError(f"{key!r} is listed twice")


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else text[:76] + " ..."
