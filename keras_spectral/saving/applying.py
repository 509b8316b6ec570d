"""Gives a model what an adapter file holds, all or nothing."""

import json
import os
import warnings

import keras
import numpy as np

from keras_spectral._internal.layer_tools import own_variables
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.layers import METHODS
from keras_spectral.layers import AdapterLayer
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.wrap import wrap_places
from keras_spectral.saving.checksum import check_base_values
from keras_spectral.saving.fresh import connect_as_saved
from keras_spectral.saving.fresh import give_placeholders
from keras_spectral.saving.fresh import let_go
from keras_spectral.saving.fresh import limit_to_tensors
from keras_spectral.saving.naming import fingerprint
from keras_spectral.saving.naming import is_close
from keras_spectral.saving.naming import named_weights

_WITHOUT_HEAD = (
    "For models that differ in their heads only, such as in the number of "
    "classes, save the backbone's adapters: `save_adapters(model.backbone, "
    "path)`, then `load_adapters(model.backbone, path)`."
)


def apply_adapters(
    model: keras.Model,
    tensors: dict[str, np.ndarray],
    metadata: dict,
    path: str | os.PathLike,
    strict: bool = True,
) -> keras.Model:
    """Does what `load_adapters` does with what `read_adapters` gave."""
    found = places(model)
    if metadata["base"] != fingerprint(found):
        raise ValueError(
            f"{path} belongs to another model: layer names or shapes of "
            f"'{model.name}' differ from those that the adapters were trained "
            f"on. {_difference(found, tensors, metadata)}"
        )
    by_key = {place.key: place for place in found}
    entries = _check_entries(metadata["adapters"], by_key, path)
    heads = [by_key[key] for key in _known(metadata["trainable"], by_key, path)]
    wrapped = {p.key: p for p in found if isinstance(p.layer, AdapterLayer)}
    if wrapped:
        _check_same(entries, wrapped, path)
    names = set(tensors)
    doubt = check_base_values(found, metadata, names, path, strict)
    scales = None
    if "values" in metadata:  # files of version 0.1 do not tell them
        scales = {e["path"]: e.get("scale") for e in entries}
    if wrapped:
        with all_or_nothing() as snapshot:
            targets = [*wrapped.values(), *heads]
            _fill(targets, tensors, path, scales, snapshot)
    else:
        _wrap_and_fill(model, by_key, entries, heads, tensors, path, scales)
    if doubt is not None:
        warnings.warn(doubt, stacklevel=3)
    return model


def _wrap_and_fill(model, by_key, entries, heads, tensors, path, scales):
    """Wraps a plain model as a file says and gives it the file's tensors."""
    requests = [
        (by_key[e["path"]], METHODS[e["method"]], e["options"]) for e in entries
    ]

    limited = []

    def fill(made):
        let_go(limited)
        wanted = [*(place for place, _, _ in requests), *heads]
        _fill(
            [Place(p.path, p.key, made.get(p.layer, p.layer)) for p in wanted],
            tensors,
            path,
            scales,
        )

    def prepare(adapters):
        give_placeholders(adapters)
        numbers = [e.get("shared") for e in entries]
        connect_as_saved(adapters, numbers)
        for adapter, entry in zip(adapters, entries):
            limited.append(adapter)
            limit_to_tensors(adapter, entry["path"], tensors, path)
            if adapter.shared is not None:
                limited.append(adapter.shared)
                name = f"shared/{entry['shared']}"
                limit_to_tensors(adapter.shared, name, tensors, path)

    try:
        wrap_places(model, requests, heads, prepare, fill)
    except (TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{path} has options that no adapter takes ({error})."
        ) from error


def _fill(targets, tensors, path, scales, snapshot=None):
    variables = named_weights(targets)
    missing = sorted(variables.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - variables.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} does not hold exactly the adapters' tensors: missing "
            f"{missing[:4]}, unexpected {unexpected[:4]}."
        )
    for name, variable in variables.items():
        if tuple(tensors[name].shape) != tuple(variable.shape):
            raise ValueError(
                f"{path}: tensor '{name}' has shape {tensors[name].shape}, "
                f"the model needs {tuple(variable.shape)}."
            )
    for place in targets if scales is not None else ():
        if isinstance(place.layer, AdapterLayer):
            _check_scale(place, variables, tensors, scales, path)
    if snapshot is not None:
        snapshot.keep_values(variables.values())
    for name, variable in variables.items():
        variable.assign(tensors[name])


def _check_entries(entries, by_key, path):
    _known([entry["path"] for entry in entries], by_key, path)
    for entry in entries:
        if entry["method"] not in METHODS:
            raise ValueError(
                f"{path} needs method {entry['method']!r}, which is not "
                f"registered. Known: {sorted(METHODS)}. Import the module "
                "that defines it, or upgrade keras_spectral."
            )
        known = METHODS[entry["method"]].option_names()
        unknown = sorted(entry["options"].keys() - set(known))
        if unknown:
            raise ValueError(
                f"{path} gives method {entry['method']!r} the options "
                f"{unknown}, which it lacks. Known: {known}."
            )
    return entries


def _known(keys, by_key, path):
    for key in keys:
        if key not in by_key:
            raise ValueError(f"{path} names '{key}', which the model lacks.")
    return keys


def _check_same(entries, wrapped, path):
    saved = {e["path"]: (e["method"], e["options"]) for e in entries}
    present = {
        key: (place.layer.method, _through_json(place.layer.options()))
        for key, place in wrapped.items()
    }
    for key in sorted(saved.keys() | present.keys()):
        if saved.get(key) != present.get(key):
            raise ValueError(
                f"{path} does not fit the wrapped model at '{key}': the file "
                f"has {saved.get(key)}, the model {present.get(key)}. Wrap "
                "the model in the same way, or `unwrap_model` it and load."
            )


def _through_json(options):
    return json.loads(json.dumps(options))


def _check_scale(place, variables, tensors, scales, path):
    """Raises if a stored scale is not what the adapter's options make it."""
    expected = scales[place.key]
    if expected is None:
        expected = place.layer.initial_scale()
    for name, variable in variables.items():
        stored = variable is place.layer.scale and float(tensors[name])
        if stored is not False and not is_close(stored, expected):
            raise ValueError(
                f"{path}: the scale of '{place.key}' is {stored:g}, but its "
                f"options say {expected:g}. The file was changed by hand or is "
                "damaged."
            )


def _difference(found, tensors, metadata):
    """What differs between a model and the file's, as far as one can see."""
    by_key = {place.key: place.layer for place in found}
    for key in metadata["trainable"]:
        own = own_variables(by_key[key]) if key in by_key else []
        for variable in own:
            saved = tensors.get(f"{key}/{variable.name}")
            if saved is not None and saved.shape != tuple(variable.shape):
                return (
                    f"'{key}/{variable.name}' has shape {saved.shape} in the "
                    f"file and {tuple(variable.shape)} in the model. "
                    + _WITHOUT_HEAD
                )
    some = f"The file has adapters for {_first(metadata['adapters'])}."
    return f"{some} {_WITHOUT_HEAD}"


def _first(entries):
    paths = [str(entry.get("path")) for entry in entries[:4]]
    more = len(entries) - len(paths)
    return ", ".join(paths) + (f" and {more} more" if more else "")
