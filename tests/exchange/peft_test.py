"""HF PEFT itself on the other side, on tiny random models of transformers."""

import warnings

import keras_hub
import numpy as np
import pytest
from keras import ops
from peft_folders import distance
from peft_folders import inputs
from peft_folders import read

import keras_spectral as ks

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore")]

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
_FAMILIES = {
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


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder for each family, with a random base in it."""
    import torch
    import transformers

    home = tmp_path_factory.mktemp("bases")
    for family, (name, options, _) in _FAMILIES.items():
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


def theirs(bases, family):
    import transformers

    kind = getattr(transformers, _FAMILIES[family][0])
    return kind.from_pretrained(bases / family).eval()


def ours(bases, family):
    backbone, task = _FAMILIES[family][2]
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
        x = {"input_ids": _ids(), "attention_mask": np.ones_like(_ids())}
    with torch.no_grad():
        return model(**{k: torch.tensor(v) for k, v in x.items()}).logits


def our_logits(model, family):
    if family == "vit":  # whose class there reads the first token
        tokens = model.backbone(_images())
        return ops.convert_to_numpy(model.output_dense(tokens[:, 0]))
    return ops.convert_to_numpy(model({**inputs(model), "token_ids": _ids()}))


def _ids():
    return np.random.default_rng(1).integers(3, 30, (2, 6))


def _images():
    return np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype("float32")


def loaded(bases, family, folder):
    """PEFT's model of a folder, without a word of missing keys."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(theirs(bases, family), folder)
    assert not [str(w.message) for w in said if "key" in str(w.message)]
    return model.eval()


_QV = ["query", "value"]
_PROJ = ["q_proj", "v_proj"]
_HEAD = {"modules_to_save": ["classifier"]}
_LORA = {"r": 3, "lora_alpha": 6}
_CASES = {
    "bert all": ("bert", {"target_modules": ["query", "value", "dense"]}),
    "distilbert": ("distilbert", {"target_modules": ["q_lin", "lin1"]}),
    "roberta": ("roberta", {"target_modules": ["query", "dense"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "llama": ("llama", {"target_modules": [*_PROJ, "down_proj"]}),
    "gemma": ("gemma", {"target_modules": [*_PROJ, "o_proj"]}),
    "mixtral": ("mixtral", {"target_modules": _PROJ}),
    "vit": ("vit", {"target_modules": [*_PROJ, "fc1"], **_HEAD}),
    "vit conv": ("vit", {"target_modules": ["projection"], **_HEAD}),
    "vit conv dora": (
        "vit",
        {"target_modules": ["projection"], "use_dora": True, **_HEAD},
    ),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}),
    "patterns": (
        "bert",
        {
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {"layer.1.attention.self.query": 2},
            "alpha_pattern": {"value": 5, "output.dense": 2},
            "exclude_modules": ["pooler.dense"],
            "use_rslora": True,
        },
    ),
    "biases": ("bert", {"target_modules": _QV, "bias": "all"}),
    "own biases": ("bert", {"target_modules": _QV, "bias": "lora_only"}),
    "lora_bias": ("bert", {"target_modules": _QV, "lora_bias": True}),
    "embedding": ("bert", {"target_modules": ["word_embeddings"]}),
    "large": ("llama", {"target_modules": ["v_proj"], "r": 6}),
    "regex": ("llama", {"target_modules": r".*\.layers\.0\..*(q|v)_proj"}),
    "layers": (
        "llama",
        {"target_modules": _PROJ, "layers_to_transform": [1]},
    ),
    "saved": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "embed_tokens", "norm"],
        },
    ),
}


def _lora(options):
    return peft.LoraConfig(**{**_LORA, **options})


