"""Lets a layer's pieces run through other code for as long as it is called."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

_ABSENT = object()

Detour = tuple[Any, str, Callable]


class _Around:
    """Something callable in the place of a layer or a method."""

    def __init__(self, original, function):
        self.original = original
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(self.original, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.original, name)


@contextlib.contextmanager
def detours(wanted: Iterable[Detour]):
    """Lets pieces of layers run through functions inside of the block.

    Keras's and PyTorch's books of a layer's sublayers and weights are not
    touched: the detour hides the piece behind an entry of the instance's
    `__dict__`. A later detour of the same piece goes around the earlier one.

    Args:
        wanted: `(owner, attribute, function)`; calls of the owner's
            attribute become `function(original, *args, **kwargs)`.
    """
    undo = []
    try:
        for owner, name, function in wanted:
            store = vars(owner)
            original = getattr(owner, name)
            undo.append((store, name, store.get(name, _ABSENT)))
            store[name] = _Around(original, function)
        yield
    finally:
        for store, name, value in reversed(undo):
            if value is _ABSENT:
                del store[name]
            else:
                store[name] = value
