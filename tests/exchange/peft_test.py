"""HF PEFT itself on the other side, on tiny random models of transformers."""

import numpy as np
import pytest
from keras import ops
from peft_folders import distance
from peft_folders import read
from peft_models import FAMILIES
from peft_models import loaded
from peft_models import make_bases
from peft_models import our_logits
from peft_models import ours
from peft_models import their_logits
from peft_models import theirs
from peft_models import token_ids
from peft_models import trained
from peft_models import with_noise

import keras_spectral as ks

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


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
    family, config = {**_CASES, **_others()}[case]
    config = _lora(config) if isinstance(config, dict) else config
    base = theirs(bases, family)
    task = FAMILIES[family][2][1]
    if family != "vit":
        config.task_type = "CAUSAL_LM" if "LM" in task else "SEQ_CLS"
    model = with_noise(peft.get_peft_model(base, config).eval())
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
    model = trained(ks.wrap_model(ours(bases, family), method, **options))
    before = our_logits(model, family)
    ks.save_peft(model, tmp_path)
    there = loaded(bases, family, tmp_path)
    assert distance(their_logits(there, family), before) < 1e-5


def test_a_backbone_serves_as_a_bare_model(bases, tmp_path):
    import torch
    import transformers

    backbone = ours(bases, "bert").backbone
    trained(ks.wrap_model(backbone, "lora", "all-linear", rank=2))
    ks.save_peft(backbone, tmp_path)
    base = transformers.BertModel.from_pretrained(bases / "bert").eval()
    there = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = token_ids()
    with torch.no_grad():
        expected = there(torch.tensor(ids)).last_hidden_state
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    found = backbone({**x, "segment_ids": np.zeros_like(ids)})
    found = ops.convert_to_numpy(found["sequence_output"])
    assert distance(found, expected) < 1e-5
