"""What KerasHub's converters do not tell: prefixes, heads, changed names."""

import re

import keras

from keras_spectral.model.adapted import plain_class

# The attribute of a Hugging Face task that holds the model, where the
# converter's names do not begin with it.
_PREFIXES = {
    "BertBackbone": "bert",
    "ESMBackbone": "esm",
    "GPT2Backbone": "transformer",
    "SwinTransformerBackbone": "swin",
    "XLMRobertaBackbone": "roberta",
}

# Where a task's own layers are in the Hugging Face class of its kind.
_HEADS = {
    "AlbertTextClassifier": {"logits": "classifier"},
    "BertTextClassifier": {"logits": "classifier"},
    "DistilBertTextClassifier": {
        "pooled_dense": "pre_classifier",
        "logits": "classifier",
    },
    "ESMProteinClassifier": {
        "pooled_dense": "classifier.dense",
        "logits": "classifier.out_proj",
    },
    "RobertaTextClassifier": {
        "pooled_dense": "classifier.dense",
        "logits": "classifier.out_proj",
    },
    "XLMRobertaTextClassifier": {
        "pooled_dense": "classifier.dense",
        "logits": "classifier.out_proj",
    },
}

# PEFT's word for a task, and whether its class holds the model as a part.
_TASKS = {
    "CausalLM": ("CAUSAL_LM", True),
    "TextClassifier": ("SEQ_CLS", True),
    "ImageClassifier": (None, True),
    "MaskedLM": (None, True),
}

# Names on the disk that transformers 5 changed in memory, which is what PEFT
# sees: (what the name contains, patterns, replacements).
_VISION = (
    (r"attention\.(?:attention|self)\.(query|key|value)\b", r"attention.\1"),
    (r"attention\.(q|k|v)(?:uery|ey|alue)\b", r"attention.\1_proj"),
    (r"attention\.output\.dense\b", "attention.o_proj"),
    (r"intermediate\.dense\b", "mlp.fc1"),
    (r"output\.dense\b", "mlp.fc2"),
)
_RENAMED = {
    "ViTBackbone": ((r"^encoder\.layer\.", "layers."), *_VISION),
    "DeiTBackbone": ((r"^encoder\.layer\.", "layers."), *_VISION),
    "SwinTransformerBackbone": _VISION,
    "MixtralBackbone": ((r"\bblock_sparse_moe\b", "mlp"),),
}


def family(model: keras.Model) -> list[str]:
    """The names of a model's class and of those it is made of."""
    return [kind.__name__ for kind in plain_class(model).__mro__]


def part_prefix(backbone: keras.Model, keys: list[str]) -> str:
    """What the names of a model's tensors begin with inside of a task.

    Args:
        backbone: The model.
        keys: The names that its converter gives to them.
    """
    for name in family(backbone):
        if name in _PREFIXES:
            return f"{_PREFIXES[name]}."
    first = {k.partition(".")[0] for k in keys if not is_top(k)}
    return f"{first.pop()}." if len(first) == 1 else "model."


def is_top(key: str) -> bool:
    """Whether a tensor is the task's own, whatever the model is called."""
    return key.startswith("lm_head.")


def task_of(model: keras.Model) -> tuple[str | None, bool]:
    """PEFT's word for a task, and whether its names begin with a prefix."""
    for name in family(model):
        if name in _TASKS:
            return _TASKS[name]
    return "FEATURE_EXTRACTION", False


def head_names(model: keras.Model) -> dict[str, str]:
    """Hugging Face's names of a task's own layers, by their names."""
    for name in family(model):
        if name in _HEADS:
            return _HEADS[name]
    return {}


def in_memory(backbone: keras.Model, name: str) -> str:
    """What transformers 5 calls a module that files call otherwise."""
    for kind in family(backbone):
        for pattern, replacement in _RENAMED.get(kind, ()):
            name = re.sub(pattern, replacement, name)
    return name
