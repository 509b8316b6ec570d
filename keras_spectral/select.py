"""Which layers a target means: paths, patterns, presets."""

import dataclasses
import re
from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_spectral.blocks.kinds import block_kind
from keras_spectral.kernels import LowRank
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.surgery import output_layers
from keras_spectral.surgery import own_variables
from keras_spectral.surgery import sublayers

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
_MAX_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer and where it is.

    Attributes:
        path: Layer names from the root, unique: what patterns match.
        key: The same, with Keras's automatic names numbered among siblings,
            so that it is equal when the same model is built again.
    """

    path: str
    key: str
    layer: keras.layers.Layer


def places(model: keras.Model) -> list[Place]:
    """Every layer below the model once, in tracking order, with its path.

    An adapter counts as the layer it wraps: its base has no place of its own,
    but what is inside of a wrapped block has.

    Args:
        model: The root; it has no path itself.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(2, name="head")]
    ... )
    >>> [place.path for place in places(model)]
    ['input_layer', 'head']
    """
    found, seen = [], {id(model)}

    def walk(owner, path, key):
        children = [c for c in sublayers(owner) if id(c) not in seen]
        seen.update(id(child) for child in children)
        names = _unique([child.name for child in children])
        keys = _unique([_plain_name(child) for child in children])
        for child, name, plain in zip(children, names, keys):
            place = Place(path + name, key + plain, child)
            found.append(place)
            inside = _subject(child)
            if inside is child or child.opens_base:
                walk(inside, f"{place.path}/", f"{place.key}/")

    walk(model, "", "")
    return found


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
    return [p for p in candidates if _fits(adapter, _subject(p.layer))]


def without_halves(candidates: list[Place]) -> list[Place]:
    """The places but those inside of factorised layers."""
    halves = {
        id(half)
        for place in candidates
        if isinstance(place.layer, LowRank)
        for half in (place.layer.down, place.layer.up)
    }
    return [place for place in candidates if id(place.layer) not in halves]


def match_paths(candidates: list[Place], pattern: str) -> list[Place]:
    """The places whose whole path a regex matches.

    Where no path matches, the stable keys are tried, which are what adapter
    files hold.

    Raises:
        ValueError: The pattern is no regular expression.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{pattern!r} is not a regular expression: {error}. Expected "
            r"one such as r'.*/(query|value)'."
        ) from error
    found = [p for p in candidates if regex.fullmatch(p.path)]
    return found or [p for p in candidates if regex.fullmatch(p.key)]


def require_match(
    candidates: list[Place], pattern: str, argument: str
) -> list[Place]:
    """The same; a ValueError that names the argument if there is none."""
    found = match_paths(candidates, pattern)
    if not found:
        raise ValueError(
            f"{argument} has {pattern!r}, which matches none of the layers "
            f"here: {describe(candidates)}."
        )
    return found


def describe(candidates: list[Place]) -> str:
    """A few paths, for messages."""
    if not candidates:
        return "none that an adapter fits (is the model built?)"
    shown = ", ".join(repr(place.path) for place in candidates[:_MAX_SHOWN])
    more = len(candidates) - _MAX_SHOWN
    return shown + (f" and {more} more" if more > 0 else "")


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


def _subject(layer):
    """The layer itself, or the base of an adapter."""
    return layer.layer if isinstance(layer, AdapterLayer) else layer


def _check_patterns(candidates, exclude):
    """Raises if a regex matches nothing, as a mistyped one does."""
    several = isinstance(exclude, Iterable) and not isinstance(exclude, str)
    for pattern in exclude if several else [exclude]:
        if isinstance(pattern, str) and pattern not in _PRESETS:
            require_match(candidates, pattern, "exclude")


def _first_half(layer):
    """What takes the input: of a factorised layer its first half."""
    subject = _subject(layer)
    return subject.down if isinstance(subject, LowRank) else subject


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
        return [p for p in candidates if isinstance(_subject(p.layer), target)]
    if callable(target):
        asked = adaptable(candidates, adapter)
        chosen = [p for p in asked if target(_subject(p.layer))]
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
        if isinstance(_subject(place.layer), _TIED):
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
    return [p for p in covered if not isinstance(_subject(p.layer), _TIED)]


def _blocks(model, candidates):
    """Transformer blocks, and attention layers that stand in none."""
    chosen = []
    for place in candidates:
        inside = chosen and place.path.startswith(f"{chosen[-1].path}/")
        if block_kind(_subject(place.layer)) is not None and not inside:
            chosen.append(place)
    return chosen


def _backbone(model, candidates):
    """What a task model has as its backbone."""
    backbone = getattr(model, "backbone", None)
    return [p for p in candidates if _subject(p.layer) is _subject(backbone)]


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


def _plain_name(layer):
    """The name, or for an automatic one (`dense_7`) the class's."""
    name = _snake(type(_subject(layer)).__name__)
    automatic = re.fullmatch(rf"{re.escape(name)}(_\d+)?", layer.name)
    return name if automatic else layer.name


def _snake(name):
    """A class name as Keras writes it in automatic layer names."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _unique(names):
    """`a, a, b` becomes `a, a_1, b`; a number never meets a given name."""
    given, used, unique = set(names), set(), []
    for name in names:
        fresh, count = name, 0
        while fresh in used or (count and fresh in given):
            count += 1
            fresh = f"{name}_{count}"
        used.add(fresh)
        unique.append(fresh)
    return unique
