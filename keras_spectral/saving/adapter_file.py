"""One safetensors file: adapters, their configuration, and trained heads."""

import hashlib
import json
import os
import pathlib

import keras
import numpy as np
import safetensors

from keras_spectral._files import write_safetensors
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.kernels import kernel_view
from keras_spectral.layers import METHODS
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers.host import TrainedCopy
from keras_spectral.paths import Place
from keras_spectral.paths import places
from keras_spectral.paths import subject
from keras_spectral.spectra import Triplets
from keras_spectral.surgery import own_variables
from keras_spectral.wrap import require_adapters
from keras_spectral.wrap import wrap_places

_FORMAT = "keras_spectral.adapters"
_VERSION = 1


def save_adapters(model: keras.Model, path: str | os.PathLike) -> None:
    """Saves a model's adapters, and the layers that train beside them.

    The file is safetensors: a float32 tensor for each weight, and in its
    metadata the format and its version, each adapter's place, method and
    options, the places of trained heads, and a fingerprint of the base
    (names and shapes). The base's own weights are not in it.

    Args:
        model: A wrapped model.
        path: The file; an existing one is replaced, whole or not at all.

    Raises:
        ValueError: The model has no adapters, or they are switched off.
    """
    if any(adapter.disabled for adapter in require_adapters(model)):
        raise ValueError(
            f"The adapters of model '{model.name}' are switched off. Expected "
            "active ones: leave the `adapters_disabled` block, then save."
        )
    found = places(model)
    adapters = [p for p in found if isinstance(p.layer, AdapterLayer)]
    heads = [p for p in found if _trains_itself(p.layer)]
    entries = _entries(adapters)
    metadata = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "adapters": json.dumps(entries),
        "trainable": json.dumps([place.key for place in heads]),
        "base": _fingerprint(found),
    }
    named = _named_weights([*adapters, *heads])
    tensors = {name: _to_numpy(variable) for name, variable in named.items()}
    write_safetensors(tensors, path, metadata)


def load_adapters(model: keras.Model, path: str | os.PathLike) -> keras.Model:
    """Loads an adapter file into a model, which is wrapped first if plain.

    Loading is strict and all or nothing: after an error the model is as it
    was.

    Args:
        model: The base model that the adapters were trained on, plain, or
            wrapped with the same methods, places and options.
        path: A file that `save_adapters` wrote.

    Returns:
        The model.

    Raises:
        ValueError: The file is no adapter file or damaged, belongs to another
            model, or has missing, unexpected or differently shaped tensors.
        FileNotFoundError: There is no such file.
    """
    tensors, metadata = read_adapters(path)
    return apply_adapters(model, tensors, metadata, path)


def apply_adapters(
    model: keras.Model,
    tensors: dict[str, np.ndarray],
    metadata: dict,
    path: str | os.PathLike,
) -> keras.Model:
    """Does what `load_adapters` does with what `read_adapters` gave."""
    found = places(model)
    if metadata["base"] != _fingerprint(found):
        raise ValueError(
            f"{path} belongs to another model: layer names or shapes of "
            f"'{model.name}' differ from those that the adapters were trained "
            f"on. The file has adapters for {_first(metadata['adapters'])}."
        )
    by_key = {place.key: place for place in found}
    entries = _check_entries(metadata["adapters"], by_key, path)
    heads = [by_key[key] for key in _known(metadata["trainable"], by_key, path)]
    wrapped = {p.key: p for p in found if isinstance(p.layer, AdapterLayer)}
    if wrapped:
        _check_same(entries, wrapped, path)
        with all_or_nothing() as snapshot:
            _fill([*wrapped.values(), *heads], tensors, path, snapshot)
        return model
    requests = [
        (by_key[e["path"]], METHODS[e["method"]], e["options"]) for e in entries
    ]

    def fill(made):
        wanted = [*(place for place, _, _ in requests), *heads]
        _fill(
            [Place(p.path, p.key, made.get(p.layer, p.layer)) for p in wanted],
            tensors,
            path,
        )

    def prepare(adapters):
        _give_placeholders(adapters)
        _connect_as_saved(adapters, [e.get("shared") for e in entries])

    wrap_places(model, requests, heads, prepare, fill)
    return model


def describe_adapters(model: keras.Model) -> dict:
    """What adapts a model, as JSON can hold it."""
    found = places(model)
    adapters = [p for p in found if isinstance(p.layer, AdapterLayer)]
    heads = [p for p in found if isinstance(p.layer, TrainedCopy)]
    return {
        "adapters": _entries(adapters),
        "trainable": [place.key for place in heads],
    }


