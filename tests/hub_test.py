"""KerasHub tasks: heads, generation, published parameter counts."""

import keras
import numpy as np
import pytest
import rich.console
from elsewhere import outputs_elsewhere
from keras import ops

import keras_spectral as ks

pytestmark = pytest.mark.compiled

keras_hub = pytest.importorskip("keras_hub")
QUIET = rich.console.Console(quiet=True)


def _bert(**config):
    sizes = dict(
        vocabulary_size=30,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=6,
    )
    return keras_hub.models.BertBackbone(**{**sizes, **config})


def _inputs(batch=4):
    rng = np.random.default_rng(0)
    return {
        "token_ids": rng.integers(1, 30, (batch, 6)),
        "segment_ids": np.zeros((batch, 6), int),
        "padding_mask": np.tile([1, 1, 1, 1, 0, 0], (batch, 1)),
    }


def _classifier(**config):
    return keras_hub.models.BertTextClassifier(
        _bert(**config), num_classes=2, preprocessor=None
    )


def _wide_classifier():
    keras.utils.set_random_seed(0)
    return _classifier(hidden_dim=16, intermediate_dim=32)


def _randomize(model, size=0.5):
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, size, weight.shape))


def test_default_is_query_value_and_head():
    model = _classifier()
    ks.wrap_model(model, "lora", rank=2)
    paths = [w.path for w in model.trainable_weights]
    assert len(paths) == 2 * 2 * 2 + 2
    assert sum("query/default/lora" in path for path in paths) == 4
    assert sum("value/default/lora" in path for path in paths) == 4
    assert sum("logits" in path for path in paths) == 2
    # Paths lie under the base's own, for layout maps.
    for layer in model._flatten_layers():
        if isinstance(layer, ks.AdapterLayer):
            assert all(
                w.path.startswith(layer.layer.path) for w in layer.weights
            )


def test_head_travels_with_the_file(tmp_path):
    model = _classifier()
    model.compile(optimizer="adam")
    ks.wrap_model(model, "lora", rank=2)
    _randomize(model)
    ks.save_adapters(model, tmp_path / "a.safetensors")
    expected = ops.convert_to_numpy(model(_inputs()))
    with ks.unwrapped(model):
        values = model.backbone.get_weights()
    fresh = _classifier()
    fresh.backbone.set_weights(values)
    ks.load_adapters(fresh, tmp_path / "a.safetensors")
    np.testing.assert_allclose(
        ops.convert_to_numpy(fresh(_inputs())), expected, atol=1e-6
    )
    assert len(fresh.trainable_weights) == len(model.trainable_weights)


def test_wrapping_only_the_backbone_reaches_the_compiled_task():
    model = _classifier()
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(_inputs(), np.array([0, 1, 0, 1]), verbose=0)
    plain = model.predict(_inputs(), verbose=0)
    ks.wrap_model(model.backbone, "lora", rank=2)
    for weight in model.backbone.trainable_weights:
        weight.assign(weight + 0.5)
    assert np.abs(model.predict(_inputs(), verbose=0) - plain).max() > 1e-6
    before = [w.numpy() for w in model.backbone.trainable_weights]
    assert len(before) == 8
    model.fit(_inputs(), np.array([0, 1, 0, 1]), verbose=0)
    for weight, value in zip(model.backbone.trainable_weights, before):
        assert np.abs(weight.numpy() - value).max() > 0
    ks.unwrap_model(model.backbone)
    # The head has trained in between, so only its kind is compared.
    assert model.predict(_inputs(), verbose=0).shape == plain.shape


def test_loss_scaling_optimizer_is_renewed():
    model = _classifier()
    model.compile(
        optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    labels = np.array([0, 1, 0, 1])
    model.fit(_inputs(), labels, verbose=0)
    ks.wrap_model(model, "lora", rank=2)
    _randomize(model)
    before = [w.numpy() for w in model.trainable_weights]
    model.fit(_inputs(), labels, epochs=2, verbose=0)
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    for weight, value in zip(model.trainable_weights, before):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path


def _gpt2():
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=30,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=12,
    )
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")
    return model


def _generate(model):
    prompt = {
        "token_ids": np.array([[5, 6, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0]]),
        "padding_mask": np.array([[1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]),
    }
    outputs = model.generate(prompt, stop_token_ids=None)
    return ops.convert_to_numpy(outputs["token_ids"])


def test_input_conditional_gates_generate():
    model = _gpt2()
    plain = _generate(model)
    ks.wrap_model(model, "conditional_spectral", rank=2, context="mean")
    np.testing.assert_array_equal(_generate(model), plain)  # closed gates
    # Nothing that belongs to the compiled loop is left in the counters.
    assert all(np.isfinite(w.numpy()).all() for w in model.weights)


def test_generate_made_earlier_runs_the_adapters():
    model = _gpt2()

    def generate():
        return _generate(model)

    plain = generate()
    ks.wrap_model(model, "lora", target="all-linear", rank=2)
    np.testing.assert_array_equal(generate(), plain)
    _randomize(model, 2.0)
    adapted = generate()
    assert (adapted != plain).any()
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(generate(), plain)
    np.testing.assert_array_equal(generate(), adapted)
    # The cache changes nothing: the greedy token is the argmax of logits.
    logits = ops.convert_to_numpy(
        model({"token_ids": adapted, "padding_mask": np.ones_like(adapted)})
    )
    np.testing.assert_array_equal(logits.argmax(-1)[:, 2:-1], adapted[:, 3:])
    ks.unwrap_model(model)
    np.testing.assert_array_equal(generate(), plain)


def test_bert_base_has_the_published_count():
    model = _bert(
        num_layers=12, num_heads=12, hidden_dim=768, intermediate_dim=3072
    )
    ks.wrap_model(model, "lora", rank=8)
    count = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    assert count == 294_912


def test_layers_with_one_path_keep_their_weights_apart():
    backbone = keras_hub.models.SmolLM3Backbone(
        vocabulary_size=30,
        hidden_dim=8,
        intermediate_dim=16,
        num_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=False,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, True],
        layer_types=["full_attention", "full_attention"],
        mlp_bias=False,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=16,
        rope_theta=10000.0,
        partial_rotary_factor=1.0,
    )
    ks.wrap_model(backbone, "lora", target=".*o_proj", rank=1)
    paths = [w.path for w in backbone.trainable_weights]
    assert len(paths) == 4 and len(set(paths)) == 4


