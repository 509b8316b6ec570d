"""Tiny random models of transformers, and the same ones here."""

import warnings

import keras_hub
import numpy as np
from keras import ops
from peft_folders import inputs

_SIZES = {
    "vocab_size": 32,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_key_value_heads": 1,
    "num_labels": 3,
    "type_vocab_size": 1,
    "image_size": 8,
    "patch_size": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# For each family its class and options there, and its names here.
FAMILIES = {
    "bert": (
        "BertForSequenceClassification",
        {"hidden_act": "gelu_new", "type_vocab_size": 2},
        ("BertBackbone", "BertTextClassifier"),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"hidden_dim": 16},
        ("DistilBertBackbone", "DistilBertTextClassifier"),
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        {"layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0},
        ("RobertaBackbone", "RobertaTextClassifier"),
    ),
    "gpt2": ("GPT2LMHeadModel", {}, ("GPT2Backbone", "GPT2CausalLM")),
    "llama": ("LlamaForCausalLM", {}, ("Llama3Backbone", "Llama3CausalLM")),
    "gemma": (
        "GemmaForCausalLM",
        {"head_dim": 6},
        ("GemmaBackbone", "GemmaCausalLM"),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {"num_local_experts": 2},
        ("MixtralBackbone", "MixtralCausalLM"),
    ),
    "vit": (
        "ViTForImageClassification",
        {},
        ("ViTBackbone", "ViTImageClassifier"),
    ),
}


def make_bases(home, families=FAMILIES):
    """Makes a folder for each family, with a random base in it."""
    import torch
    import transformers

    for family in families:
        name, options, _ = FAMILIES[family]
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**{**_SIZES, **options}))
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight.normal_(0, 0.3)
                if "token_type" in key and family == "roberta":
                    weight.zero_()  # KerasHub has none
        model.save_pretrained(home / family)
    return home


def with_noise(model):
    """PEFT's model with other numbers in all that it trains."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    return model


def trained(model):
    """Our model with other numbers in all that it trains."""
    rng = np.random.default_rng(2)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    return model


def theirs(bases, family):
    import transformers

    kind = getattr(transformers, FAMILIES[family][0])
    return kind.from_pretrained(bases / family).eval()


def ours(bases, family):
    backbone, task = FAMILIES[family][2]
    backbone = getattr(keras_hub.models, backbone)
    options = {"num_classes": 3} if "Classifier" in task else {}
    return getattr(keras_hub.models, task)(
        backbone=backbone.from_preset(str(bases / family)),
        preprocessor=None,
        **options,
    )


def their_logits(model, family):
    import torch

    if family == "vit":
        x = {"pixel_values": np.moveaxis(_images(), -1, 1)}
    else:
        x = {
            "input_ids": token_ids(),
            "attention_mask": np.ones_like(token_ids()),
        }
    with torch.no_grad():
        return model(**{k: torch.tensor(v) for k, v in x.items()}).logits


def our_logits(model, family):
    if family == "vit":  # whose class there reads the first token
        tokens = model.backbone(_images())
        return ops.convert_to_numpy(model.output_dense(tokens[:, 0]))
    return ops.convert_to_numpy(
        model({**inputs(model), "token_ids": token_ids()})
    )


def token_ids():
    return np.random.default_rng(1).integers(3, 30, (2, 6))


def _images():
    return np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")


def loaded(bases, family, folder):
    """PEFT's model of a folder, without missing or unexpected keys."""
    import peft
    from safetensors.torch import load_file

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(theirs(bases, family), folder)
    assert not [str(w.message) for w in said if "key" in str(w.message)]
    tensors = load_file(folder / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(model, tensors)
    # The tensor of a prompt is loaded apart.
    assert set(result.unexpected_keys) <= {"prompt_embeddings"}
    return model.eval()
