"""Gives a model what an adapter file holds, all or nothing."""

import json
import os
import warnings

import keras
import numpy as np

from keras_spectral._internal.layer_tools import own_variables
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.layers import METHODS
from keras_spectral.layers.host import Host
from keras_spectral.layers.trained_copy import NamedCopy
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import names_in
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.placing import Request
from keras_spectral.model.placing import wrap_places
from keras_spectral.saving.checksum import check_base_values
from keras_spectral.saving.fresh import connect_as_saved
from keras_spectral.saving.fresh import give_placeholders
from keras_spectral.saving.fresh import let_go
from keras_spectral.saving.fresh import limit_to_tensors
from keras_spectral.saving.naming import entry_slot
from keras_spectral.saving.naming import fingerprint
from keras_spectral.saving.naming import head_slot
from keras_spectral.saving.naming import is_close
from keras_spectral.saving.naming import named_weights
from keras_spectral.saving.naming import slot

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
    heads = metadata["trainable"]
    _known([head["path"] for head in heads], by_key, path)
    present = names_in(model)
    old = [e for e in entries if e["adapter"] in present]
    new = [e for e in entries if e["adapter"] not in present]
    old_heads = [h for h in heads if h["adapter"] in present]
    new_heads = [h for h in heads if h["adapter"] not in present]
    _check_same(old, model, path)
    doubt = check_base_values(found, metadata, set(tensors), path, strict)
    scales = None
    if "values" in metadata:  # files of version 0.1 do not tell them
        scales = {entry_slot(e): e.get("scale") for e in entries}
    left = dict(tensors)
    with all_or_nothing() as snapshot:
        if old:
            adapters, trained = _targets(model, old, old_heads)
            _fill(adapters, trained, left, path, scales, not new, snapshot)
        if new:
            kept = [(by_key[h["path"]], h["adapter"]) for h in new_heads]
            _wrap_and_fill(
                model, by_key, new, kept, left, path, scales, metadata
            )
    if doubt is not None:
        warnings.warn(doubt, stacklevel=3)
    return model


def requests_of(entries: list[dict], by_key: dict[str, Place]) -> list[Request]:
    """Turns descriptions of adapters into requests to `wrap_places`."""
    return [
        Request(
            by_key[e["path"]], METHODS[e["method"]], e["options"], e["adapter"]
        )
        for e in entries
    ]


def _targets(model, entries, heads):
    """Where adapters and trained layers are that a file describes."""
    names = {entry["adapter"] for entry in entries}
    adapters = adapter_places(model, names=names)
    by_key = {place.key: place for place in places(model)}
    trained = []
    for head in heads:
        place = by_key[head["path"]]
        held = place.layer.members() if isinstance(place.layer, Host) else []
        for member in held:
            if member.adapter_name == head["adapter"]:
                place = Place(place.path, place.key, member)
        trained.append((place, head["adapter"]))
    return adapters, trained


def _wrap_and_fill(model, by_key, entries, kept, left, path, scales, metadata):
    """Puts what a file describes into a model and gives it its tensors."""
    limited = []

    def fill(made):
        let_go(limited)
        adapters = [p for p in made if not isinstance(p.layer, NamedCopy)]
        copies = {
            (p.key, p.layer.adapter_name): p
            for p in made
            if isinstance(p.layer, NamedCopy)
        }
        trained = [
            (copies.get((place.key, name), place), name) for place, name in kept
        ]
        _fill(adapters, trained, left, path, scales, True)
        for place in made:
            name = place.layer.adapter_name
            strength = metadata.get("strengths", {}).get(name, 1.0)
            place.layer.set_strength(strength)

    def prepare(adapters):
        give_placeholders(adapters)
        numbers = [e.get("shared") for e in entries]
        connect_as_saved(adapters, numbers)
        for adapter, entry in zip(adapters, entries):
            limited.append(adapter)
            limit_to_tensors(adapter, entry_slot(entry), left, path)
            if adapter.shared is not None:
                limited.append(adapter.shared)
                name = f"shared/{entry['shared']}"
                limit_to_tensors(adapter.shared, name, left, path)

    try:
        wrap_places(model, requests_of(entries, by_key), kept, prepare, fill)
    except (TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{path} has options that no adapter takes ({error})."
        ) from error


def _fill(adapters, heads, left, path, scales, last, snapshot=None):
    """Gives weights their tensors, and takes these out of `left`.

    What is `last` leaves none there.
    """
    variables = named_weights(adapters, heads)
    missing = sorted(variables.keys() - left.keys())
    unexpected = sorted(left.keys() - variables.keys())
    if missing or (last and unexpected):
        raise ValueError(
            f"{path} does not hold exactly the adapters' tensors: missing "
            f"{missing[:4]}, unexpected {unexpected[:4]}."
        )
    for name, variable in variables.items():
        if tuple(left[name].shape) != tuple(variable.shape):
            raise ValueError(
                f"{path}: tensor '{name}' has shape {left[name].shape}, "
                f"the model needs {tuple(variable.shape)}."
            )
    for place in adapters if scales is not None else ():
        _check_scale(place, variables, left, scales, path)
    if snapshot is not None:
        snapshot.keep_values(variables.values())
    for name, variable in variables.items():
        variable.assign(left.pop(name))


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


def _check_same(entries, model, path):
    """Raises unless adapters of known names are those that a file has."""
    names = {entry["adapter"] for entry in entries}
    saved = {entry_slot(e): e["options"] for e in entries}
    present = {
        slot(p.key, p.layer.adapter_name, p.layer.method): _through_json(
            p.layer.options()
        )
        for p in adapter_places(model, names=names)
    }
    for key in sorted(saved.keys() | present.keys()):
        if saved.get(key) != present.get(key):
            raise ValueError(
                f"{path} does not fit the wrapped model at '{key}' (its path, "
                f"adapter and method): the file has {saved.get(key)}, the "
                f"model {present.get(key)}. Wrap the model in the same way, "
                "`unwrap_model` it and load, or give the file's adapter "
                "another name (`adapter=`)."
            )


def _through_json(options):
    return json.loads(json.dumps(options))


def _check_scale(place, variables, tensors, scales, path):
    """Raises if a stored scale is not what the adapter's options make it."""
    layer = place.layer
    expected = scales[slot(place.key, layer.adapter_name, layer.method)]
    if expected is None:
        expected = place.layer.initial_scale()
    for name, variable in variables.items():
        stored = variable is place.layer.adapter_scale and float(tensors[name])
        if stored is not False and not is_close(stored, expected):
            raise ValueError(
                f"{path}: the scale of '{place.key}' is {stored:g}, but its "
                f"options say {expected:g}. The file was changed by hand or is "
                "damaged."
            )


def _difference(found, tensors, metadata):
    """Says how a model differs from the file's, as far as one can see."""
    by_key = {place.key: place.layer for place in found}
    for head in metadata["trainable"]:
        key = head["path"]
        own = own_variables(subject(by_key[key])) if key in by_key else []
        for variable in own:
            saved = tensors.get(f"{head_slot(head)}/{variable.name}")
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
