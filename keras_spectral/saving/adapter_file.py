"""One safetensors file: adapters, their configuration, and trained heads."""

import json
import os

import keras

from keras_spectral._backend import is_first_process
from keras_spectral._backend import to_numpy
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_path
from keras_spectral._internal.files import write_safetensors
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.layers.host import Host
from keras_spectral.layers.trained_copy import NamedCopy
from keras_spectral.model.hosts import Names
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import member_places
from keras_spectral.model.hosts import members
from keras_spectral.model.hosts import names_in
from keras_spectral.model.hosts import require_names
from keras_spectral.model.paths import places
from keras_spectral.model.placing import wrap_places
from keras_spectral.model.training import set_flags
from keras_spectral.saving.applying import apply_adapters
from keras_spectral.saving.applying import requests_of
from keras_spectral.saving.checksum import base_values
from keras_spectral.saving.checksum import encoded
from keras_spectral.saving.fresh import connect_as_saved
from keras_spectral.saving.fresh import give_placeholders
from keras_spectral.saving.naming import adapter_entries
from keras_spectral.saving.naming import fingerprint
from keras_spectral.saving.naming import named_weights
from keras_spectral.saving.reading import FORMAT
from keras_spectral.saving.reading import VERSION
from keras_spectral.saving.reading import check_finite
from keras_spectral.saving.reading import chosen
from keras_spectral.saving.reading import read_adapters


def save_adapters(
    model: keras.Model, path: str | os.PathLike, *, adapter: Names = None
) -> None:
    """Saves a model's adapters, and the layers that train beside them.

    The file is safetensors: a float32 tensor for each weight, and in its
    metadata the format and its version, each adapter's place, method and
    options, the places of trained heads, a fingerprint of the base (names
    and shapes) and a few of its numbers, by which `load_adapters` knows it.
    The base's own weights are not in it.

    Of several processes of JAX the first one writes. Where kernels are split
    over processes, all of them have to call this.

    Args:
        model: A wrapped model, or a part of one, such as its backbone: then
            the file fits models with any other head.
        path: The file; an existing one is replaced, whole or not at all.
        adapter: The name of the adapter to save, or several; all by default.

    Raises:
        ValueError: The model has no adapters or none of that name, they are
            switched off, or they hold NaN or infinities.
        OSError: The file cannot be written, as where its folder is missing.

    Example:

    >>> import os, tempfile
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    >>> model = ks.wrap_model(model, "lora", target="dense.*", rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ks.save_adapters(model, os.path.join(folder, "a.safetensors"))
    ...     model = ks.unwrap_model(model)
    ...     model = ks.load_adapters(model, f"{folder}/a.safetensors")
    >>> [tuple(w.shape) for w in model.trainable_weights]
    [(16, 2), (2, 8)]
    """
    check_path(path)
    names = require_names(model, adapter)
    if any(member.disabled for member in members(model)):
        raise ValueError(
            f"The adapters of model '{model.name}' are switched off. Expected "
            "active ones: leave the `adapters_disabled` block, then save."
        )
    found = places(model)
    adapters = adapter_places(model, names=names)
    heads = _heads(model, names)
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "adapters": json.dumps(adapter_entries(adapters)),
        "trainable": json.dumps(
            [{"path": place.key, "adapter": name} for place, name in heads]
        ),
        "strengths": json.dumps(_strengths(adapters)),
        "base": fingerprint(found),
        "values": encoded(base_values(found)),
    }
    named = named_weights(adapters, heads)
    tensors = {name: to_numpy(variable) for name, variable in named.items()}
    check_finite(tensors, f"Not saved to {os.fspath(path)}")
    if is_first_process():
        write_safetensors(tensors, path, metadata)


def load_adapters(
    model: keras.Model,
    path: str | os.PathLike,
    strict: bool = True,
    *,
    adapter: Names = None,
) -> keras.Model:
    """Loads an adapter file into a model.

    What has a name that the model knows gets its values, without a retrace;
    it must have the same layers, methods and options. What has a new name is
    put into the model, as by `wrap_model`, and becomes the only active one; a
    plain model gets the strengths that the file was saved with.

    Loading is strict and all or nothing: after an error the model is as it
    was. A base whose numbers are not those that the adapters were trained on,
    rounding and quantisation apart, warns.

    Args:
        model: The base model that the adapters were trained on, plain or
            wrapped.
        path: A file that `save_adapters` wrote.
        strict: Whether adapters that hold factors of the base's kernel
            (spectral ones, PiSSA) are refused on a base of other numbers.
        adapter: A name for the file's only adapter, or a list that picks
            some of its adapters. All by default, by their own names.

    Returns:
        The model.

    Raises:
        ValueError: The file is no adapter file or damaged, belongs to another
            model, or has missing, unexpected or differently shaped tensors.
        FileNotFoundError: There is no such file.

    Example:

    >>> ks.load_adapters(keras.Sequential(), "nowhere.safetensors")
    Traceback (most recent call last):
    FileNotFoundError: There is no adapter file nowhere.safetensors.
    """
    check_model(model)
    check_path(path)
    check_flag(strict, "strict")
    content = chosen(*read_adapters(path), adapter, path)
    return apply_adapters(model, *content, path, strict)


def describe_adapters(model: keras.Model) -> dict:
    """Describes a model's adapters as JSON can hold them."""
    adapters = adapter_places(model)
    heads = _heads(model, names_in(model), plain=False)
    return {
        "adapters": adapter_entries(adapters),
        "trainable": [
            {"path": place.key, "adapter": name} for place, name in heads
        ],
        "trained": [m.adapter_name for m in members(model) if m.is_trained],
    }


def adapt_as_described(model: keras.Model, description: dict) -> keras.Model:
    """Wraps a plain model as `describe_adapters` said, with fresh weights."""
    by_key = {place.key: place for place in places(model)}
    entries = description["adapters"]
    requests = requests_of(entries, by_key)
    kept = [(by_key[h["path"]], h["adapter"]) for h in description["trainable"]]

    def prepare(adapters):
        give_placeholders(adapters)
        connect_as_saved(adapters, [e.get("shared") for e in entries])

    wrap_places(model, requests, kept, prepare)
    for member in members(model):
        member.is_trained = member.adapter_name in description["trained"]
    set_flags(model)
    return model


def _heads(model, names, plain=True):
    """Copies that train with adapters of these names, and plain layers that
    train, which belong to the first one."""
    heads = [
        (place, place.layer.adapter_name)
        for place in member_places(model, names)
        if isinstance(place.layer, NamedCopy)
    ]
    for place in places(model) if plain else ():
        own = own_variables(place.layer)
        if not isinstance(place.layer, Host) and any(v.trainable for v in own):
            heads.append((place, names[0]))
    return heads


def _strengths(adapters):
    """The strengths of several adapters, if one is on."""
    strengths = {
        p.layer.adapter_name: p.layer.current_strength() for p in adapters
    }
    several = len(strengths) > 1 and any(strengths.values())
    return strengths if several else {}
