"""Checks of a method's name and its options, for `wrap_model`."""

import inspect
import warnings
from typing import Any

from keras import ops

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.checks import did_you_mean
from keras_spectral.kernels import kernel_view
from keras_spectral.layers import METHODS
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers.member import count_own
from keras_spectral.model.calibrate import moments_at
from keras_spectral.model.counting import count_weights
from keras_spectral.model.gradients import gradient_at
from keras_spectral.model.hints import option_hints
from keras_spectral.model.hints import require
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject

# Bases with fewer weights are not worth a warning.
_WORTH_NAMING = 4096


def adapter_class_of(method: Any) -> type[AdapterLayer]:
    """The class of a method; a ValueError with the nearest name."""
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    kind = inspect.isclass(method) and issubclass(method, AdapterLayer)
    # The base classes leave this to the methods.
    if kind and method.build_adapter is not AdapterLayer.build_adapter:
        return method
    raise ValueError(
        f"Received method={method!r}. Expected one of {sorted(METHODS)} or "
        "a subclass of `AdapterLayer` that makes weights (`build_adapter`)."
        + did_you_mean(method, METHODS)
    )


def options_per_layer(
    chosen: list[Place], options: dict[str, Any], overrides: Any
) -> dict[str, dict[str, Any]]:
    """The options of each chosen place by path, overrides and seeds in."""
    if not isinstance(overrides, dict):
        raise ValueError(
            f"Received overrides={overrides!r}. Expected a dictionary "
            "{regex: {option: value}}, such as {'.*/query': {'rank': 4}}."
        )
    per_layer = {place.path: dict(options) for place in chosen}
    for pattern, changes in overrides.items():
        if not isinstance(changes, dict):
            raise ValueError(
                f"Received overrides={overrides!r}. Expected options for "
                f"{pattern!r}, such as {{'rank': 4}}."
            )
        for place in require(chosen, pattern, "overrides"):
            per_layer[place.path].update(changes)
    for path, own in per_layer.items():
        _give_start_data(own, path)
    # Layers of one shape must not start with the same numbers.
    for place in chosen:
        own = per_layer[place.path]
        if own.get("seed") is not None:
            own["seed"] = derived_seed(own["seed"], place.key)
    return per_layer


def _give_start_data(own, path):
    """Replaces what the whole model is given by what one layer needs."""
    given = [name for name in _START_DATA if name in own]
    if len(given) > 1:
        raise ValueError(
            f"Received {' and '.join(given)}. Expected the one that "
            f"initializer={own.get('initializer')!r} takes."
        )
    for name in given:
        own["start_data"] = _START_DATA[name](own.pop(name), path)


def _matrix_at(original, path):
    """The kernel at a path of a float model, as a matrix."""
    if isinstance(original, dict):  # they are matrices already
        return original[path]
    check_model(original)
    found = [p for p in places(original) if p.path == path]
    if not found:
        raise ValueError(
            f"The original model '{original.name}' has no layer '{path}'. "
            "Expected the same model before it was quantised."
        )
    view = kernel_view(subject(found[0].layer))
    if view.quantized:
        raise ValueError(
            f"Layer '{path}' of the original model is quantised as well. "
            "Expected the float model."
        )
    return ops.convert_to_numpy(view.matrix())


# What `wrap_model` is given for starts, and how a layer gets its own.
_START_DATA = {
    "calibration": moments_at,
    "original": _matrix_at,
    "gradients": gradient_at,
}


def check_options(
    adapter_class: type[AdapterLayer], per_layer: dict[str, dict[str, Any]]
) -> None:
    """Raises a ValueError if a method lacks one of the options."""
    known = [*adapter_class.option_names(), "dtype"]
    for path, options in per_layer.items():
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ValueError(
                f"At '{path}': {adapter_class.__name__} has no option "
                f"{', '.join(unknown)}. Its options: {', '.join(known)}."
                + option_hints(unknown, known)
            )


def warn_if_larger(
    requests: list[tuple],
    adapters: list[AdapterLayer],
) -> None:
    """Warns of adapters that train more numbers than their bases hold.

    One warning for all of them names the worst. Bases below 4,096 weights
    do not count.
    """
    larger = []
    for (place, *_), adapter in zip(requests, adapters):
        base = count_weights(adapter.layer)
        trained = count_own(adapter, trainable=True)
        if trained > base >= _WORTH_NAMING:
            larger.append((trained / base, place.path, trained, base))
    if larger:
        _, path, trained, base = max(larger)
        warnings.warn(
            f"{len(larger)} of {len(adapters)} adapters train more numbers "
            f"than their base layers hold, '{path}' {trained:,} beside "
            f"{base:,}. A smaller `rank` or size saves memory; or train the "
            "layers themselves (`trainable=`).",
            stacklevel=4,
        )
