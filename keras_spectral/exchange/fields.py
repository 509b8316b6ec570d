"""The fields of PEFT's adapter_config.json that are understood, by kind."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from keras_spectral._internal.checks import is_whole

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
_COUNT = Field(
    lambda value: value == 0 or _is_rank(value), "a whole number, 0 or more", 0
)


def _biases(kind):
    words = ("none", "all", f"{kind}_only")
    expected = "{!r}, {!r} or {!r}".format(*words)
    return Field(lambda value: value in words, expected, "none")


# What says where an adapter is, for all kinds that sit on single layers.
_MODULES = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _NAMES,
}
_PLACES = {**_MODULES, "fan_in_fan_out": _FLAG}
_LAYERS = {
    "layers_to_transform": Field(_is_layers, "layer numbers or null"),
    "layers_pattern": _NAMES,
}
_PATTERNS = {
    "rank_pattern": Field(_maps_to(_is_rank), "{pattern: rank}", {}),
    "alpha_pattern": Field(_maps_to(_is_number), "{pattern: alpha}", {}),
}
_LORA = {
    **_PLACES,
    **_LAYERS,
    **_PATTERNS,
    "r": _WHOLE,
    "lora_alpha": _NUMBER._replace(default=8),
    "lora_dropout": _NUMBER,
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "bias": _biases("lora"),
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

_VERA = {
    **_PLACES,
    **_LAYERS,
    "r": _WHOLE._replace(default=256),
    "d_initial": Field(
        lambda value: _is_number(value) and value != 0,
        "a number that is not 0",
        0.1,
    ),
    "vera_dropout": _NUMBER,
    "save_projection": _FLAG._replace(default=True),
    "bias": _biases("vera"),
}
_LYCORIS = {
    **_MODULES,
    **_LAYERS,
    **_PATTERNS,
    "r": _WHOLE,
    "alpha": _NUMBER._replace(default=8),
    "use_effective_conv2d": _FLAG,
}
_LOKR = {
    **_LYCORIS,
    "decompose_both": _FLAG,
    "decompose_factor": Field(
        lambda value: value == -1 or _is_rank(value),
        "-1 or a whole number above 0",
        -1,
    ),
}
_OFT = {
    **_PLACES,
    **_LAYERS,
    "r": _COUNT,
    "oft_block_size": _COUNT._replace(default=32),
    "bias": _biases("oft"),
    "coft": _FLAG,
    "eps": _NUMBER._replace(default=6e-5),
    "block_share": _FLAG,
    "use_cayley_neumann": _FLAG._replace(
        default=None,
        expected="true or false: it says which way blocks turn, and versions "
        "of PEFT that do not know it differ",
    ),
    "num_cayley_neumann_terms": Field(
        lambda value: is_whole(value) and value > 2,
        "a whole number above 2: shorter series have no counterpart here",
        5,
    ),
    "peft_version": Field(
        lambda value: value is None or isinstance(value, str),
        "a string or null",
    ),
}
_BOFT = {
    **_PLACES,
    **_LAYERS,
    "boft_block_size": _COUNT._replace(default=4),
    "boft_block_num": _COUNT,
    "boft_n_butterfly_factor": _WHOLE._replace(default=1),
    "bias": _biases("boft"),
}


def _choice(*words):
    expected = ", ".join(map(repr, words[:-1])) + f" or {words[-1]!r}"
    return Field(lambda value: value in words, expected)


_GLORA = {
    **_MODULES,
    "r": _WHOLE,
    "bias": _biases("glora"),
    "config_A_B": _choice("lora", "vector", "constant", "none")._replace(
        default="lora"
    ),
    "config_C": _choice("lora", "vector", "none")._replace(default="lora"),
    "config_D_E": _choice("vector", "constant", "none")._replace(
        default="constant"
    ),
}

# What is understood of each kind. Another one is added here and in `kinds`.
KNOWN: dict[str, dict[str, Field]] = {
    "LORA": _LORA,
    "ADALORA": _ADALORA,
    "VERA": _VERA,
    "LOHA": _LYCORIS,
    "LOKR": _LOKR,
    "OFT": _OFT,
    "BOFT": _BOFT,
    "GLORA": _GLORA,
    "IA3": {**_PLACES, "feedforward_modules": _NAMES},
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
}

# Fields that change what is computed in ways that are not supported.
REFUSED = {
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
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Fields that count only where the training goes on, and are not here.
ONLY_TRAINING = (
    "boft_dropout",
    "module_dropout",
    "rank_dropout",
    "rank_dropout_scale",
)

# Fields that change nothing once an adapter is trained.
NO_MATTER = {
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
    "projection_prng_key",
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
