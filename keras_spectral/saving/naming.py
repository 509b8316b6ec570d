"""How adapter files name things."""

import hashlib
import math

import keras

from keras_spectral._backend import number_in
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.kernels import kernel_view
from keras_spectral.layers.member import Member
from keras_spectral.layers.member import own_weights
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import subject

TRAINED = "trained"


def slot(key: str, adapter: str, method: str) -> str:
    """Where a file keeps a member's tensors: `slot/weight`."""
    return f"{key}/{adapter}/{method}"


def entry_slot(entry: dict) -> str:
    """`slot` of an adapter that a file describes."""
    return slot(entry["path"], entry["adapter"], entry["method"])


def head_slot(head: dict) -> str:
    """`slot` of a layer that trains beside an adapter."""
    return slot(head["path"], head["adapter"], TRAINED)


def adapter_entries(adapters: list[Place]) -> list[dict]:
    """Describes each adapter for the file."""
    numbers = _shared_numbers(adapters)
    entries = []
    for place in adapters:
        layer = place.layer
        entry = {
            "path": place.key,
            "adapter": layer.adapter_name,
            "method": layer.method,
            "options": layer.options(),
        }
        if layer.shared is not None:
            entry["shared"] = numbers[id(layer.shared)]
        scale = number_in(layer.adapter_scale)
        if not is_close(scale, layer.initial_scale()):
            entry["scale"] = scale
        entries.append(entry)
    return entries


def _shared_numbers(adapters):
    """Numbers the layers that adapters share, in the order of the places."""
    numbers = {}
    for place in adapters:
        shared = getattr(place.layer, "shared", None)
        if shared is not None:
            numbers.setdefault(id(shared), len(numbers))
    return numbers


def named_weights(
    adapters: list[Place], heads: list[tuple[Place, str]]
) -> dict[str, keras.Variable]:
    """Weights by their name in the file, random state left out.

    Args:
        adapters: Where adapters are.
        heads: Where copies or plain layers train, and with which adapter.
    """
    named = {}
    numbers = _shared_numbers(adapters)
    found = [
        (slot(p.key, p.layer.adapter_name, p.layer.method), p.layer)
        for p in adapters
    ]
    found += [(slot(p.key, name, TRAINED), p.layer) for p, name in heads]
    for start, layer in found:
        plain = not isinstance(layer, Member)
        for variable in own_variables(layer) if plain else own_weights(layer):
            name = f"{start}/{variable.name}"
            while name in named:
                name += "_"
            named[name] = variable
    for place in adapters:
        if place.layer.shared is not None:
            number = numbers[id(place.layer.shared)]
            for variable in own_variables(place.layer.shared):
                named[f"shared/{number}/{variable.name}"] = variable
    return named


def fingerprint(found):
    """A hash of every base weight's name and shape."""
    lines = []
    for place in found:
        layer = place.layer
        base = subject(layer)
        try:
            view = kernel_view(base)
            lines.append(f"{place.key} {view.n_in} {view.n_out}")
        except ValueError:
            for variable in own_variables(base):
                shape = tuple(variable.shape)
                lines.append(f"{place.key}/{variable.name} {shape}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def is_close(one, other):
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-12)