def test_raw_kernels_are_listed(capsys):
    model = _bert()
    ks.wrap_model(model, "lora", rank=2)
    summary = ks.adapter_summary(model)
    assert any("position_embedding" in row.path for row in summary.raw)
    assert "raw kernel" in capsys.readouterr().out


def test_recovery_by_lora_trains_and_becomes_one_pair(tmp_path):
    model = _wide_classifier()
    small = ks.compress_model(
        model, ratio=0.3, recover="lora", recover_rank=2, exclude="logits"
    )
    rows = ks.adapter_summary(small, QUIET).rows
    adapted = [row for row in rows if row.method == "lora"]
    report = ks.compression_report(small, QUIET)
    ranks_of = {x.path: x.rank for x in report.layers if x.rank}
    assert {row.path: row.rank for row in adapted} == {
        path: min(2, rank - 1) for path, rank in ranks_of.items() if rank > 1
    }
    names = {w.name for w in small.trainable_weights}
    assert names == {"lora_a", "lora_b", "kernel", "bias"}  # with the head
    frozen = [w for w in small.weights if not w.trainable and w.name != "scale"]
    before = [w.numpy().copy() for w in frozen]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    small.compile(keras.optimizers.Adam(0.01), loss)
    history = small.fit(_inputs(3), np.array([0, 1, 1]), epochs=4, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    for weight, old in zip(frozen, before):
        if "seed" not in weight.name:
            np.testing.assert_array_equal(weight.numpy(), old)
    expected = small.predict(_inputs(3), verbose=0)
    ks.finalize_transfer(small)
    np.testing.assert_allclose(
        small.predict(_inputs(3), verbose=0), expected, atol=1e-5
    )
    assert small.count_params() == report.weights[1]
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras", compile=False)
    np.testing.assert_allclose(
        again.predict(_inputs(3), verbose=0), expected, atol=1e-5
    )


def test_adapters_find_factorised_layers_but_not_their_halves():
    small = ks.compress_model(_wide_classifier(), ratio=0.3)
    ks.wrap_model(small, "spectral", target="all-linear", rank=1)
    paths = [r.path for r in ks.adapter_summary(small, QUIET).rows if r.method]
    assert len(paths) == 13 and not [p for p in paths if "/down" in p]
    with ks.unwrapped(small):
        pass
    ks.unwrap_model(small)
    ks.wrap_model(small, "lora", rank=2)  # query and value, beside the head
    rows = ks.adapter_summary(small, QUIET).rows
    assert len([row for row in rows if row.method]) == 4
    trained = {row.path.split("/")[0] for row in rows if not row.method}
    assert "logits" in trained


def test_compressed_tasks_load_where_nothing_else_is_imported(tmp_path):
    model = _wide_classifier()
    small = ks.compress_model(model, ratio=0.3)
    assert isinstance(small, type(model))
    again = outputs_elsewhere(small, _inputs(), tmp_path)
    expected = small.predict(_inputs(), verbose=0)
    np.testing.assert_allclose(again, expected, atol=1e-6)


def test_two_tasks_trained_in_turn_equal_two_models():
    """Each has a head and an optimizer's state of its own."""
    labels = {"mrpc": np.array([0, 1, 0, 1]), "cola": np.array([1, 1, 0, 0])}

    def task(*names, target=None):
        keras.utils.set_random_seed(3)
        model = keras_hub.models.BertTextClassifier(
            _bert(dropout=0.0), num_classes=2, dropout=0.0, preprocessor=None
        )
        for name in names:
            ks.wrap_model(model, "lora", target, rank=2, seed=4, adapter=name)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=keras.optimizers.Adam(0.02), loss=loss)
        return model

    def train(model, name):
        model.fit(_inputs(), labels[name], verbose=0)

    both = task(*labels)
    for _ in range(3):
        for name in labels:
            ks.set_adapters(both, name)
            train(both, name)
    for name in labels:
        alone = task(name)
        start = alone.predict(_inputs(), verbose=0)
        for _ in range(3):
            train(alone, name)
        expected = alone.predict(_inputs(), verbose=0)
        ks.set_adapters(both, name)
        got = both.predict(_inputs(), verbose=0)
        np.testing.assert_allclose(got, expected, atol=1e-5)
        assert np.abs(got - start).max() > 1e-3
        assert len(both.trainable_weights) == 2 * 2 * 2 + 2
    # The head stays none of the linear layers to wrap.
    assert len(task(*labels, target="all-linear").trainable_weights) == 28
