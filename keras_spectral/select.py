"""Which layers a target means: patterns, classes, presets."""

import re
from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_spectral.blocks.kinds import block_kind
from keras_spectral.kernels import LowRank
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.paths import Place
from keras_spectral.paths import describe
from keras_spectral.paths import match_paths
from keras_spectral.paths import places
from keras_spectral.paths import require_match
from keras_spectral.paths import subject
from keras_spectral.surgery import output_layers
from keras_spectral.surgery import own_variables

Target = str | type | Callable[[keras.layers.Layer], bool] | Iterable

# Names that KerasHub gives to query and value projections, fused ones too.
_ATTENTION = re.compile(
    r"(.*_)?(query|value|qkv|q|v)"
    r"(_(dense|proj|projection|projector|proj_layer|conv2d))?"
    r"|query_key_value|in_proj_qkv|attention_qkv\d?|c_attn|to_[qv]"
)
_LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)
_CONV = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
_TIED = keras.layers.ReversibleEmbedding


def select(
    model: keras.Model,
    candidates: list[Place],
    target: Target,
    exclude: Target | None = None,
    adapter: type[AdapterLayer] = AdapterLayer,
) -> list[Place]:
    """The places that a target means, less those that `exclude` means.

    Args:
        model: The root of the candidates.
        candidates: Where to choose.
        target: What to choose.
        exclude: What to leave out of that.
        adapter: Of what class; a callable is asked of the layers it fits.

    Raises:
        ValueError: Nothing matches, a pattern is no regex or, in `exclude`,
            matches no layer, or a tied embedding is caught by a pattern.
    """
    chosen = _matching(model, candidates, target, adapter)
    if exclude is not None:
        _check_patterns(candidates, exclude)
        dropped = _matching(model, candidates, exclude, adapter)
        chosen = [place for place in chosen if place not in dropped]
    if not chosen:
        shown = describe(adaptable(candidates, adapter))
        raise ValueError(
            f"Nothing in model '{model.name}' matches target={target!r}"
            + (f" with exclude={exclude!r}" if exclude is not None else "")
            + f". A pattern must match a whole path. Layers here: {shown}."
        )
    return chosen


def adaptable(
    candidates: list[Place], adapter: type[AdapterLayer] = AdapterLayer
) -> list[Place]:
    """The places whose layers an adapter class fits."""
    return [p for p in candidates if _fits(adapter, subject(p.layer))]


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
    patterns = [trainable] if isinstance(trainable, str) else list(trainable)
    kept = []
    for pattern in patterns:
        for place in require_match(candidates, pattern, "trainable"):
            inside = f"{place.path}/"
            kept += [
                other
                for other in candidates
                if other is place or other.path.startswith(inside)
            ]
    return kept


def _check_patterns(candidates, exclude):
    """Raises if a regex matches nothing, as a mistyped one does."""
    several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    for pattern in exclude if several else [exclude]:
        if isinstance(pattern, str) and pattern not in _PRESETS:
            require_match(candidates, pattern, "exclude")


def _first_half(layer):
    """What takes the input: of a factorised layer its first half."""
    base = subject(layer)
    return base.down if isinstance(base, LowRank) else base


def _matching(model, candidates, target, adapter=AdapterLayer):
    if isinstance(target, str) and target not in _PRESETS:
        return _untied(match_paths(candidates, target), target)
    # Halves of a factorised layer are only found by their paths.
    candidates = without_halves(candidates)
    if isinstance(target, str):
        chosen = _PRESETS[target](model, candidates)
        # Some models hold layers that they never build nor call.
        return [p for p in chosen if p.layer.built] or chosen
    if isinstance(target, type):
        return [p for p in candidates if isinstance(subject(p.layer), target)]
    if callable(target):
        asked = adaptable(candidates, adapter)
        chosen = [p for p in asked if target(subject(p.layer))]
        return _untied(chosen, target)
    if isinstance(target, Iterable):
        parts = [_matching(model, candidates, p, adapter) for p in target]
        chosen = {id(place): place for part in parts for place in part}
        return [place for place in candidates if id(place) in chosen]
    raise ValueError(
        f"Received target={target!r}. Expected a regex, a preset "
        f"({', '.join(map(repr, _PRESETS))}), a layer class, a callable "
        "`layer -> bool`, or a list of these."
    )


def _untied(chosen, target):
    for place in chosen:
        if isinstance(subject(place.layer), _TIED):
            raise ValueError(
                f"target={target!r} matches '{place.path}', a "
                "ReversibleEmbedding: its table is the input embedding and "
                "the output projection at once, so an adapter changes both. "
                "Exclude it, or ask for it by its class: "
                "target=keras.layers.ReversibleEmbedding."
            )
    return chosen


def _fits(adapter, layer):
    try:
        adapter.check_base(layer)
    except ValueError:
        return False
    return True


def _attention(model, candidates):
    """Query and value projections of every attention layer."""
    return [
        place
        for place in candidates
        if isinstance(_first_half(place.layer), (*_LINEAR, *_CONV))
        and _ATTENTION.fullmatch(place.layer.name)
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
    """Every layer that a view covers but tied embeddings."""
    covered = adaptable(candidates)
    return [p for p in covered if not isinstance(subject(p.layer), _TIED)]


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
    "all-linear": _all_linear,
    "conv": _conv,
    "all": _all,
}


def _is_backbone(model):
    return any(c.__name__ == "Backbone" for c in type(model).__mro__)
