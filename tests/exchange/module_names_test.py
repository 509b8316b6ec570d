import hub_models
import numpy as np
import peft_folders
import pytest
from keras import ops

from keras_spectral.exchange.names import HubNames
from keras_spectral.exchange.recorder import recorded_sources
from keras_spectral.exchange.slots import slot_of
from keras_spectral.exchange.slots import to_tensor
from keras_spectral.kernels import kernel_view
from keras_spectral.model.wrap import wrap_model

pytestmark = pytest.mark.once

_PLAIN = (
    "albert bert distil_bert esm gemma gemma4 gpt2 llama3 mistral mixtral "
    "qwen qwen_moe qwen3 qwen3_moe roberta smollm3 vit deit dinov3 xlm_roberta"
).split()
_MODELS = {model.name: model for model in hub_models.MODELS}


@pytest.mark.parametrize("family", _PLAIN)
def test_kernels_come_from_plain_modules(family):
    model = _MODELS[f"{family}_backbone"].make()
    before = [ops.convert_to_numpy(w) for w in model.weights]
    kernels = [s for s in recorded_sources(model) if s.attribute == "kernel"]
    assert len(kernels) >= 8
    for source in kernels:
        slot = slot_of(source)
        linear = "conv1d" if family == "gpt2" else "linear"
        is_conv = hasattr(source.layer, "kernel_size")
        assert slot.layout == ("conv" if is_conv else linear)
        assert source.key.endswith(".weight")
    for weight, value in zip(model.weights, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)


def test_tensor_and_weight_are_made_of_each_other():
    model = peft_folders.bert()
    for key, weights in HubNames(model).tensors.items():
        source = weights[0].source
        value = getattr(source.layer, source.attribute)
        tensor = to_tensor(slot_of(source), source.layer, value)
        back = source.read(tensor)
        np.testing.assert_array_equal(back, ops.convert_to_numpy(value), key)
        if source.attribute == "kernel":
            view = kernel_view(source.layer)
            matrix = ops.convert_to_numpy(view.matrix())
            np.testing.assert_array_equal(tensor, matrix.T)


def test_fused_module_has_a_slice_for_each_layer():
    names = HubNames(peft_folders.gpt2())
    parts = names.parts("h.1.attn.c_attn")
    assert [p.place.path.rpartition("/")[2] for p in parts] == [
        "query",
        "key",
        "value",
    ]
    assert [(p.columns.start, p.columns.stop) for p in parts] == [
        (0, 8),
        (8, 16),
        (16, 24),
    ]
    assert {p.slot.total for p in parts} == {24}


def test_prefix_follows_the_task():
    task = peft_folders.bert()
    path = "encoder.layer.0.attention.self.query"
    assert HubNames(task).path(path) == f"bert.{path}"
    assert HubNames(task.backbone).path(path) == path
    assert HubNames(task).path("classifier") == "classifier"
    task = peft_folders.llama()
    path = "layers.0.mlp.up_proj"
    assert HubNames(task).path(path) == f"model.{path}"
    assert HubNames(task.backbone).path(path) == path
    assert HubNames(task).path("lm_head.weight") == "lm_head.weight"


@pytest.mark.parametrize(
    "path",
    [
        "vit.layers.1.attention.o_proj",
        "vit.encoder.layer.1.attention.output.dense",
        "encoder.layer.1.attention.output.dense",
    ],
)
def test_renamed_modules_are_found_by_both_names(path):
    names = HubNames(_MODELS["vit_backbone"].make())
    found = names.module(path)
    assert found.name == "encoder.layer.1.attention.output.dense"
    assert found.renamed == ("o_proj" in path)
    assert names.path(found.name) == "layers.1.attention.o_proj"


def test_wrapped_model_has_the_names_of_the_plain_one():
    model = peft_folders.bert()
    plain = {k: w[0].place.key for k, w in HubNames(model).tensors.items()}
    wrap_model(model, "lora", "all-linear", rank=2)
    wrap_model(model, "bottleneck", adapter="other", size=2)
    found = {k: w[0].place.key for k, w in HubNames(model).tensors.items()}
    assert found == plain


def test_model_without_converter_is_refused():
    model = _MODELS["t5_backbone"].make()
    with pytest.raises(ValueError, match="T5Backbone.*no converter.*Bert"):
        HubNames(model)
