import keras
import keras_hub
import numpy as np
import peft_folders
import pytest
from keras import ops
from peft_folders import add
from peft_folders import bert
from peft_folders import distance
from peft_folders import golden
from peft_folders import gpt2
from peft_folders import llama
from peft_folders import lora
from peft_folders import outputs
from peft_folders import pair
from peft_folders import write
from safetensors.numpy import load_file

import keras_spectral as ks
from keras_spectral.kernels import kernel_view
from keras_spectral.model.paths import places

QUERY = "encoder.layer.{}.attention.self.query"
QUERIES = [f"bert.{QUERY.format(i)}" for i in (0, 1)]


def arrays(family):
    with np.load(golden(family, "io.npz")) as file:
        return dict(file)


def golden_bert():
    backbone = keras_hub.models.BertBackbone.from_preset(
        str(golden("bert", "base"))
    )
    model = keras_hub.models.BertTextClassifier(
        backbone=backbone, num_classes=3, preprocessor=None
    )
    base = load_file(golden("bert", "base", "model.safetensors"))
    head = model.get_layer("logits")
    head.kernel.assign(base["classifier.weight"].T)
    head.bias.assign(base["classifier.bias"])
    io = arrays("bert")
    ids = io["input_ids"]
    x = {"token_ids": ids, "padding_mask": io["attention_mask"]}
    return model, {**x, "segment_ids": np.zeros_like(ids)}, io


def golden_llama():
    backbone = keras_hub.models.Llama3Backbone.from_preset(
        str(golden("llama", "base"))
    )
    model = keras_hub.models.Llama3CausalLM(
        backbone=backbone, preprocessor=None
    )
    io = arrays("llama")
    x = {"token_ids": io["input_ids"], "padding_mask": io["attention_mask"]}
    return model, x, io


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_equals_peft(family):
    model, x, io = {"bert": golden_bert, "llama": golden_llama}[family]()
    seen = io["attention_mask"] == 1

    def check(name):
        hidden, logits = model.backbone(x), outputs(model, x)
        wanted = io[f"logits_{name}"]
        if family == "bert":
            hidden = hidden["sequence_output"]
        else:
            logits, wanted = logits[seen], wanted[seen]
        assert distance(logits, wanted) < 1e-5
        hidden = ops.convert_to_numpy(hidden)[seen]
        assert distance(hidden, io[f"hidden_{name}"][seen]) < 1e-5

    check("base")
    for name in ("lora", "dora", "ia3"):
        returned = ks.load_peft(model, golden(family, name), adapter=name)
        assert returned is model
        check(name)  # the new one is the only one that is active
    with ks.adapters_disabled(model):
        check("base")
    ks.set_adapters(model, "lora")
    check("lora")
    assert set(ks.adapter_names(model)) == {"lora", "dora", "ia3"}


@pytest.mark.once
def test_backbone_leaves_the_head_out_and_says_so():
    model, x, io = golden_bert()
    with pytest.warns(UserWarning, match="classifier.*parts of a task"):
        ks.load_peft(model.backbone, golden("bert", "lora"))
    hidden = ops.convert_to_numpy(model.backbone(x)["sequence_output"])
    seen = x["padding_mask"] == 1
    assert distance(hidden[seen], io["hidden_lora"][seen]) < 1e-5


