"""Which layers a target means: patterns, classes, presets."""

import functools
from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.blocks.kinds import block_kind
from keras_spectral.kernels import LowRank
from keras_spectral.layers import BitFit
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.ia3 import FEED_FORWARD_OUTPUT
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model.hints import ATTENTION
from keras_spectral.model.hints import KEY_VALUE
from keras_spectral.model.hints import require
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.surgery import output_layers
from keras_spectral.model.ties import rewritten
from keras_spectral.model.ties import tied

Target = (
    str
    | type
    | keras.layers.Layer
    | Callable[[keras.layers.Layer], bool]
    | Iterable
)

_LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)
# What `trainable` takes beside regexes.
_WORDS = ("biases", "norms")
_CONV = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def select(
    model: keras.Model,
    candidates: list[Place],
    target: Target,
    exclude: Target | None = None,
    adapter: type[AdapterLayer] = KernelAdapter,
) -> list[Place]:
    """The places that a target means, less those that `exclude` means.

    Args:
        model: The root of the candidates.
        candidates: Where to choose.
        target: What to choose.
        exclude: What to leave out of that.
        adapter: Of what class; a callable is asked of the layers it fits.

    Raises:
        ValueError: Nothing matches, a pattern is no regex or matches no
            layer, a kernel with a second use (a tied embedding) is caught
            by a pattern, or one that a wrapper rewrites is caught at all.
    """
    search = _Search(model, candidates, adapter)
    chosen = search.matching(target)
    if exclude is not None:
        dropped = search.matching(exclude, "exclude")
        chosen = [place for place in chosen if place not in dropped]
    if not chosen:
        raise ValueError(
            f"Nothing in model '{model.name}' matches target={target!r}"
            + (f" with exclude={exclude!r}" if exclude is not None else "")
            + ". Expected a regex that matches a whole path, a preset ("
            + ", ".join(map(repr, _PRESETS))
            + "), a layer, a layer class, a callable or a list of these. "
            f"Layers here: {describe(search.shown)}."
        )
    search.check_kernels(chosen, target)
    return chosen


def adaptable(
    candidates: list[Place], adapter: type[AdapterLayer] = KernelAdapter
) -> list[Place]:
    """The places whose layers an adapter class fits."""
    fitting = [p for p in candidates if _fits(adapter, subject(p.layer))]
    # Some models hold layers that they never build nor call.
    return [p for p in fitting if subject(p.layer).built] or fitting


def chosen_by_presets(
    model: keras.Model, candidates: list[Place]
) -> dict[str, set[int]]:
    """The ids of the places that each preset word chooses."""
    search = _Search(model, candidates, KernelAdapter)
    return {
        word: {id(place) for place in search.matching(word)}
        for word in _PRESETS
        if word != "biases"
    }


def without_halves(candidates: list[Place]) -> list[Place]:
    """The places but those inside of factorised layers."""
    halves = {
        id(half)
        for place in candidates
        if isinstance(place.layer, LowRank)
        for half in (place.layer.down, place.layer.up)
    }
    return [place for place in candidates if id(place.layer) not in halves]


def outside_backbone(model, candidates: list[Place]) -> list[Place]:
    """The weight-holding places of a task model outside of its backbone."""
    backbone = getattr(model, "backbone", None)
    # Some KerasHub backbones hold another one, which makes them no tasks.
    if not isinstance(backbone, keras.layers.Layer) or _is_backbone(model):
        return []
    inside = {id(place.layer) for place in places(backbone)} | {id(backbone)}
    return [
        place
        for place in candidates
        if id(place.layer) not in inside
        and (own_variables(place.layer) or isinstance(place.layer, LowRank))
    ]


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
            kept += [p for p in candidates if _is_norm(subject(p.layer))]
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
    found = [p for p in _biases(None, candidates) if id(p.layer) not in whole]
    copies = [p for p in found if isinstance(p.layer, TrainedCopy)]
    if copies:
        raise ValueError(
            f"Received trainable='biases'. {describe(copies)} train whole with "
            "another adapter, and an adapter of biases cannot stand beside "
            "that. Expected patterns in `trainable` that match these layers "
            "as well, so that they train whole here too."
        )
    if not found:
        raise ValueError(
            "Received trainable='biases', and no layer has a bias or a norm's "
            "shift. Expected another choice."
        )
    return found


def _is_norm(layer):
    return type(layer).__name__.endswith(("Norm", "Normalization")) and bool(
        own_variables(layer)
    )


def _first_half(layer):
    """What takes the input: of a factorised layer its first half."""
    base = subject(layer)
    return base.down if isinstance(base, LowRank) else base


