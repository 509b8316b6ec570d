"""load_keras_lora: the LoRA weights that KerasHub's own `enable_lora` saves."""

import math
import os
import pathlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_path
from keras_spectral.exchange.pieces import within_rank
from keras_spectral.kernels import kernel_view
from keras_spectral.layers import LoRADense
from keras_spectral.model.contexts import unwrapped
from keras_spectral.model.hosts import check_new_name
from keras_spectral.model.hosts import names_in
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.placing import Request
from keras_spectral.model.placing import wrap_places
from keras_spectral.model.wrap import check_chosen
from keras_spectral.saving.reading import check_finite

_HALVES = ("lora_kernel_a", "lora_kernel_b")


def load_keras_lora(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    adapter: str = "default",
) -> keras.Model:
    """Puts what `save_lora_weights` of KerasHub saved into a model, in place.

    Keras factors the last axis of a kernel alone, with a pair for each of the
    heads that share one half. That is exactly a `LoRADense` of rank times
    heads, which the layers get: it trains on as one, with more freedom, and
    merges. Biases, which Keras trains beside it, are not in such a file. As
    by `wrap_model`, an adapter of a new name becomes the only active one.

    Args:
        model: A KerasHub task or backbone, with the base that the LoRA was
            trained on; without `enable_lora`.
        path: The file, `.lora.h5`.
        adapter: The name that the adapter gets.

    Returns:
        The model.

    Raises:
        ValueError: The file is damaged or does not fit the model, or the
            name is taken. The model is as it was.
        FileNotFoundError: There is no such file.

    Example:

    >>> load_keras_lora(keras.Sequential(), "nowhere.lora.h5")
    Traceback (most recent call last):
    FileNotFoundError: There is no file nowhere.lora.h5.
    """
    check_model(model)
    check_path(path)
    check_new_name(model, adapter)
    rank, pairs = _read(path)
    numbered = _numbered(model)
    requests, values = [], []
    for number, (a, b) in pairs.items():
        if number not in numbered:
            raise ValueError(
                f"{path} has LoRA weights for layer {number} of a backbone; "
                f"'{model.name}' has {len(numbered)} layers with weights. "
                "Expected the model that it was trained on."
            )
        place = numbered[number]
        check_finite({f"lora/{number}": a, f"lora/{number}/b": b}, path)
        a, b = _thin_pair(place, a, b, rank, path)
        options: dict[str, Any] = {"rank": a.shape[1]}
        requests.append(Request(place, LoRADense, options, adapter))
        values.append((a, b))

    check_chosen(model, [request.place for request in requests], adapter)

    def fill(made):
        for place, (a, b) in zip(made, values):
            place.layer.lora_a.assign(a)
            place.layer.lora_b.assign(b)

    wrap_places(model, requests, [], fill=fill)
    return model


def _read(path):
    """The rank, and the pair of each layer by its number."""
    import h5py

    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no file {os.fspath(path)}.")
    try:
        with h5py.File(path, "r") as file:
            home = _inside(file, "lora")
            rank = int(_array(home, "vars", "rank"))
            numbers = [name for name in home if name != "vars"]
            pairs = {
                int(n): tuple(_array(home, n, "vars", half) for half in _HALVES)
                for n in numbers
            }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no readable file of `save_lora_weights` ({error}). "
            "Expected a `.lora.h5` of a KerasHub backbone."
        ) from error
    if not pairs:
        raise ValueError(f"{path} holds LoRA weights of no layer.")
    return rank, pairs


def _array(home, *names):
    """A float32 array that lies in the file itself."""
    import h5py

    for name in names:
        home = _inside(home, name)
    if not isinstance(home, h5py.Dataset) or home.is_virtual or home.external:
        raise ValueError(f"'{names[-1]}' does not lie in this file")
    return np.asarray(home[()], "float32")


def _inside(home, name):
    """What a group holds by a name; links to elsewhere are not followed."""
    import h5py

    link = home.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"'{name}' is missing, or a link to elsewhere")
    return home[name]


def _numbered(model: keras.Model) -> dict[int, Place]:
    """The places of a backbone's layers by the numbers that KerasHub uses."""
    backbone = subject(getattr(model, "backbone", model))
    if names_in(model):
        with unwrapped(model):
            layers = list(backbone._flatten_layers(include_self=False))
    else:
        layers = list(backbone._flatten_layers(include_self=False))
    by_layer = {id(subject(place.layer)): place for place in places(model)}
    layers = [layer for layer in layers if layer.weights]
    return {
        number: by_layer[id(layer)]
        for number, layer in enumerate(layers)
        if id(layer) in by_layer
    }


def _thin_pair(place, a, b, rank, path):
    """The pair (n_in x r), (r x n_out) of Keras's pair for the last axis."""
    layer = subject(place.layer)
    try:
        view = kernel_view(layer)
        shape = tuple(view.variable().shape)
    except ValueError as error:
        raise ValueError(f"{path}, '{place.path}': {error}") from error
    if a.shape != (*shape[:-1], rank) or b.shape != (rank, shape[-1]):
        raise ValueError(
            f"{path} has factors of shapes {a.shape} and {b.shape} for "
            f"'{place.path}'. Expected {(*shape[:-1], rank)} and "
            f"{(rank, shape[-1])}, as its kernel {shape} has: the file belongs "
            "to another model."
        )
    # Where each number of the kernel is in the matrix (n_in x n_out).
    numbers = np.arange(math.prod(shape), dtype="int32").reshape(shape)
    matrix = view.to_matrix(ops.convert_to_tensor(numbers))
    order = ops.convert_to_numpy(matrix).reshape(-1).argsort()
    rows, columns = np.divmod(order.reshape(-1, shape[-1]), view.n_out)
    return within_rank(view, *_spread(view, a, b, rows, columns))


def _spread(view, a, b, rows, columns):
    """The pair of a matrix: of Keras's rank for each head.

    Args:
        view: The kernel.
        a: Keras's first half, (..., rank).
        b: Its second half, (rank, last).
        rows: For each of the kernel's rows, along its last axis, the rows of
            the matrix.
        columns: The same of the columns.
    """
    rank, sizes = len(b), (view.n_in, view.n_out)
    turned = (rows != rows[:, :1]).any()  # the last axis is one of inputs
    if turned:
        rows, columns, sizes = columns, rows, sizes[::-1]
    _, first, head = np.unique(
        columns[:, 0], return_index=True, return_inverse=True
    )
    left = np.zeros((sizes[0], len(first), rank), "float32")
    left[rows[:, 0], head] = a.reshape(-1, rank)
    right = np.zeros((len(first), rank, sizes[1]), "float32")
    for own, row in zip(right, first):
        own[:, columns[row]] = b
    left = left.reshape(sizes[0], -1)
    right = right.reshape(-1, sizes[1])
    return (right.T, left.T) if turned else (left, right)
