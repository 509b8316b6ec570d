"""Suggestions for a pattern that matches nothing."""

import re
from collections.abc import Iterable

from keras_spectral._internal.checks import nearest
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import match_paths


def _projections(word, letter):
    """Names that KerasHub gives to value and one more kind of projections.

    Fused ones are among them.
    """
    return re.compile(
        rf"(.*_)?({word}|value|qkv|{letter}|v)"
        r"(_(dense|proj|projection|projector|proj_layer|conv2d))?"
        rf"|query_key_value|in_proj_qkv|attention_qkv\d?|c_attn|to_[{letter}v]"
    )


ATTENTION = _projections("query", "q")
KEY_VALUE = _projections("key", "k")


def require(
    candidates: list[Place],
    pattern: str,
    argument: str,
    presets: Iterable[str] = (),
    shown: list[Place] | None = None,
    model: str | None = None,
) -> list[Place]:
    """The places that a pattern matches; a ValueError with help if none.

    Args:
        candidates: Where to look.
        pattern: A regex that must match a whole path.
        argument: What the caller calls it.
        presets: Words that could have been meant.
        shown: The places to name; all by default.
        model: The name of the model they are in, for the message.
    """
    if not isinstance(pattern, str):
        raise ValueError(
            f"Received {argument}={pattern!r}. Expected a regex that matches "
            "the whole path of a layer, or a list of them."
        )
    found = match_paths(candidates, pattern)
    if found:
        return found
    shown = candidates if shown is None else shown
    words = ", ".join(map(repr, presets))
    start = f"{argument} has {pattern!r}, which matches none of the layers here"
    if model is not None:
        start = f"Nothing in model '{model}' matches {argument}={pattern!r}"
    raise ValueError(
        f"{start}."
        + hint(pattern, shown, presets)
        + " A pattern must match a layer's whole path"
        + (f"; preset words are {words}" if words else "")
        + f". Layers here: {describe(shown)}."
    )


def hint(pattern: str, places: list[Place], presets: Iterable[str] = ()) -> str:
    """A sentence with what was probably meant, or nothing."""
    word = nearest(pattern, presets, 0.75)
    if word is not None:
        return f" Did you mean the preset {word!r}?"
    names = list(dict.fromkeys(_name(place) for place in places))
    inside = [name for name in names if re.fullmatch(pattern, name)]
    if inside:
        return _meant(pattern, places)
    if ATTENTION.fullmatch(pattern) and "attention" in presets:
        called = [name for name in names if ATTENTION.fullmatch(name)]
        if called:
            called = called[0] if len(called) == 1 else f"({'|'.join(called)})"
            return (
                " Did you mean the preset 'attention', or what it stands for "
                f"here, {_pattern(called)}?"
            )
    near = nearest(pattern, [place.path for place in places])
    if near is not None:
        return f" Did you mean {near!r}?"
    near = nearest(pattern.rpartition("/")[2], names)
    return "" if near is None else _meant(near, places)


# What other libraries call these options, and `wrap_model` its arguments.
_ALIASES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "dropout_rate": "dropout",
    "init_lora_weights": "initializer",
    "use_rslora": "scaling",
    "bottleneck_dim": "size",
    "num_virtual_tokens": "length",
    "random_state": "seed",
    "target_modules": "target",
    "target_layers": "target",
    "exclude_modules": "exclude",
    "modules_to_save": "trainable",
    "rank_pattern": "overrides",
    "alpha_pattern": "overrides",
}
_ARGUMENTS = ("target", "exclude", "trainable", "overrides", "svd_cache")


def option_hints(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Sentences with what unknown options were probably meant to be."""
    words = [*known, *_ARGUMENTS]
    found = []
    for name in unknown:
        meant = _ALIASES.get(name)
        meant = meant if meant in words else nearest(name, words)
        if meant is not None:
            of = " of `wrap_model`" if meant in _ARGUMENTS else ""
            found.append(f" Did you mean {meant!r}{of} for {name!r}?")
    return "".join(found)


def _meant(name, places):
    several = "|" in name and not name.startswith("(")
    pattern = f".*/{f'({name})' if several else name}"
    found = match_paths(places, pattern)
    if not found:  # layers that stand at the top
        return f" Did you mean {name!r}?"
    example = found[0].path
    count = "" if len(found) == 1 else f", which matches {len(found)} layers"
    return f" Did you mean r'{pattern}' (as '{example}'{count})?"


def _pattern(name):
    return f"r'.*/{name}'"


def _name(place):
    return place.path.rpartition("/")[2]