def _others():
    """Cases of other kinds."""
    adalora = {"init_r": 3, "target_r": 2, "total_step": 9, "lora_alpha": 6}
    prompt = {"num_virtual_tokens": 4}
    return {
        "adalora": ("bert", peft.AdaLoraConfig(target_modules=_QV, **adalora)),
        "gpt2 ia3": (
            "gpt2",
            peft.IA3Config(
                target_modules=["c_attn", "mlp.c_proj"],
                feedforward_modules=["mlp.c_proj"],
            ),
        ),
        "prefix": ("llama", peft.PrefixTuningConfig(**prompt)),
        "gemma prefix": ("gemma", peft.PrefixTuningConfig(**prompt)),
        "prompt": ("bert", peft.PromptTuningConfig(**prompt)),
    }


@pytest.mark.parametrize("case", [*_CASES, *_others()])
def test_their_folder_here_and_ours_there(bases, tmp_path, case):
    import torch

    family, config = {**_CASES, **_others()}[case]
    config = _lora(config) if isinstance(config, dict) else config
    base = theirs(bases, family)
    task = _FAMILIES[family][2][1]
    if family != "vit":
        config.task_type = "CAUSAL_LM" if "LM" in task else "SEQ_CLS"
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.2)
    model.save_pretrained(tmp_path / "theirs")
    expected = their_logits(model, family)
    here = ks.load_peft(ours(bases, family), tmp_path / "theirs")
    assert distance(our_logits(here, family), expected) < 1e-5
    ks.save_peft(here, tmp_path / "ours")
    there = loaded(bases, family, tmp_path / "ours")
    assert distance(their_logits(there, family), expected) < 1e-5
    if case in ("large", "adalora", "lora_bias") or "prefix" in case:
        return  # these come out in another form
    wanted, tensors = (read(tmp_path / n)[0] for n in ("theirs", "ours"))
    for name in tensors:
        if not name.endswith("bias"):
            np.testing.assert_array_equal(tensors[name], wanted[name], name)


@pytest.mark.parametrize(
    "family, method, options",
    [
        ("bert", "spectral", {"rank": 2}),
        ("bert", "spectral", {"rank": 2, "mode": "rotate"}),
        ("llama", "lora", {"rank": 2, "initializer": "pissa", "alpha": 3}),
        ("llama", "dora", {"rank": 2, "scaling": "rslora"}),
        ("gpt2", "lora", {"target": r".*/(query|value)", "rank": 2}),
        ("gpt2", "dora", {"target": r".*/value", "rank": 2}),
        ("gpt2", "ia3", {"target": r".*/(key|value)"}),
        ("llama", "ia3", {}),
        ("bert", "ia3", {}),
        ("bert", "lora", {"rank": 2, "trainable": "biases"}),
        ("bert", "lora", {"target": "all-linear", "rank": 2}),
        ("vit", "lora", {"target": "all-linear", "rank": 2}),
        ("vit", "conv_lora", {"rank": 2}),
        ("llama", "prefix", {"length": 3}),
    ],
)
def test_what_is_trained_here_serves_there(
    bases, tmp_path, family, method, options
):
    model = ks.wrap_model(ours(bases, family), method, **options)
    rng = np.random.default_rng(2)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    before = our_logits(model, family)
    ks.save_peft(model, tmp_path)
    there = loaded(bases, family, tmp_path)
    assert distance(their_logits(there, family), before) < 1e-5


def test_a_backbone_serves_as_a_bare_model(bases, tmp_path):
    import torch
    import transformers

    backbone = ours(bases, "bert").backbone
    ks.wrap_model(backbone, "lora", "all-linear", rank=2)
    rng = np.random.default_rng(2)
    for weight in backbone.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.1, weight.shape))
    ks.save_peft(backbone, tmp_path)
    base = transformers.BertModel.from_pretrained(bases / "bert").eval()
    there = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = _ids()
    with torch.no_grad():
        expected = there(torch.tensor(ids)).last_hidden_state
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    found = backbone({**x, "segment_ids": np.zeros_like(ids)})
    found = ops.convert_to_numpy(found["sequence_output"])
    assert distance(found, expected) < 1e-5
