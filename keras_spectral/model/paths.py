"""Where layers are in a model: paths, and patterns that match them."""

import dataclasses
import re

import keras

from keras_spectral._internal.layer_tools import sublayers
from keras_spectral.layers.host import Host

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
            inside = subject(child)
            if inside is child or child.opens_base:
                walk(inside, f"{place.path}/", f"{place.key}/")

    walk(model, "", "")
    return found


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


def describe(candidates: list[Place]) -> str:
    """A few paths, for messages."""
    if not candidates:
        return "none that an adapter fits (is the model built?)"
    shown = ", ".join(repr(place.path) for place in candidates[:_MAX_SHOWN])
    more = len(candidates) - _MAX_SHOWN
    return shown + (f" and {more} more" if more > 0 else "")


def subject(layer):
    """The layer itself, or the base of an adapter or a trained copy."""
    return layer.layer if isinstance(layer, Host) else layer


def _plain_name(layer):
    """The name, or for an automatic one (`dense_7`) the class's."""
    name = _snake(type(subject(layer)).__name__)
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
