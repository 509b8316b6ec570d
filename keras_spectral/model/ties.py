"""Kernels that other code of a model uses as well."""

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

import keras

from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import subject

_TABLE = re.compile(r"self\.([\w.]+)\._?embeddings\b")
_TURNS = {"transpose", "einsum", "swapaxes", "T"}


def tied(model: keras.Model, candidates: list[Place]) -> dict[int, str]:
    """Layers whose kernel has a second use, by id, and what that is.

    These are tables that are the output projection as well (each
    ReversibleEmbedding, and those that other layers' code reads and turns
    around), and kernels that another layer holds.
    """
    reasons = {}
    for layer, other in _shared(model, candidates):
        if not _rewrites(other, layer):
            name = f"'{other.name}' ({type(other).__name__})"
            reasons[id(layer)] = f"is held by {name} as well"
    for layer in [model, *(subject(p.layer) for p in candidates)]:
        for path in _turned_tables(type(layer)):
            table = _follow(layer, path)
            if isinstance(table, keras.layers.Embedding):
                reasons[id(table)] = f"is read by '{layer.name}' as well"
        if isinstance(layer, keras.layers.ReversibleEmbedding):
            reasons[id(layer)] = (
                "is the input embedding and the output projection at once"
            )
    return reasons


def rewritten(model: keras.Model, candidates: list[Place]) -> dict[int, str]:
    """Layers inside of a wrapper that holds and rewrites their kernel."""
    return {
        id(layer): f"{type(other).__name__} '{other.name}'"
        for layer, other in _shared(model, candidates)
        if _rewrites(other, layer)
    }


def _shared(model, candidates) -> Iterator[tuple[Any, Any]]:
    """Each layer whose own kernel another layer of the tree holds as well."""
    layers = [model, *(subject(place.layer) for place in candidates)]
    holders: dict[int, dict] = {}
    for layer in layers:
        for variable in _held(layer):
            holders.setdefault(id(variable), {})[id(layer)] = layer
    for layer in layers:
        for variable in own_variables(layer):
            for other in holders[id(variable)].values():
                if other is not layer and len(variable.shape) > 1:
                    yield layer, other


def _held(layer):
    kept = [x for x in vars(layer).values() if isinstance(x, keras.Variable)]
    return [*own_variables(layer), *kept]


def _rewrites(other, layer):
    """Whether one is a wrapper around the other, as SpectralNormalization."""
    return isinstance(other, keras.layers.Wrapper) and other.layer is layer


@functools.cache
def _turned_tables(cls):
    """Attribute paths of embeddings that a class's code reads transposed."""
    found = set()
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "keras":
            continue
        for function in vars(base).values():
            names = getattr(getattr(function, "__code__", None), "co_names", ())
            reads = {"embeddings", "_embeddings"} & set(names)
            if reads and _TURNS & set(names):
                found |= set(_TABLE.findall(_source(function)))
    return found


def _source(function):
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # typed at a prompt
        return ""


def _follow(layer, path):
    for name in path.split("."):
        layer = subject(getattr(layer, name, None))
    return layer
