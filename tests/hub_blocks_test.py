"""Block adapters on real architectures, and in generation."""

import keras
import numpy as np
import pytest
from hub_models import MODELS
from keras import ops

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places

pytestmark = pytest.mark.compiled

keras_hub = pytest.importorskip("keras_hub")

# The number of blocks of each family's tiny model.
FAMILIES = {
    "albert": 1,
    "bart": 4,
    "bert": 2,
    "clip": 4,
    "deberta_v3": 2,
    "distil_bert": 2,
    "electra": 2,
    "gemma": 2,
    "gemma3": 2,
    "gpt2": 2,
    "llama": 2,
    "mistral": 2,
    "opt": 2,
    "phi3": 2,
    "qwen": 2,
    "qwen3": 2,
    "roberta": 2,
    "smollm3": 2,
    "t5": 4,
    "vit": 2,
    "whisper": 4,
}
# Where each case is compiled: one for each form of attention and of mask.
COMPILED = ("bart", "bert", "deberta_v3", "gemma", "llama", "t5", "vit")
CASES = {case.name: case for case in MODELS}


def _families():
    compiled = keras.backend.backend() != "torch"
    return [n for n in FAMILIES if not compiled or n in COMPILED]


def _randomize(model, size=0.5):
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, size, weight.shape))


def _outputs(model, inputs):
    flat = keras.tree.flatten(model(inputs))
    return [ops.convert_to_numpy(ops.cast(x, "float32")) for x in flat]


def _error(outputs, others):
    pairs = zip(outputs, others)
    return max(np.abs(x - y).max() / max(1, np.abs(y).max()) for x, y in pairs)


@pytest.mark.filterwarnings("ignore:(?s).*does not support masking:UserWarning")
@pytest.mark.parametrize("family", _families())
def test_all_parts_in_every_family(family):
    keras.utils.set_random_seed(0)
    case = CASES[f"{family}_backbone"]
    model, inputs = case.make(), case.inputs()
    plain = _outputs(model, inputs)
    ks.wrap_model(model, "unipelt", lora=2, prefix=3, bottleneck=8)
    assert len(adapter_places(model)) == FAMILIES[family]
    _randomize(model)
    adapted = _outputs(model, inputs)
    assert _error(adapted, plain) > 1e-3
    with ks.adapters_disabled(model):
        assert _error(_outputs(model, inputs), plain) < 1e-5
    if keras.backend.backend() == "torch":
        _check_every_weight_matters(model, inputs)
    ks.unwrap_model(model)
    assert _error(_outputs(model, inputs), plain) == 0


def _check_every_weight_matters(model, inputs):
    rng = np.random.default_rng(2)
    total = 0.0
    for x in keras.tree.flatten(model(inputs)):
        direction = rng.normal(size=tuple(x.shape)).astype("float32")
        total = total + ops.sum(x * ops.convert_to_tensor(direction))
    total.backward()
    for weight in model.trainable_weights:
        gradient = weight.value.grad
        assert gradient is not None, weight.path
        assert float(ops.max(ops.abs(gradient))) > 0, weight.path


def test_padding_is_without_effect_on_bert():
    keras.utils.set_random_seed(0)
    case = CASES["bert_backbone"]
    model, inputs = case.make(), case.inputs()
    ks.wrap_model(model, "unipelt", lora=2, prefix=3, bottleneck=8)
    _randomize(model)
    kept = inputs["padding_mask"] == 1
    before = ops.convert_to_numpy(model(inputs)["sequence_output"])[kept]
    tokens = np.where(kept, inputs["token_ids"], 7)
    after = model({**inputs, "token_ids": tokens})["sequence_output"]
    after = ops.convert_to_numpy(after)[kept]
    np.testing.assert_allclose(after, before, atol=1e-5)


