"""The layers that `trainable` names: they train beside adapters."""

from collections.abc import Iterable

from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.kernels.norm import is_norm
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model.hints import require
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import subject
from keras_spectral.model.presets import PRESETS
from keras_spectral.model.presets import outside_backbone

# What `trainable` takes beside regexes.
_WORDS = ("biases", "norms")


def kept_places(model, candidates: list[Place], trainable) -> list[Place]:
    """The places that `trainable` names, with all that is inside them."""
    if trainable is None:
        return outside_backbone(model, candidates)
    if isinstance(trainable, str):
        trainable = [trainable]
    if not isinstance(trainable, Iterable):
        raise ValueError(
            f"Received trainable={trainable!r}. Expected a regex that matches "
            "the whole path of a layer, a list of them, or None."
        )
    kept = []
    for pattern in trainable:
        if pattern == "norms":
            norms = [p for p in candidates if is_norm(subject(p.layer))]
            kept += [p for p in norms if own_variables(subject(p.layer))]
        if pattern in _WORDS:
            continue
        for place in require(candidates, pattern, "trainable"):
            inside = f"{place.path}/"
            kept += [
                other
                for other in candidates
                if other is place or other.path.startswith(inside)
            ]
    return kept


def bias_places(
    candidates: list[Place], trainable, kept: list[Place]
) -> list[Place]:
    """The places whose biases train, where `trainable` says "biases".

    Layers that train as copies need nothing for it.
    """
    words = [trainable] if isinstance(trainable, str) else trainable or ()
    if "biases" not in words:
        return []
    whole = {id(place.layer) for place in kept}
    found = [
        p
        for p in PRESETS["biases"](None, candidates)
        if id(p.layer) not in whole
    ]
    copies = [p for p in found if isinstance(p.layer, TrainedCopy)]
    if copies:
        raise ValueError(
            f"Received trainable='biases'. {describe(copies)} train whole with "
            "another adapter, and an adapter of biases cannot be added to "
            "them. Expected patterns in `trainable` that match these layers "
            "as well, so that they train whole here too."
        )
    if not found:
        raise ValueError(
            "Received trainable='biases', and no layer has a bias or a norm's "
            "shift. Expected another choice."
        )
    return found
