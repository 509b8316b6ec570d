"""Which layers a target means: patterns, classes, presets."""

import functools
from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_spectral.kernels import LowRank
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.model.hints import require
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import subject
from keras_spectral.model.presets import PRESETS
from keras_spectral.model.presets import adaptable
from keras_spectral.model.ties import rewritten
from keras_spectral.model.ties import tied

Target = (
    str
    | type
    | keras.layers.Layer
    | Callable[[keras.layers.Layer], bool]
    | Iterable
)


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
            + ", ".join(map(repr, PRESETS))
            + "), a layer, a layer class, a callable or a list of these. "
            f"Layers here: {describe(search.shown)}."
        )
    search.check_kernels(chosen, target)
    return chosen


def chosen_by_presets(
    model: keras.Model, candidates: list[Place]
) -> dict[str, set[int]]:
    """The ids of the places that each preset word chooses."""
    search = _Search(model, candidates, KernelAdapter)
    return {
        word: {id(place) for place in search.matching(word)}
        for word in PRESETS
        if word not in ("biases", "norms")
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


class _Search:
    """The meaning of targets in one model."""

    def __init__(self, model, candidates, adapter):
        self.model = model
        self.candidates = candidates
        self.adapter = adapter

    @property
    def shown(self):
        """The layers that messages name: those an adapter fits, if any."""
        return adaptable(self.candidates, self.adapter) or self.candidates

    @functools.cached_property
    def tied(self):
        return tied(self.model, self.candidates)

    def matching(self, target, argument="target"):
        """The places that a target means."""
        if isinstance(target, str) and target not in PRESETS:
            if argument != "target":
                return require(self.candidates, target, argument)
            return require(
                self.candidates,
                target,
                argument,
                presets=PRESETS,
                shown=self.shown,
                model=self.model.name,
            )
        if isinstance(target, keras.layers.Layer):
            return self._place_of(target, argument)
        # Halves of a factorised layer are only found by their paths.
        candidates = without_halves(self.candidates)
        if isinstance(target, str):
            chosen = PRESETS[target](self.model, candidates)
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
            f"({', '.join(map(repr, PRESETS))}), a layer, a layer class, a "
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
    """Whether a layer is asked for by its class, or as the layer itself."""
    if isinstance(target, type):
        return isinstance(layer, target)
    if isinstance(target, keras.layers.Layer):
        return layer is subject(target)
    several = isinstance(target, Iterable) and not isinstance(target, str)
    return several and any(_by_class(part, layer) for part in target)
