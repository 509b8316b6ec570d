"""The model card of an adapter's folder."""

import json

import keras

from keras_spectral.model.adapted import plain_class

_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}

_SIZES = {
    "lora_alpha": "alpha",
    "alpha": "alpha",
    "oft_block_size": "block size",
    "boft_block_size": "block size",
    "boft_block_num": "blocks",
    "boft_n_butterfly_factor": "factors",
}


def model_card(
    model: keras.Model, config: dict, errors: dict[str, float]
) -> str:
    """The text of README.md: what the adapter is, and how it is used.

    Args:
        model: The model that it was trained on.
        config: PEFT's configuration.
        errors: The relative error of each layer's change.
    """
    base = config["base_model_name_or_path"]
    kind = config["peft_type"]
    is_dora = config.get("use_dora", False)
    tags = ["keras-spectral", ("DoRA" if is_dora else kind).lower()]
    head = ["library_name: peft", f"tags: {json.dumps(tags)}"]
    if base is not None:
        head.insert(0, f"base_model: {json.dumps(base)}")
    name = json.dumps(base or "THE_BASE_MODEL")
    kind_of_model = _TASKS.get(config["task_type"], "AutoModel")
    if kind_of_model == "AutoModel" and config["task_type"] is None:
        kind_of_model = "AutoModelForImageClassification"
    truncated = {path: e for path, e in errors.items() if e}
    lines = [
        "---",
        *head,
        "---",
        "",
        "# Adapter",
        "",
        f"A {'DoRA' if is_dora else kind} adapter for {base or 'a base model'} "
        f"({plain_class(model).__name__} of KerasHub), written by "
        "keras_spectral.",
        "",
        *_sizes(config),
        f"- modules: {len(config.get('target_modules') or [])}",
        f"- trained besides: {', '.join(config['modules_to_save'] or ['-'])}",
        "",
        "## Use",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind_of_model}",
        "",
        f"base = {kind_of_model}.from_pretrained({name}{_classes(config)})",
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
        "```",
        "",
        "In Keras:",
        "",
        "```python",
        "import keras_spectral as ks",
        "",
        'ks.load_peft(model, "THIS_FOLDER")  # a KerasHub model of the base',
        "```",
        "",
    ]
    if truncated:
        worst = max(truncated.values())
        lines += [
            "## Truncation",
            "",
            f"{len(truncated)} of {len(errors)} layers were truncated; the "
            f"largest relative error of a layer's change is {worst:.3g}.",
            "",
        ]
    return "\n".join(lines)


def _sizes(config):
    lines = []
    if config.get("r"):
        ranks = {config["r"], *config.get("rank_pattern", {}).values()}
        ranks = ", ".join(map(str, sorted(ranks)))
        of_blocks = "block_share" in config
        lines.append(f"- {'blocks' if of_blocks else 'rank'}: {ranks}")
    for name, word in _SIZES.items():
        if config.get(name):
            lines.append(f"- {word}: {config[name]}")
    return lines


def _classes(config):
    is_classifier = config["task_type"] == "SEQ_CLS"
    return ", num_labels=NUMBER_OF_CLASSES" if is_classifier else ""
