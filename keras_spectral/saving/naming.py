"""How adapter files name things."""

import hashlib
import math

from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.kernels import kernel_view
from keras_spectral.layers import AdapterLayer
from keras_spectral.model.paths import subject


def adapter_entries(adapters):
    """What the file says of each adapter."""
    numbers = _shared_numbers(adapters)
    entries = []
    for place in adapters:
        layer = place.layer
        entry = {
            "path": place.key,
            "method": layer.method,
            "options": layer.options(),
        }
        if layer.shared is not None:
            entry["shared"] = numbers[id(layer.shared)]
        scale = float(layer.scale)
        if not is_close(scale, layer.initial_scale()):
            entry["scale"] = scale
        entries.append(entry)
    return entries


def _shared_numbers(found):
    """Numbers the layers that adapters share, in the order of the places."""
    numbers = {}
    for place in found:
        shared = getattr(place.layer, "shared", None)
        if isinstance(place.layer, AdapterLayer) and shared is not None:
            numbers.setdefault(id(shared), len(numbers))
    return numbers


def named_weights(found):
    """Layers' own weights by name in the file, random state left out."""
    named = {}
    numbers = _shared_numbers(found)
    for place in found:
        own = {}
        for variable in own_variables(place.layer):
            name = f"{place.key}/{variable.name}"
            while name in own:
                name += "_"
            own[name] = variable
        named |= own
        if isinstance(place.layer, AdapterLayer) and place.layer.shared:
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