@pytest.mark.once
def test_training_goes_on():
    model, x, _ = golden_bert()
    ks.load_peft(model, golden("bert", "lora"))
    trained = {w.path for w in model.trainable_weights}
    assert len(trained) == 2 * 13 + 2
    loss = keras.losses.SparseCategoricalCrossentropy(True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    labels = np.arange(len(x["token_ids"])) % 3
    before = model.evaluate(x, labels, verbose=0)
    model.fit(x, labels, epochs=5, verbose=0)
    assert model.evaluate(x, labels, verbose=0) < before


def added(model, path, scale=2.0, **part):
    """A plain model with the change of one layer in its kernel."""
    place = next(p for p in places(model) if p.path.endswith(path))
    view = kernel_view(place.layer)
    a, b = pair(view.n_in, view.n_out, **part)
    add(view, scale * (b @ a).T)
    return model


@pytest.mark.once
def test_linear_layer(tmp_path):
    path = QUERY.format(1)
    write(tmp_path, lora(f"bert.{path}", 8, 8), target_modules=[path])
    model = ks.load_peft(bert(), tmp_path)
    expected = added(bert(), "transformer_layer_1/self_attention_layer/query")
    assert distance(outputs(model), outputs(expected)) < 1e-5
    assert [tuple(w.shape) for w in model.trainable_weights] == [(8, 2), (2, 8)]


@pytest.mark.parametrize(
    "fields, scale, rank",
    [
        ({"use_rslora": True}, 4 / 2**0.5, 2),
        ({"lora_alpha": 3}, 1.5, 2),
        ({"r": 5, "rank_pattern": {"layer.0.*query": 2}}, 2.0, 2),
        ({"alpha_pattern": {"query": 8}}, 4.0, 2),
        ({"fan_in_fan_out": True}, 2.0, 2),
        ({"r": 12}, 4 / 12, 12),
        ({"lora_dropout": 0.5}, 2.0, 2),
    ],
)
@pytest.mark.once
def test_fields_of_the_strength(tmp_path, fields, scale, rank):
    tensors = lora(QUERIES[0], 8, 8, rank)
    write(tmp_path, tensors, target_modules=QUERIES[:1], **fields)
    model = ks.load_peft(bert(), tmp_path)
    path = "transformer_layer_0/self_attention_layer/query"
    expected = added(bert(), path, scale, rank=rank)
    assert distance(outputs(model), outputs(expected)) < 1e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"bert\.encoder\.layer\.1\..*query"},
        {"target_modules": ["query"], "layers_to_transform": [1]},
        {
            "target_modules": ["query"],
            "layers_to_transform": 1,
            "layers_pattern": "layer",
        },
        {"target_modules": ["query"], "exclude_modules": ["0." + "x", "y"]},
        {"target_modules": ["query"], "exclude_modules": r".*\.0\..*"},
        {"target_modules": None},
    ],
)
@pytest.mark.once
def test_fields_of_the_place(tmp_path, fields):
    write(tmp_path, lora(QUERIES[1], 8, 8), **fields)
    if fields.get("exclude_modules") == ["0.x", "y"]:
        with pytest.raises(ValueError, match="lacks tensors for .*layer.0"):
            ks.load_peft(bert(), tmp_path)
        return
    ks.load_peft(bert(), tmp_path)


@pytest.mark.once
def test_biases(tmp_path):
    rng = np.random.default_rng(2)
    whole, more, norm = rng.normal(size=(3, 8)).astype("float32")
    tensors = lora(QUERIES[0], 8, 8)
    tensors[f"{QUERIES[0]}.base_layer.bias"] = whole
    tensors[f"{QUERIES[0]}.lora_B.bias"] = more
    tensors["bert.encoder.layer.0.output.LayerNorm.bias"] = norm
    fields = {"target_modules": QUERIES[:1], "bias": "all", "lora_bias": True}
    model = ks.load_peft(bert(), write(tmp_path, tensors, **fields))
    path = "transformer_layer_0/self_attention_layer/query"
    expected = added(bert(), path)
    block = expected.backbone.get_layer("transformer_layer_0")
    bias = whole + 2 * more
    block._self_attention_layer.query_dense.bias.assign(bias.reshape(2, 4))
    block._feedforward_layer_norm.beta.assign(norm)
    assert distance(outputs(model), outputs(expected)) < 1e-5


