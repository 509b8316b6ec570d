"""PEFT's adapter_config.json: which fields count, and what they may say."""

import re
import warnings
from typing import Any

from keras_spectral.exchange.fields import CHANGES_BASE
from keras_spectral.exchange.fields import KNOWN
from keras_spectral.exchange.fields import NO_MATTER
from keras_spectral.exchange.fields import ONLY_TRAINING
from keras_spectral.exchange.fields import REFUSED
from keras_spectral.exchange.folder import CONFIG


def checked_config(config: dict, folder: Any) -> dict:
    """A configuration's fields that count, with defaults for missing ones.

    Raises:
        ValueError: The kind is not supported, a field that counts is of
            another form, or one changes what is computed in a way that is not
            supported.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KNOWN:
        raise ValueError(
            f"{folder} has peft_type={kind!r} in {CONFIG}. Expected one of "
            f"{', '.join(KNOWN)}; other kinds of PEFT's have no adapter here. "
            "If it merges, merge it with HF PEFT (`merge_and_unload`), save "
            "the model and load that."
        )
    fields = KNOWN[kind]
    for name, reason in REFUSED.items():
        if config.get(name):
            raise ValueError(
                f"{folder} has {name}={_short(config[name])} in {CONFIG}, "
                f"which is not supported: {reason}. Expected an adapter "
                "without it."
            )
    _check_start(config.get("init_lora_weights"), folder)
    dropped = [name for name in ONLY_TRAINING if config.get(name)]
    if dropped:
        warnings.warn(
            f"{folder} has {dropped[0]}={_short(config[dropped[0]])} in "
            f"{CONFIG}, which this adapter lacks here: what is loaded is "
            "exact, and further training would go without it.",
            stacklevel=4,
        )
    known = fields.keys() | NO_MATTER | {*REFUSED, *ONLY_TRAINING}
    unknown = sorted(config.keys() - known)
    unknown = [name for name in unknown if config[name] not in _OFF]
    if unknown:
        warnings.warn(
            f"{folder} has fields in {CONFIG} that are not known and are "
            f"passed over: {', '.join(unknown[:8])}.",
            stacklevel=4,
        )
    checked: dict[str, Any] = {"peft_type": kind}
    for name, field in fields.items():
        value = config.get(name, field.default)
        if not field.fits(value):
            raise ValueError(
                f"{folder} has {name}={_short(value)} in {CONFIG}. Expected "
                f"{field.expected}."
            )
        checked[name] = value
    return checked


_OFF = (None, False, 0, "", [], {})


def _check_start(start, folder):
    name = start.lower() if isinstance(start, str) else ""
    if name.startswith(CHANGES_BASE):
        raise ValueError(
            f"{folder} has init_lora_weights={start!r} in {CONFIG}: its "
            "factors belong to a base that PEFT changed before the training. "
            "Expected an adapter of the original base: save it with "
            "`save_pretrained(folder, path_initial_model_for_weight_conversion"
            "=...)` in HF PEFT."
        )


def matching_key(patterns: dict, path: str) -> str | None:
    """The first of PEFT's patterns that matches the end of a path."""
    for key in patterns:
        if _matches(rf"(.*\.)?({key})", path):
            return key
    return None


def is_target(config: dict, path: str) -> bool:
    """Whether a module is one that a configuration means, by PEFT's rules."""
    excluded = config["exclude_modules"]
    if isinstance(excluded, str):
        if _matches(excluded, path):
            return False
    elif excluded and _ends_with(path, excluded):
        return False
    saved = config["modules_to_save"] or []
    saved = [saved] if isinstance(saved, str) else saved
    if any(_matches(rf"(.*\.)?({name})(\..*)?", path) for name in saved):
        return False
    targets = config["target_modules"] or []
    if isinstance(targets, str):
        return targets != "all-linear" and _matches(targets, path)
    if path in targets:
        return True
    if not _ends_with(path, targets):
        return False
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    number = _layer_number(path, config.get("layers_pattern"))
    return number in (wanted if isinstance(wanted, list) else [wanted])


def is_saved_module(config: dict, tensor: str) -> bool:
    """Whether a tensor is one of a module in `modules_to_save`."""
    saved = config["modules_to_save"] or []
    saved = (saved,) if isinstance(saved, str) else tuple(saved)
    pieces = tensor.split(".")
    modules = [".".join(pieces[:i]) for i in range(1, len(pieces))]
    return any(module.endswith(saved) for module in modules)


def _ends_with(path, names):
    return path in names or any(path.endswith(f".{name}") for name in names)


def _layer_number(path, patterns):
    """The number of the layer that a module is in, None if in none."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    starts = [rf"(?:.*?\.)?{p}" for p in patterns or []] or [r".*?\.[^.]*"]
    for start in starts:
        found = re.match(rf"{start}\.(\d+)\.", path)
        if found:
            return int(found[found.lastindex or 0])
    return None


def _matches(pattern, path):
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(
            f"{CONFIG} has the pattern {pattern!r}, which is no regular "
            f"expression: {error}."
        ) from error


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else text[:76] + " ..."
