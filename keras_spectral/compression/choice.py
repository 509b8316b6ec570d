"""What `compress_model` is asked for: goal, layers and method."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral.kernels import KernelView
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view
from keras_spectral.model.calibrate import Calibration
from keras_spectral.model.hosts import require_plain
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import places
from keras_spectral.model.select import Target
from keras_spectral.model.select import select
from keras_spectral.model.select import without_halves
from keras_spectral.model.ties import tied


def check_goal(
    ratio: float | None,
    budget: float | None,
    max_error: float | None,
    whole: bool = True,
) -> None:
    """Raises a ValueError unless one goal is given, and within its limits.

    `whole` says that the budget counts something.
    """
    given = {"ratio": ratio, "budget": budget, "max_error": max_error}
    given = {k: value for k, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Received {given or 'no goal'}. Expected exactly one of `ratio`, "
            "`budget` and `max_error`."
        )
    name, value = next(iter(given.items()))
    if name == "budget" and whole:
        check_rank(value, name)
    elif name == "budget":
        if check_number(value, name, 0) == 0:
            raise ValueError("Received budget=0. Expected a number above 0.")
    elif not 0 < check_number(value, name) < 1:
        raise ValueError(
            f"Received {name}={value!r}. Expected a number above 0 and below 1."
        )


def default_method(
    views: Sequence[KernelView], calibration: Any, max_error: float | None
) -> str:
    """How ranks are chosen where nobody says it, see `compress_model`."""
    if calibration is None or max_error is not None:
        return "alds"
    if not isinstance(calibration, Calibration):
        return "sensitivity"
    weights = {True: 0, False: 0}  # of layers that can be cut into slices
    for view in views:
        weights[len(view.slicings()) > 1] += view.num_weights
    return "alds" if weights[True] > weights[False] else "uniform"


def chosen_places(
    model: keras.Model,
    target: Target | None,
    exclude: Target | None,
    keep_ends: bool,
) -> list[Place]:
    """The places to compress, after all checks."""
    found = _plain_places(model)
    chosen = select(model, found, target or _NoTable(), exclude)
    whole = {id(p.layer) for p in without_halves(found)}
    chosen = [p for p in chosen if id(p.layer) in whole]
    chosen = [p for p in chosen if not isinstance(p.layer, LowRank)]
    if keep_ends:
        chosen = chosen[1:-1]
    _check_places(model, found, chosen, _check_replaceable)
    return chosen


def kernel_places(
    model: keras.Model, target: Target | None, exclude: Target | None
) -> list[Place]:
    """The places whose kernels get other numbers, after all checks.

    A factorised layer stands for its two halves.
    """
    found = _plain_places(model)
    halves = {id(p.layer): p for p in found}
    chosen = []
    for place in select(model, found, target or _NoTable(), exclude):
        if isinstance(place.layer, LowRank):
            pair = place.layer.down, place.layer.up
            chosen += [halves[id(half)] for half in pair]
        else:
            chosen.append(place)
    _check_places(model, found, chosen, _check_assignable)
    return chosen


def _plain_places(model):
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"Received {model!r}. Expected a built Keras model: call it on a "
            "batch or use `build(input_shape)` first."
        )
    require_plain(model)
    return places(model)


def _check_places(model, found, chosen, check):
    if not chosen:
        raise ValueError(
            f"Nothing is left to compress in model '{model.name}': "
            f"{describe(found)}."
        )
    shared = tied(model, found)
    for place in chosen:
        try:
            check(place.layer, shared.get(id(place.layer)))
        except ValueError as error:
            raise ValueError(f"At '{place.path}': {error}") from error


def _check_assignable(layer, sharing):
    """Raises unless a layer's kernel can take other numbers."""
    view = kernel_view(layer)
    view.check_assignable()
    if sharing is not None:
        raise ValueError(
            f"The kernel of layer '{layer.name}' {sharing}. Expected one of "
            "the layer's own: leave the layer out with `exclude`."
        )
    view.finite_matrix()


def _check_replaceable(layer, sharing):
    """Raises unless a pair can do a layer's work alone."""
    view = kernel_view(layer)
    view.check_assignable()
    view.thin_layers(1)
    if sharing is not None:
        raise ValueError(
            f"The kernel of layer '{layer.name}' {sharing}, and would "
            "still be there. Expected a kernel that a pair can replace: leave "
            "the layer out with `exclude`."
        )
    view.finite_matrix()


class _NoTable:
    """The default target: all that can be factorised but embeddings."""

    def __call__(self, layer):
        # Some models hold layers that they never build nor call.
        return layer.built and not isinstance(layer, keras.layers.Embedding)

    def __repr__(self):
        return "None"
