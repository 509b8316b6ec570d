"""PEFT's adapter_config.json: which fields count, and what they may say."""

import re
import warnings
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras_spectral._internal.checks import is_whole
from keras_spectral.exchange.folder import CONFIG

_LARGE = 1e30


class Field(NamedTuple):
    """A field that is understood: what fits, in words, and what it defaults
    to."""

    fits: Callable[[Any], bool]
    expected: str
    default: Any = None


def _is_number(value):
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < _LARGE  # NaN is no number either


def _is_names(value):
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return value is None or isinstance(value, str)


def _is_layers(value):
    items = value if isinstance(value, list) else [value]
    return value is None or all(map(is_whole, items))


def _maps_to(fits):
    def check(value):
        if not isinstance(value, dict):
            return value is None
        return all(map(fits, value.values()))

    return check


def _is_rank(value):
    return is_whole(value) and value > 0


def _is_flags(value):
    if not isinstance(value, list):
        return False
    return all(isinstance(item, bool) for item in value)


_NAMES = Field(_is_names, "a string, a list of strings or null")
_WHOLE = Field(_is_rank, "a whole number above 0", 8)
_FLAG = Field(lambda value: isinstance(value, bool), "true or false", False)
_NUMBER = Field(_is_number, "a number", 0.0)

# What says where an adapter is, for all kinds that sit on single layers.
_PLACES = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _NAMES,
    "fan_in_fan_out": _FLAG,
}
_LORA = {
    **_PLACES,
    "layers_to_transform": Field(_is_layers, "layer numbers or null"),
    "layers_pattern": _NAMES,
    "r": _WHOLE,
    "lora_alpha": _NUMBER._replace(default=8),
    "lora_dropout": _NUMBER,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "bias": Field(
        lambda value: value in ("none", "all", "lora_only"),
        "'none', 'all' or 'lora_only'",
        "none",
    ),
    "rank_pattern": Field(_maps_to(_is_rank), "{pattern: rank}", {}),
    "alpha_pattern": Field(_maps_to(_is_number), "{pattern: alpha}", {}),
}
_ADALORA = {
    **_LORA,
    "init_r": _WHOLE._replace(default=12),
    "orth_reg_weight": _NUMBER._replace(default=0.5),
    "rank_pattern": Field(_maps_to(_is_flags), "{name: [true or false]}"),
}
_PROMPT = {
    "num_virtual_tokens": _WHOLE._replace(default=None),
    "modules_to_save": _NAMES,
    "num_transformer_submodules": Field(
        lambda value: value in (None, 1),
        "1: models with an encoder and a decoder have two, which are not "
        "supported",
    ),
}

# What is understood of each kind. Another one is added here and in `kinds`.
KNOWN: dict[str, dict[str, Field]] = {
    "LORA": _LORA,
    "ADALORA": _ADALORA,
    "IA3": {**_PLACES, "feedforward_modules": _NAMES},
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
}

# Fields that change what is computed in ways that are not supported.
_REFUSED = {
    "target_parameters": "it adapts raw parameters, such as the experts of "
    "Mixtral, which have no layer here that an adapter fits",
    "layer_replication": "it repeats layers of the base",
    "trainable_token_indices": "it trains single rows of a table",
    "use_qalora": "it pools inputs for a quantised base",
    "use_bdlora": "its factors are block diagonal",
    "alora_invocation_tokens": "it is active from a token of the input on",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it changes the base by its singular values",
    "velora_config": "its factors are kept in another form",
    "monteclora_config": "its factors are drawn at random",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Fields that change nothing once an adapter is trained.
_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "beta1",
    "beta2",
    "corda_config",
    "deltaT",
    "encoder_hidden_size",
    "eva_config",
    "inference_mode",
    "init_ia3_weights",
    "init_lora_weights",
    "init_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "num_attention_heads",
    "num_layers",
    "peft_type",
    "peft_version",
    "prefix_projection",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "qalora_group_size",
    "r",
    "revision",
    "runtime_config",
    "target_r",
    "task_type",
    "tfinal",
    "tinit",
    "token_dim",
    "tokenizer_kwargs",
    "tokenizer_name_or_path",
    "total_step",
}


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
    for name, reason in _REFUSED.items():
        if config.get(name):
            raise ValueError(
                f"{folder} has {name}={_short(config[name])} in {CONFIG}, "
                f"which is not supported: {reason}. Expected an adapter "
                "without it."
            )
    _check_start(config.get("init_lora_weights"), folder)
    unknown = sorted(config.keys() - fields.keys() - _NO_MATTER - {*_REFUSED})
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
    if name.startswith(_CHANGES_BASE):
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