SIZES = dict(
    vocabulary_size=40, num_layers=2, hidden_dim=16, intermediate_dim=32
)
GROUPED = dict(SIZES, num_query_heads=4, num_key_value_heads=2)
LANGUAGE_MODELS = {
    "GPT2": dict(SIZES, num_heads=2, max_sequence_length=16),
    "OPT": dict(SIZES, num_heads=2, max_sequence_length=16),
    "Llama": GROUPED,
    "Mistral": dict(GROUPED, sliding_window=3),
    "Qwen": GROUPED,
    "Qwen3": dict(GROUPED, head_dim=4),
    "Phi3": GROUPED,
    "Gemma": dict(
        GROUPED,
        head_dim=4,
        use_sliding_window_attention=True,
        sliding_window_size=3,
    ),
}


def _language_models():
    compiled = keras.backend.backend() != "torch"
    return [
        n for n in LANGUAGE_MODELS if not compiled or n in ("GPT2", "Gemma")
    ]


def _language_model(name):
    keras.utils.set_random_seed(0)
    home = keras_hub.models
    backbone = getattr(home, f"{name}Backbone")(**LANGUAGE_MODELS[name])
    return getattr(home, f"{name}CausalLM")(backbone, preprocessor=None)


@pytest.mark.parametrize("method", ["prefix", "bottleneck"])
@pytest.mark.parametrize("name", _language_models())
def test_generates_the_same_with_and_without_a_cache(name, method):
    model = _language_model(name)
    ks.wrap_model(model, method)
    _randomize(model)
    model.compile(sampler="greedy")
    rng = np.random.default_rng(0)
    mask = np.zeros((2, 8), "int32")
    mask[0, :4] = 1
    mask[1, :3] = 1
    tokens = rng.integers(1, 40, mask.shape) * mask
    got = model.generate(
        {"token_ids": tokens, "padding_mask": mask}, stop_token_ids=None
    )["token_ids"]
    for i in range(3, 8):
        seen = np.tile(np.arange(8) < i, (2, 1)).astype("int32")
        logits = model({"token_ids": tokens, "padding_mask": seen})
        chosen = ops.convert_to_numpy(logits)[:, i - 1].argmax(axis=-1)
        tokens[:, i] = np.where(mask[:, i] == 1, tokens[:, i], chosen)
    np.testing.assert_array_equal(np.asarray(got), tokens)


def _bert_inputs():
    rng = np.random.default_rng(0)
    mask = np.ones((4, 6), "int32")
    mask[1, 4:] = 0
    return {
        "token_ids": rng.integers(1, 40, mask.shape).astype("int32") * mask,
        "segment_ids": np.zeros_like(mask),
        "padding_mask": mask,
    }


def test_soft_prompt_on_a_classifier(tmp_path):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        **SIZES, num_heads=2, max_sequence_length=12
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )
    inputs = _bert_inputs()
    plain = model.predict(inputs, verbose=0)
    ks.wrap_model(model, "soft_prompt", length=3)
    (place,) = adapter_places(model)
    assert place.key == "bert_backbone"
    _randomize(model)
    adapted = model.predict(inputs, verbose=0)
    assert np.abs(adapted - plain).max() > 1e-4
    hidden = {k: v.copy() for k, v in inputs.items()}
    hidden["token_ids"][1, 4:] = 9  # under the mask
    np.testing.assert_allclose(
        model.predict(hidden, verbose=0), adapted, atol=1e-5
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(inputs, np.array([0, 1, 0, 1]), verbose=0)
    ks.save_adapters(model, tmp_path / "prompt.safetensors")
    trained = model.predict(inputs, verbose=0)
    ks.unwrap_model(model)
    ks.load_adapters(model, tmp_path / "prompt.safetensors")
    again = model.predict(inputs, verbose=0)
    np.testing.assert_allclose(again, trained, atol=1e-6)


def test_soft_prompt_refuses_what_generates_and_pairs():
    with pytest.raises(ValueError, match="generates text"):
        ks.wrap_model(_language_model("GPT2"), "soft_prompt")
    bart = CASES["bart_backbone"].make()
    with pytest.raises(ValueError, match="encoder and a decoder"):
        ks.SoftPrompt(bart)
