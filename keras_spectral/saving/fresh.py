"""Adapters that a file is about to fill, before they have weights."""

import math
import os
from collections.abc import Iterable
from collections.abc import Mapping

import keras
import numpy as np

from keras_spectral.kernels.spectra import Triplets
from keras_spectral.layers import AdapterLayer

_SMALL = 2**20  # numbers that are too few to be worth a look


def give_placeholders(adapters: Iterable[AdapterLayer]) -> None:
    """Spares the work of factorising kernels whose factors the file has."""
    for adapter in adapters:
        if type(adapter).triplets_needed is AdapterLayer.triplets_needed:
            continue
        view = adapter.view_of(adapter.layer)
        count = adapter.triplets_needed(view)
        # More than there are: building says so.
        if 0 < count <= min(view.n_in, view.n_out):
            shapes = ((view.n_in, count), (count,), (view.n_out, count))
            zeros = (np.zeros(shape, "float32") for shape in shapes)
            adapter.give_triplets(Triplets(*zeros))


def connect_as_saved(
    adapters: list[AdapterLayer], numbers: list[int | None]
) -> None:
    """Lets those adapters share a layer that shared one in the file."""
    for adapter, number in zip(adapters, numbers):
        if (number is not None) != _can_share(adapter):
            raise ValueError(
                f"The file says shared={number} of layer '{adapter.name}', "
                f"which method '{adapter.method}' does not fit. It is damaged."
            )
    for number in sorted({n for n in numbers if n is not None}):
        group = [a for a, n in zip(adapters, numbers) if n == number]
        if len({type(adapter) for adapter in group}) > 1:
            raise ValueError(
                f"The file says shared={number} of layers with different "
                "methods. It is damaged."
            )
        type(group[0]).connect(group)


def limit_to_tensors(
    layer: keras.layers.Layer,
    name: str,
    tensors: Mapping[str, np.ndarray],
    path: str | os.PathLike,
) -> None:
    """Refuses weights that are larger than a file's before they are made.

    `let_go` ends it.
    """
    shapes: dict[str, set] = {}
    for key, tensor in tensors.items():
        owner, _, own = key.rpartition("/")
        if owner == name:
            shapes.setdefault(own.rstrip("_"), set()).add(tensor.shape)
    make = layer.add_weight

    def add_weight(shape=None, *args, **kwargs):
        own = str(kwargs.get("name"))
        wanted = tuple(shape or ())
        known = shapes.get(own.rstrip("_"), set())
        # What is wrong with smaller ones is said when all are there.
        largest = max(map(math.prod, known), default=0)
        if math.prod(wanted) > max(largest, _SMALL):
            raise ValueError(
                f"{path}: the options say that '{name}/{own}' has shape "
                f"{wanted}, the file has "
                f"{' or '.join(map(str, known)) or 'no such tensor'}."
            )
        return make(shape, *args, **kwargs)

    vars(layer)["add_weight"] = add_weight


def let_go(layers: Iterable[keras.layers.Layer]) -> None:
    """Lets layers make any weights again."""
    for layer in layers:
        vars(layer).pop("add_weight", None)


def _can_share(adapter):
    return type(adapter).shared is not AdapterLayer.shared
