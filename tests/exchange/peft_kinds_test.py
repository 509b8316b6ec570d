"""HF PEFT itself on the other side: VeRA, LoHa, LoKr, OFT, BOFT, GLoRA."""

import numpy as np
import pytest
from peft_folders import distance
from peft_folders import read
from peft_models import FAMILIES
from peft_models import loaded
from peft_models import make_bases
from peft_models import our_logits
from peft_models import ours
from peft_models import their_logits
from peft_models import theirs
from peft_models import trained
from peft_models import with_noise

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.once, pytest.mark.filterwarnings("ignore")]

_BERT = {"target_modules": ["query", "value", "dense"]}
_LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
_GPT2 = {"target_modules": ["c_fc", "mlp.c_proj"]}
_CONV = {"target_modules": ["projection"], "modules_to_save": ["classifier"]}
_LOHA = {"r": 2, "alpha": 3}
_LOKR = {"r": 1, "alpha": 3}
_OFT = {"oft_block_size": 4, "use_cayley_neumann": False}
_BOFT = {"boft_block_size": 4}
_SERIES = {"use_cayley_neumann": True}
_PATTERNS = {
    "rank_pattern": {"layer.1.attention.self.query": 3},
    "alpha_pattern": {"value": 5},
    "exclude_modules": ["pooler.dense"],
}
_CASES = {
    "vera bert": ("bert", "Vera", {"r": 5, **_BERT}),
    "vera llama": ("llama", "Vera", {"r": 20, "d_initial": 0.3, **_LLAMA}),
    "vera gpt2": ("gpt2", "Vera", {"r": 5, **_GPT2}),
    "vera biases": ("bert", "Vera", {"r": 5, "bias": "all", **_BERT}),
    "loha bert": ("bert", "LoHa", {**_LOHA, **_BERT, **_PATTERNS}),
    "loha llama": ("llama", "LoHa", {**_LOHA, **_LLAMA}),
    "loha large": ("llama", "LoHa", {"r": 6, "alpha": 3, **_LLAMA}),
    "loha conv": ("vit", "LoHa", {**_LOHA, **_CONV}),
    "loha core": (
        "vit",
        "LoHa",
        {**_LOHA, **_CONV, "use_effective_conv2d": True},
    ),
    "lokr bert": ("bert", "LoKr", {**_LOKR, **_BERT, **_PATTERNS}),
    "lokr both": ("bert", "LoKr", {**_LOKR, **_BERT, "decompose_both": True}),
    "lokr llama": ("llama", "LoKr", {**_LOKR, **_LLAMA}),
    "lokr factor": (
        "llama",
        "LoKr",
        {**_LOKR, **_LLAMA, "decompose_factor": 2, "layers_to_transform": [1]},
    ),
    "lokr whole": ("llama", "LoKr", {**_LLAMA, "r": 9, "alpha": 3}),
    "lokr conv": ("vit", "LoKr", {**_LOKR, **_CONV}),
    "lokr conv whole": ("vit", "LoKr", {**_CONV, "r": 4}),
    "oft bert": ("bert", "OFT", {**_OFT, **_BERT}),
    "oft llama": ("llama", "OFT", {**_OFT, **_LLAMA}),
    "oft series": ("llama", "OFT", {**_OFT, **_SERIES, **_LLAMA}),
    "oft series of 3": (
        "bert",
        "OFT",
        {**_OFT, **_SERIES, **_BERT, "num_cayley_neumann_terms": 3},
    ),
    "oft series of 7": (
        "bert",
        "OFT",
        {**_OFT, **_SERIES, **_BERT, "num_cayley_neumann_terms": 7},
    ),
    "oft shared": ("bert", "OFT", {**_OFT, **_BERT, "block_share": True}),
    "oft coft": ("llama", "OFT", {**_OFT, **_LLAMA, "coft": True, "eps": 0.3}),
    "oft blocks": (
        "llama",
        "OFT",
        {**_OFT, **_LLAMA, "oft_block_size": 0, "r": 2},
    ),
    "oft other size": ("llama", "OFT", {**_OFT, **_LLAMA, "oft_block_size": 3}),
    "oft biases": ("bert", "OFT", {**_OFT, **_BERT, "bias": "oft_only"}),
    "boft bert": ("bert", "BOFT", {**_BOFT, **_BERT}),
    "boft llama": ("llama", "BOFT", {**_BOFT, **_LLAMA}),
    "boft factors": (
        "llama",
        "BOFT",
        {**_BOFT, **_LLAMA, "boft_n_butterfly_factor": 2},
    ),
    "boft without CUDA": (
        "llama",
        "BOFT",
        {**_BOFT, **_LLAMA, "boft_n_butterfly_factor": 2},
    ),
    "boft blocks": (
        "llama",
        "BOFT",
        {"boft_block_size": 0, "boft_block_num": 2, **_LLAMA},
    ),
    "boft conv": ("vit", "BOFT", {**_BOFT, **_CONV}),
    "glora bert": ("bert", "Glora", {"r": 2, **_BERT}),
    "glora vectors": (
        "bert",
        "Glora",
        {
            "r": 2,
            "config_A_B": "vector",
            "config_C": "vector",
            "config_D_E": "vector",
            **_BERT,
        },
    ),
    "glora numbers": (
        "bert",
        "Glora",
        {"r": 2, "config_A_B": "constant", "config_C": "none", **_BERT},
    ),
    "glora llama": ("llama", "Glora", {"r": 2, **_LLAMA}),
}
# These come out in another form, or with fields that say the same.
_OTHER = ("loha large", "oft series of 3")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    home = tmp_path_factory.mktemp("bases")
    return make_bases(home, ("bert", "gpt2", "llama", "vit"))


