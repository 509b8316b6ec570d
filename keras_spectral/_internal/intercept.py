"""Other code in the place of layers' calls, for a moment."""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator

import keras
from keras.src.backend.common.variables import AutocastScope


@contextlib.contextmanager
def intercepted(
    handlers: dict[keras.layers.Layer, Callable],
) -> Iterator[None]:
    """Inside, handlers stand in for the calls of layers.

    Args:
        handlers: For each layer `handler(call, inputs, *args, **kwargs)`,
            which is given the layer's own call.
    """
    before = []
    try:
        for layer, handler in handlers.items():
            own = vars(layer)
            for name in ("call", "quantized_call"):
                function = getattr(layer, name, None)
                if function is not None:
                    before.append((own, name, own.get(name)))
                    own[name] = _handled(handler, function)
        yield
    finally:
        for own, name, old in before:
            if old is None:
                own.pop(name, None)
            else:
                own[name] = old


def _handled(handler, call):
    def handled(inputs, *args, **kwargs):
        return handler(call, inputs, *args, **kwargs)

    return handled


def without_casts() -> contextlib.AbstractContextManager:
    """Inside, also within a layer's call, variables have their own dtype.

    Where a layer computes in another one Keras casts what is read, and on
    PyTorch what is assigned goes to the cast copy and is lost.
    """
    return AutocastScope(None)
