"""Twins: shallow copies of layers that share everything but some attributes.

A layer that runs with other pieces runs as a twin, so that nothing that
threads share changes during a call, and the layer itself is as it was.
"""

from collections.abc import Callable
from typing import Any

import keras

# What a layer does to its own output.
_ENDINGS = ("activation", "activity_regularizer", "logit_soft_cap")

# `(path, function)`: calls of the attribute at a dotted path below a layer
# become `function(original, *args, **kwargs)`.
Detour = tuple[str, Callable]


def twin(layer: keras.layers.Layer, **changes: Any) -> keras.layers.Layer:
    """A layer that shares all with another but the attributes given.

    It is made again for each call (1 to 3 microseconds), so that it follows
    later assignments and quantisation.
    """
    copy = object.__new__(type(layer))
    vars(copy).update(vars(layer))
    vars(copy).update(changes)
    return copy


def without_ending(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A twin without activation: the layer up to its pre-activation."""
    # PyTorch keeps an activation that is a layer outside of `vars`, and looks
    # there only for what `vars` lacks.
    endings = {x: None for x in _ENDINGS if hasattr(layer, x)}
    # What a `RematScope` asks for is for who holds the twin.
    return twin(layer, **endings, _remat_mode=None)


def rerouted(
    layer: keras.layers.Layer, detours: list[Detour]
) -> keras.layers.Layer:
    """A twin some of whose pieces run through functions.

    Args:
        layer: The layer. Where an adapter stands on the way of a path, its
            base is meant.
        detours: A later one of the same piece goes around the earlier one.
    """
    below: dict[str, list[Detour]] = {}
    copy = twin(layer)
    for path, function in detours:
        name, _, rest = path.partition(".")
        if rest:
            below.setdefault(name, []).append((rest, function))
    for name, inner in below.items():
        vars(copy)[name] = rerouted_base(getattr(layer, name), inner)
    for path, function in detours:
        if "." not in path:
            vars(copy)[path] = _Around(getattr(copy, path), function)
    return copy


def rerouted_base(layer: Any, detours: list[Detour]) -> Any:
    """`rerouted` of what may be an adapter, a twin or a detour itself."""
    if isinstance(layer, _Around):
        return _Around(rerouted_base(layer.original, detours), layer.function)
    if getattr(layer, "opens_base", False):
        return twin(layer, layer=rerouted_base(layer.layer, detours))
    return rerouted(layer, detours)


def rerouted_layer(
    owner: keras.layers.Layer, piece: keras.layers.Layer, function: Callable
) -> keras.layers.Layer:
    """A twin of a model in which calls of one layer run through a function.

    Args:
        owner: A model or layer with the piece anywhere below it.
        piece: The layer.
        function: Calls become `function(piece, *args, **kwargs)`.
    """

    def changed(value):
        if value is piece:
            return _Around(piece, function)
        inside = isinstance(value, keras.layers.Layer) and any(
            layer is piece for layer in value._flatten_layers()
        )
        return rerouted_layer(value, piece, function) if inside else value

    known = {id(child): changed(child) for child in owner._layers}
    copy = twin(owner)
    for store in (vars(owner), vars(owner).get("_modules") or {}):
        for name, value in store.items():
            if known.get(id(value), value) is not value:
                vars(copy)[name] = known[id(value)]
            elif type(value).__name__ in ("list", "tuple", "TrackedList"):
                items = [known.get(id(item), item) for item in value]
                if any(new is not old for new, old in zip(items, value)):
                    vars(copy)[name] = items
    if hasattr(owner, "_run_through_graph"):
        run = owner._run_through_graph

        def run_through_graph(inputs, operation_fn, **kwargs):
            def chosen(operation):
                return operation_fn(known.get(id(operation), operation))

            return run(inputs, operation_fn=chosen, **kwargs)

        vars(copy)["_run_through_graph"] = run_through_graph
    return copy


class _Around:
    """Something callable in the place of a layer or a method."""

    def __init__(self, original, function):
        self.original = original
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(self.original, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.original, name)