class _Search:
    """What targets mean in one model."""

    def __init__(self, model, candidates, adapter):
        self.model = model
        self.candidates = candidates
        self.adapter = adapter

    @property
    def shown(self):
        """What messages name: the layers that an adapter fits, if any."""
        return adaptable(self.candidates, self.adapter) or self.candidates

    @functools.cached_property
    def tied(self):
        return tied(self.model, self.candidates)

    def matching(self, target, argument="target"):
        """The places that a target means."""
        if isinstance(target, str) and target not in _PRESETS:
            if argument != "target":
                return require(self.candidates, target, argument)
            return require(
                self.candidates,
                target,
                argument,
                presets=_PRESETS,
                shown=self.shown,
                model=self.model.name,
            )
        if isinstance(target, keras.layers.Layer):
            return self._place_of(target, argument)
        # Halves of a factorised layer are only found by their paths.
        candidates = without_halves(self.candidates)
        if isinstance(target, str):
            chosen = _PRESETS[target](self.model, candidates)
            chosen = [
                p for p in chosen if id(subject(p.layer)) not in self.tied
            ]
            # Some models hold layers that they never build nor call.
            return [p for p in chosen if p.layer.built] or chosen
        if isinstance(target, type):
            return [
                p for p in candidates if isinstance(subject(p.layer), target)
            ]
        if callable(target):
            asked = adaptable(candidates, self.adapter)
            return [p for p in asked if target(subject(p.layer))]
        if isinstance(target, Iterable):
            parts = [self.matching(part, argument) for part in target]
            chosen = {id(place): place for part in parts for place in part}
            return [p for p in self.candidates if id(p) in chosen]
        raise ValueError(
            f"Received {argument}={target!r}. Expected a regex, a preset "
            f"({', '.join(map(repr, _PRESETS))}), a layer, a layer class, a "
            "callable `layer -> bool`, or a list of these."
        )

    def _place_of(self, layer, argument):
        found = [
            p for p in self.candidates if layer in (p.layer, subject(p.layer))
        ]
        if not found:
            raise ValueError(
                f"Received {argument}={layer!r}, which is no layer of model "
                f"'{self.model.name}'. Layers here: {describe(self.shown)}."
            )
        return found

    def check_kernels(self, chosen, target):
        """Raises if a chosen kernel is not the chosen layer's alone."""
        unsafe = rewritten(self.model, self.candidates)
        for place in chosen:
            layer = subject(place.layer)
            if id(layer) in unsafe:
                raise ValueError(
                    f"target={target!r} matches '{place.path}', whose kernel "
                    f"{unsafe[id(layer)]} holds and rewrites in every training "
                    "step. Expected layers of their own: exclude it, or take "
                    "the wrapper off."
                )
            if id(layer) in self.tied and not _by_class(target, layer):
                kind = type(layer)
                home = "keras.layers." * hasattr(keras.layers, kind.__name__)
                raise ValueError(
                    f"target={target!r} matches '{place.path}', a "
                    f"{kind.__name__}: its table or kernel "
                    f"{self.tied[id(layer)]}, so an adapter changes both. "
                    "Exclude it, or ask for the layer itself or for its "
                    f"class: target={home}{kind.__name__}."
                )


def _by_class(target, layer):
    """Whether a layer is asked for by its class, or in person."""
    if isinstance(target, type):
        return isinstance(layer, target)
    if isinstance(target, keras.layers.Layer):
        return layer is subject(target)
    several = isinstance(target, Iterable) and not isinstance(target, str)
    return several and any(_by_class(part, layer) for part in target)


def _fits(adapter, layer):
    try:
        adapter.check_base(layer)
        if layer.built:
            adapter.view_of(layer)
    except ValueError:
        return False
    return True


def _attention(model, candidates):
    """Query and value projections of every attention layer."""
    return [
        place
        for place in candidates
        if isinstance(_first_half(place.layer), (*_LINEAR, *_CONV))
        and ATTENTION.fullmatch(place.layer.name)
    ]


def _key_value_ffn(model, candidates):
    """Key and value projections, and second layers of feed-forward nets."""
    return [
        place
        for place in candidates
        if isinstance(_first_half(place.layer), (*_LINEAR, *_CONV))
        and (
            KEY_VALUE.fullmatch(place.layer.name)
            or FEED_FORWARD_OUTPUT.fullmatch(subject(place.layer).path or "")
        )
    ]


def _all_linear(model, candidates):
    """Every Dense and EinsumDense but heads."""
    heads = {id(p.layer) for p in outside_backbone(model, candidates)}
    if not hasattr(model, "backbone") and not _is_backbone(model):
        heads |= {id(layer) for layer in output_layers(model)}
    return [
        place
        for place in candidates
        if isinstance(_first_half(place.layer), _LINEAR)
        and id(place.layer) not in heads
    ]


def _conv(model, candidates):
    return [p for p in candidates if isinstance(_first_half(p.layer), _CONV)]


def _all(model, candidates):
    """Every layer that a view covers; tied ones go for all presets."""
    return adaptable(candidates)


def _biases(model, candidates):
    """Every layer with a bias, and norms with a shift."""
    built = [p for p in candidates if subject(p.layer).built]
    return [p for p in built if _fits(BitFit, subject(p.layer))]


def _blocks(model, candidates):
    """Transformer blocks, and attention layers that stand in none."""
    chosen = []
    for place in candidates:
        inside = chosen and place.path.startswith(f"{chosen[-1].path}/")
        if block_kind(subject(place.layer)) is not None and not inside:
            chosen.append(place)
    return chosen


def _backbone(model, candidates):
    """What a task model has as its backbone."""
    backbone = getattr(model, "backbone", None)
    return [p for p in candidates if subject(p.layer) is subject(backbone)]


_PRESETS = {
    "attention": _attention,
    "backbone": _backbone,
    "blocks": _blocks,
    "key-value-ffn": _key_value_ffn,
    "all-linear": _all_linear,
    "conv": _conv,
    "biases": _biases,
    "all": _all,
}


def _is_backbone(model):
    return any(c.__name__ == "Backbone" for c in type(model).__mro__)
