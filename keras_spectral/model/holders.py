"""Who holds layers past Keras's trackers, where no adapter can reach."""

import contextlib
import inspect
from collections.abc import Iterable

import keras

from keras_spectral._internal.layer_tools import all_layers
from keras_spectral.model.surgery import COMPILED

# Of these attributes of a layer none holds a layer in a way that counts.
_BOOKS = (
    "_tracker",
    "_modules",
    "_torch_params",
    "optimizer",
    "_config_before",
    "build",
    "quantize",
)
_LIBRARIES = (
    "builtins keras keras_hub keras_spectral numpy tensorflow jax jaxlib torch "
    "collections functools inspect types weakref threading enum re"
).split()
_OPAQUE = (str, bytes, int, float, type, keras.Variable, keras.layers.Layer)


def hidden_holders(
    model: keras.Model, layers: Iterable[keras.layers.Layer]
) -> dict[str, list[str]]:
    """Who holds layers past Keras's trackers, where no adapter can reach.

    Looked at are functions (their closures and defaults) and plain objects
    that the model's layers hold.

    Returns:
        For the name of each layer that is held so the kinds of its holders.
    """
    wanted = {id(layer): layer for layer in layers}
    found: dict[str, list[str]] = {}
    seen: set[int] = set()

    def look(value, kind, depth):
        if kind and id(value) in wanted:
            kinds = found.setdefault(wanted[id(value)].name, [])
            if kind not in kinds:
                kinds.append(kind)
            return
        if not depth or id(value) in seen or isinstance(value, _OPAQUE):
            return
        seen.add(id(value))
        inner, kind_inside = (), kind
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple | set):
            inner = value
        elif inspect.isfunction(value):
            inner = _reached(value)
            kind_inside = f"function '{value.__name__}'"
        elif inspect.ismethod(value):
            inner = [value.__self__]
            kind_inside = f"method '{value.__name__}'"
        elif type(value).__module__.partition(".")[0] not in _LIBRARIES:
            inner = vars(value).values() if hasattr(value, "__dict__") else ()
            kind_inside = f"object of class {type(value).__name__}"
        for item in inner:
            look(item, kind_inside, depth - 1)

    for owner in all_layers(model):
        for name, value in list(vars(owner).items()):
            if name not in _BOOKS and name not in COMPILED:
                look(value, "", 4)
    return found


def _reached(function):
    """The values that a function's defaults, closure and globals hold."""
    found = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            found.append(cell.cell_contents)
    names = function.__code__.co_names
    found += [v for k, v in function.__globals__.items() if k in names]
    return found