def adapt_as_described(model: keras.Model, description: dict) -> keras.Model:
    """Wraps a plain model as `describe_adapters` said, with fresh weights."""
    by_key = {place.key: place for place in places(model)}
    entries = description["adapters"]
    requests = [
        (by_key[e["path"]], METHODS[e["method"]], e["options"]) for e in entries
    ]
    kept = [by_key[key] for key in description["trainable"]]

    def prepare(adapters):
        _give_placeholders(adapters)
        _connect_as_saved(adapters, [e.get("shared") for e in entries])

    wrap_places(model, requests, kept, prepare)
    return model


def _give_placeholders(adapters):
    """Spares the work of factorising kernels whose factors the file has."""
    for adapter in adapters:
        view = adapter.view_of(adapter.layer)
        count = adapter.triplets_needed(view)
        if count:
            shapes = ((view.n_in, count), (count,), (view.n_out, count))
            zeros = (np.zeros(shape, "float32") for shape in shapes)
            adapter.give_triplets(Triplets(*zeros))


def _connect_as_saved(adapters, numbers):
    """Lets those adapters share a layer that shared one in the file."""
    for number in {n for n in numbers if n is not None}:
        group = [a for a, n in zip(adapters, numbers) if n == number]
        type(group[0]).connect(group)


def _trains_itself(layer):
    return not isinstance(layer, AdapterLayer) and any(
        variable.trainable for variable in own_variables(layer)
    )


def _entries(adapters):
    """What the file says of each adapter."""
    numbers = _shared_numbers(adapters)
    entries = []
    for place in adapters:
        layer = place.layer
        entry = {
            "path": place.key,
            "method": layer.method,
            "options": layer.options(),
        }
        if layer.shared is not None:
            entry["shared"] = numbers[id(layer.shared)]
        entries.append(entry)
    return entries


def _shared_numbers(found):
    """Numbers the layers that adapters share, in the order of the places."""
    numbers = {}
    for place in found:
        shared = getattr(place.layer, "shared", None)
        if isinstance(place.layer, AdapterLayer) and shared is not None:
            numbers.setdefault(id(shared), len(numbers))
    return numbers


def _named_weights(found):
    """Layers' own weights by name in the file, random state left out."""
    named = {}
    numbers = _shared_numbers(found)
    for place in found:
        own = {}
        for variable in own_variables(place.layer):
            name = f"{place.key}/{variable.name}"
            while name in own:
                name += "_"
            own[name] = variable
        named |= own
        if isinstance(place.layer, AdapterLayer) and place.layer.shared:
            number = numbers[id(place.layer.shared)]
            for variable in own_variables(place.layer.shared):
                named[f"shared/{number}/{variable.name}"] = variable
    return named


def _to_numpy(variable):
    value = keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32"))
    return np.asarray(value, order="C")


def _fingerprint(found):
    """A hash of every base weight's name and shape."""
    lines = []
    for place in found:
        layer = place.layer
        base = subject(layer)
        try:
            view = kernel_view(base)
            lines.append(f"{place.key} {view.n_in} {view.n_out}")
        except ValueError:
            for variable in own_variables(base):
                shape = tuple(variable.shape)
                lines.append(f"{place.key}/{variable.name} {shape}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def read_adapters(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors of an adapter file and its checked, decoded metadata."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no adapter file {path}.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). It may be "
            "damaged or of another kind; save it again with `save_adapters`."
        ) from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but not one of keras_spectral: "
            f"format={metadata.get('format')!r}, expected {_FORMAT!r}."
        )
    if metadata.get("format_version") != str(_VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')!r}; "
            f"this keras_spectral reads version {_VERSION}. Upgrade it."
        )
    try:
        metadata["adapters"] = json.loads(metadata["adapters"])
        metadata["trainable"] = json.loads(metadata["trainable"])
        _check_metadata(metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has damaged metadata: {error!r}.") from error
    return tensors, metadata


def _check_metadata(metadata):
    """Raises unless the JSON holds what `save_adapters` writes."""
    fields = {"path": str, "method": str, "options": dict}
    for entry in metadata["adapters"]:
        for name, kind in fields.items():
            if not isinstance(entry[name], kind):
                raise TypeError(f"{name} is {entry[name]!r}")
    if not isinstance(metadata["trainable"], list):
        raise TypeError(f"trainable is {metadata['trainable']!r}")
    metadata["base"]


def _first(entries):
    paths = [str(entry.get("path")) for entry in entries[:4]]
    more = len(entries) - len(paths)
    return ", ".join(paths) + (f" and {more} more" if more else "")


def _known(keys, by_key, path):
    for key in keys:
        if key not in by_key:
            raise ValueError(f"{path} names '{key}', which the model lacks.")
    return keys


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


def _fill(targets, tensors, path, snapshot=None):
    variables = _named_weights(targets)
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
    if snapshot is not None:
        snapshot.keep_values(variables.values())
    for name, variable in variables.items():
        variable.assign(tensors[name])