@pytest.mark.once
def test_bias_without_a_place_for_it(tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    tensors = lora(path, 8, 8) | {f"{path}.lora_B.bias": np.ones(8)}
    write(tmp_path, tensors, target_modules=[path], lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias=true.*has no bias"):
        ks.load_peft(llama(), tmp_path)


@pytest.mark.once
def test_embedding(tmp_path):
    path = "bert.embeddings.word_embeddings"
    a, b = pair(32, 8)
    tensors = {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    model = bert()
    table = ops.convert_to_numpy(model.backbone.token_embedding.embeddings)
    tensors[f"{path}.base_layer.weight"] = table  # PEFT saves it as well
    write(tmp_path, tensors, target_modules=["word_embeddings"])
    ks.load_peft(model, tmp_path)
    expected = bert()
    table = table + np.float32(2) * (b @ a).T
    expected.backbone.token_embedding.embeddings.assign(table)
    assert distance(outputs(model), outputs(expected)) < 1e-5


@pytest.mark.once
def test_tied_table_takes_no_adapter(tmp_path):
    a, b = pair(32, 8)
    path = "model.embed_tokens"
    tensors = {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    write(tmp_path, tensors, target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="the output projection as well"):
        ks.load_peft(llama(tie_word_embeddings=True), tmp_path)
    ks.load_peft(llama(tie_word_embeddings=False), tmp_path)


@pytest.mark.once
def test_modules_to_save(tmp_path):
    rng = np.random.default_rng(3)
    head, table = rng.normal(size=(2, 32, 8)).astype("float32")
    path = "model.layers.0.self_attn.q_proj"
    saved = {"lm_head.weight": head, "model.embed_tokens.weight": table}
    fields = {"target_modules": [path], "modules_to_save": ["lm_head"]}
    fields["modules_to_save"].append("embed_tokens")
    write(tmp_path, lora(path, 8, 8) | saved, **fields)
    model = llama(tie_word_embeddings=False)
    ks.load_peft(model, tmp_path)
    expected = llama(tie_word_embeddings=False)
    added(expected, "transformer_layer_0/self_attention/query")
    expected.backbone.token_embedding.embeddings.assign(table)
    expected.backbone.token_embedding.reverse_embeddings.assign(head.T)
    assert distance(outputs(model), outputs(expected)) < 1e-5
    with pytest.raises(ValueError, match="one weight .*and they differ"):
        ks.load_peft(llama(tie_word_embeddings=True), tmp_path)


@pytest.mark.once
def test_one_of_two_tied_tables_is_refused(tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    table = np.ones((32, 8))
    tensors = lora(path, 8, 8) | {"model.embed_tokens.weight": table}
    fields = {"target_modules": [path], "modules_to_save": ["embed_tokens"]}
    write(tmp_path, tensors, **fields)
    model = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ensure_weight_tying=true"):
        ks.load_peft(model, tmp_path)
    write(tmp_path, tensors, **fields, ensure_weight_tying=True)
    ks.load_peft(model, tmp_path)


@pytest.mark.once
def test_fused_module_is_cut(tmp_path):
    path = "transformer.h.1.attn.c_attn"
    write(tmp_path, lora(path, 8, 24), target_modules=["c_attn"])
    with pytest.raises(ValueError, match="lacks tensors.*h.0.attn.c_attn"):
        ks.load_peft(gpt2(), tmp_path)
    write(tmp_path, lora(path, 8, 24), target_modules=[path])
    model = ks.load_peft(gpt2(), tmp_path)
    a, b = pair(8, 24)
    expected = gpt2()
    attention = expected.backbone.transformer_layers[1]._self_attention_layer
    for i, name in enumerate(("query", "key", "value")):
        view = kernel_view(getattr(attention, f"{name}_dense"))
        add(view, 2 * (b[8 * i : 8 * i + 8] @ a).T)
    assert distance(outputs(model), outputs(expected)) < 1e-5


@pytest.mark.once
def test_ia3_on_both_sides(tmp_path):
    rng = np.random.default_rng(4)
    key = "bert.encoder.layer.0.attention.self.key"
    down = "bert.encoder.layer.0.output.dense"
    gains = rng.normal(1, 0.3, 8), rng.normal(1, 0.3, 12)
    tensors = {
        f"{key}.ia3_l": gains[0][:, None],
        f"{down}.ia3_l": gains[1][None],
    }
    fields = {"peft_type": "IA3", "target_modules": [key, down]}
    fields["feedforward_modules"] = [down]
    model = ks.load_peft(bert(), write(tmp_path, tensors, **fields))
    expected = bert()
    block = expected.backbone.get_layer("transformer_layer_0")
    layer = block._self_attention_layer.key_dense
    rows = gains[1][:, None]
    for weight, factor in (
        (layer.kernel, gains[0].reshape(2, 4)),
        (layer.bias, gains[0].reshape(2, 4)),
        (block._feedforward_output_dense.kernel, rows),
    ):
        value = ops.convert_to_numpy(weight) * factor
        weight.assign(value.astype("float32"))
    assert distance(outputs(model), outputs(expected)) < 1e-5


@pytest.mark.once
def test_adalora_after_its_budget(tmp_path):
    a, b = pair(8, 8, 3)
    e = np.array([[2.0], [-1.0], [0.5]])
    path = QUERIES[0]
    tensors = dict(zip((f"{path}.lora_{x}" for x in "ABE"), (a, b, e)))
    flags = {f"{path}.lora_E": [True, False, True, True]}
    fields = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 4}
    fields |= {"target_modules": [path], "rank_pattern": flags}
    write(tmp_path, tensors, **fields)
    model = ks.load_peft(bert(), tmp_path)
    expected = bert()
    block = expected.backbone.get_layer("transformer_layer_0")
    view = kernel_view(block._self_attention_layer.query_dense)
    add(view, (b @ (a * e)).T * 4 / (4 + 1e-5))
    assert distance(outputs(model), outputs(expected)) < 1e-5


@pytest.mark.once
def test_prefix(tmp_path):
    rows = np.random.default_rng(5).normal(size=(3, 2 * 2 * 4))
    fields = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    write(tmp_path, {"prompt_embeddings": rows}, "", **fields)
    model = ks.load_peft(llama(), tmp_path)
    block = model.backbone.transformer_layers[1]
    keys, values = block.prefix.keys_and_values()
    np.testing.assert_allclose(
        ops.convert_to_numpy(values), rows[:, 12:].astype("float32")
    )
    # Turned back by the three positions that PEFT's tokens are further on.
    wave = 10000.0 ** -(np.arange(0, 4, 2) / 4)
    angle = np.tile(-3 * wave, 2)
    plain = rows[:, 8:12]
    half = np.concatenate([-plain[:, 2:], plain[:, :2]], axis=1)
    expected = plain * np.cos(angle) + half * np.sin(angle)
    assert distance(ops.convert_to_numpy(keys), expected) < 1e-5


@pytest.mark.once
def test_prefix_before_a_table_of_positions_is_refused(tmp_path):
    fields = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
    tensors = {"prompt_embeddings": np.ones((3, 2 * 2 * 8))}
    write(tmp_path, tensors, "", **fields)
    with pytest.raises(ValueError, match="positions from a table"):
        ks.load_peft(gpt2(), tmp_path)


@pytest.mark.once
def test_soft_prompt_and_head(tmp_path):
    rng = np.random.default_rng(6)
    prompt, head = rng.normal(size=(4, 8)), rng.normal(size=(3, 8))
    tensors = {"prompt_embeddings": prompt}
    tensors["base_model.classifier.weight"] = head
    tensors["base_model.classifier.bias"] = np.ones(3)
    fields = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    fields["modules_to_save"] = ["classifier"]
    model = ks.load_peft(bert(), write(tmp_path, tensors, "", **fields))
    adapter = model.backbone
    np.testing.assert_array_equal(
        ops.convert_to_numpy(adapter.prompt), prompt.astype("float32")
    )
    assert adapter.start() == 0
    kernel = ops.convert_to_numpy(model.get_layer("logits").kernel)
    np.testing.assert_array_equal(kernel, head.T.astype("float32"))
    tensors = {"prompt_embeddings": prompt}
    with pytest.raises(ValueError, match="generates text layer by layer"):
        ks.load_peft(llama(), write(tmp_path, tensors, "", **fields))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.once
def test_tensors_of_16_bits(tmp_path, kind):
    import torch
    from safetensors.torch import save_file

    wanted = lora(QUERIES[0], 8, 8)
    write(tmp_path, wanted, target_modules=QUERIES[:1])
    dtype = torch.float16 if kind == "F16" else torch.bfloat16
    small = {
        peft_folders.START + k: torch.tensor(v).to(dtype).contiguous()
        for k, v in wanted.items()
    }
    save_file(small, tmp_path / "adapter_model.safetensors")
    model = ks.load_peft(bert(), tmp_path)
    (a, b) = model.trainable_weights
    key = f"{peft_folders.START}{QUERIES[0]}.lora_A.weight"
    np.testing.assert_array_equal(
        ops.convert_to_numpy(a), small[key].float().numpy().T
    )