class _BlockDiagonal:
    """Stands for PEFT's CUDA code."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*x) for x in blocks])]


@pytest.fixture(autouse=True)
def cuda(request, monkeypatch):
    """Without its CUDA code, PEFT's BOFT has one factor."""
    found = None if "without CUDA" in request.node.name else _BlockDiagonal
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: found)


def _theirs_with(bases, family, kind, options):
    config = getattr(peft, f"{kind}Config")(**options)
    task = FAMILIES[family][2][1]
    if family != "vit":
        config.task_type = "CAUSAL_LM" if "LM" in task else "SEQ_CLS"
    return peft.get_peft_model(theirs(bases, family), config).eval()


@pytest.mark.parametrize("case", _CASES)
def test_their_folder_here_and_ours_there(bases, tmp_path, case):
    family, kind, options = _CASES[case]
    plain = their_logits(theirs(bases, family), family)
    model = with_noise(_theirs_with(bases, family, kind, options))
    expected = their_logits(model, family)
    assert distance(expected, plain) > 1e-2
    model.save_pretrained(tmp_path / "theirs")
    here = ks.load_peft(ours(bases, family), tmp_path / "theirs")
    assert distance(our_logits(here, family), expected) < 1e-5
    methods = {place.layer.method for place in adapter_places(here)}
    assert kind.lower() in methods
    if case == "oft other size":
        return  # which PEFT chose for each layer
    ks.save_peft(here, tmp_path / "ours")
    there = loaded(bases, family, tmp_path / "ours")
    assert distance(their_logits(there, family), expected) < 1e-5
    if case in _OTHER:
        return
    wanted, fields = read(tmp_path / "theirs")
    tensors, config = read(tmp_path / "ours")
    for name in tensors:
        if not name.endswith("bias"):
            np.testing.assert_array_equal(tensors[name], wanted[name], name)
    for name in ("r", "alpha", "eps", "bias", "use_effective_conv2d"):
        if name in config:
            assert config[name] == fields[name], name


@pytest.mark.parametrize(
    "family, method, options",
    [
        ("bert", "vera", {"rank": 12}),
        ("gpt2", "vera", {"rank": 12, "target": r".*feedforward.*_dense"}),
        ("llama", "vera", {"rank": 4, "dropout": 0.1, "d_initial": 0.5}),
        ("bert", "loha", {"rank": 3, "alpha": 1.5}),
        ("vit", "loha", {"rank": 2, "target": r".*patch_embedding.*"}),
        (
            "vit",
            "loha",
            {"rank": 2, "cp": True, "target": r".*patch_embedding.*"},
        ),
        ("llama", "lokr", {"rank": 1, "alpha": 2}),
        ("bert", "lokr", {"rank": 1, "factor": 2, "decompose_both": True}),
        ("vit", "lokr", {"rank": 1, "target": r".*patch_embedding.*"}),
        ("bert", "oft", {"block_size": 4}),
        ("llama", "oft", {"block_size": 2, "eps": 0.2, "block_share": True}),
        ("llama", "oft", {"block_size": 8, "neumann_terms": 6}),
        ("bert", "boft", {"block_size": 2}),
        ("llama", "boft", {"block_size": 4, "factors": 2}),
        ("bert", "boft", {"block_size": 4, "trainable": "biases"}),
        ("vit", "boft", {"block_size": 6, "target": r".*patch_embedding.*"}),
        ("bert", "glora", {"rank": 2}),
        (
            "bert",
            "glora",
            {"rank": 2, "parts": {"c": "none", "d": "none", "e": "none"}},
        ),
    ],
)
def test_what_is_trained_here_serves_there(
    bases, tmp_path, family, method, options
):
    options = {"target": "all-linear", **options}
    model = trained(ks.wrap_model(ours(bases, family), method, **options))
    before = our_logits(model, family)
    errors = ks.save_peft(model, tmp_path)
    assert errors and not any(errors.values())
    there = loaded(bases, family, tmp_path)
    assert distance(their_logits(there, family), before) < 1e-5


@pytest.mark.parametrize(
    "family, kind, options, match",
    [
        ("gpt2", "Vera", {"target_modules": ["c_attn"]}, "3 layers here"),
        ("vit", "OFT", {**_OFT, **_CONV}, "patches that overlap"),
        (
            "bert",
            "OFT",
            {**_OFT, "target_modules": ["word_embeddings"]},
            "a table.*turns its columns",
        ),
        (
            "vit",
            "LoKr",
            {**_LOKR, **_CONV, "use_effective_conv2d": True},
            "use_effective_conv2d=True.*lokr_t2",
        ),
        (
            "bert",
            "Vera",
            {**_BERT, "r": 4, "save_projection": False},
            "save_projection=False",
        ),
        (
            "bert",
            "OFT",
            {**_OFT, **_SERIES, **_BERT, "num_cayley_neumann_terms": 2},
            "num_cayley_neumann_terms=2",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(
    bases, tmp_path, family, kind, options, match
):
    model = with_noise(_theirs_with(bases, family, kind, options))
    model.save_pretrained(tmp_path)
    here = ours(bases, family)
    before = our_logits(here, family)
    with pytest.raises(ValueError, match=match):
        ks.load_peft(here, tmp_path)
    assert ks.adapter_names(here) == []
    np.testing.assert_array_equal(our_logits(here, family), before)
