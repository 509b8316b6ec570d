"""Reads adapter files, of which nothing is trusted."""

import collections
import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors

from keras_spectral._internal.checks import check_adapter_name
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import did_you_mean
from keras_spectral.saving.checksum import check_values_form
from keras_spectral.saving.naming import entry_slot
from keras_spectral.saving.naming import head_slot

FORMAT = "keras_spectral.adapters"
VERSION = 2
_FIRST = "default"  # the name of what a file of version 1 holds


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
    return _present_names(tensors, metadata), metadata


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
    version = metadata.get("format_version")
    if version not in ("1", str(VERSION)):
        raise ValueError(
            f"{path} has format version {version!r}; this keras_spectral reads "
            f"versions 1 and {VERSION}. Upgrade it."
        )
    metadata = dict(metadata)
    try:
        for name in ("adapters", "trainable", "values", "strengths"):
            if name in metadata or name in ("adapters", "trainable"):
                metadata[name] = json.loads(metadata[name])
        metadata["base"]
        if version == "1":
            _name_all(metadata)
        _check_entries(metadata["adapters"])
        _check_heads(metadata["trainable"], metadata["adapters"])
        _check_strengths(metadata.setdefault("strengths", {}))
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
    kinds = {"path": str, "adapter": str, "method": str, "options": dict}
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
        check_adapter_name(entry["adapter"])
    _check_once([(e["path"], e["adapter"], e["method"]) for e in entries])


def _check_heads(heads, entries):
    """Raises unless heads name trained layers of known adapters, each once."""
    names = {entry["adapter"] for entry in entries}
    if not isinstance(heads, list):
        raise TypeError(f"trainable is {_short(heads)}")
    for head in heads:
        if not isinstance(head, dict) or set(head) != {"path", "adapter"}:
            raise TypeError(f"a trained layer is {_short(head)}")
        if not isinstance(head["path"], str) or head["adapter"] not in names:
            raise TypeError(f"a trained layer is {_short(head)}")
    adapted = {(entry["path"], entry["adapter"]) for entry in entries}
    trained = [(head["path"], head["adapter"]) for head in heads]
    _check_once([*trained, *adapted])


def _check_strengths(strengths):
    """Raises unless they are numbers by name."""
    if not isinstance(strengths, dict):
        raise TypeError(f"strengths is {_short(strengths)}")
    for strength in strengths.values():
        check_number(strength, "strength")


def _name_all(metadata):
    """Gives what a file of version 1 holds the name "default"."""
    for entry in metadata["adapters"]:
        entry["adapter"] = _FIRST
        options = entry["options"]
        if entry["method"] == "unipelt" and "adapter" in options:
            options["bottleneck"] = options.pop("adapter")
    metadata["trainable"] = [
        {"path": key, "adapter": _FIRST} for key in metadata["trainable"]
    ]


def _present_names(tensors, metadata):
    """Tensors of a file of version 1 by the names of version 2."""
    if metadata["format_version"] != "1":
        return tensors
    slots = {entry["path"]: entry_slot(entry) for entry in metadata["adapters"]}
    slots |= {head["path"]: head_slot(head) for head in metadata["trainable"]}
    renamed = {}
    for name, tensor in tensors.items():
        key, _, weight = name.rpartition("/")
        renamed[f"{slots.get(key, key)}/{weight}"] = tensor
    return renamed


def chosen(
    tensors: dict[str, np.ndarray],
    metadata: dict[str, Any],
    adapter: str | list[str] | None,
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Of what `read_adapters` gave some adapters, or one by another name.

    Args:
        tensors: By name.
        metadata: Decoded.
        adapter: A list picks names. A string renames the file's only adapter.
            None is all.
        path: The file, for messages.
    """
    if adapter is None:
        return tensors, metadata
    names = list(dict.fromkeys(e["adapter"] for e in metadata["adapters"]))
    if isinstance(adapter, str):
        check_adapter_name(adapter)
        if len(names) > 1:
            raise ValueError(
                f"{path} holds the adapters {names}. Expected a file of one "
                f"for adapter={adapter!r}; `adapter=[...]` picks some of "
                "these by name."
            )
        wanted = {names[0]: adapter}
    else:
        wanted = {name: name for name in adapter}
        missing = [name for name in wanted if name not in names]
        if missing or not wanted:
            raise ValueError(
                f"Received adapter={adapter!r}. {path} holds {names}. Expected "
                "some of these." + did_you_mean((missing or [""])[0], names)
            )
    moved, kept = {}, {}
    for part, where in (("adapters", entry_slot), ("trainable", head_slot)):
        kept[part] = []
        for item in metadata[part]:
            if item["adapter"] in wanted:
                new = {**item, "adapter": wanted[item["adapter"]]}
                moved[where(item)] = where(new)
                kept[part].append(new)
    shared = {e["shared"] for e in kept["adapters"] if "shared" in e}
    moved |= {f"shared/{n}": f"shared/{n}" for n in shared}
    picked = {}
    for name, tensor in tensors.items():
        start, _, weight = name.rpartition("/")
        if start in moved:
            picked[f"{moved[start]}/{weight}"] = tensor
    strengths = metadata["strengths"]
    strengths = {wanted[n]: s for n, s in strengths.items() if n in wanted}
    strengths = strengths if len(wanted) > 1 else {}
    return picked, {**metadata, **kept, "strengths": strengths}


def _check_once(keys):
    for key, count in collections.Counter(keys).items():
        if count > 1:
            raise ValueError(f"{key[0]!r} is listed twice")


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else text[:76] + " ..."
