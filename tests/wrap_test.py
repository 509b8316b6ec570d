import gc

import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks


def _numpy(x):
    return ops.convert_to_numpy(x)


def _x(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _mlp(name=None):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation="relu", name="first"),
            layers.Dense(16, activation="relu", name="second"),
            layers.Dense(3, name="head"),
        ],
        name=name,
    )


def _randomize(model, size=0.3):
    rng = np.random.default_rng(3)
    for weight in _adapter_weights(model):
        weight.assign(rng.normal(0, size, weight.shape))


def _adapter_weights(model):
    return [
        weight
        for layer in model._flatten_layers()
        if isinstance(layer, ks.AdapterLayer)
        for weight in layer.trainable_weights
    ]


def _names(weights):
    return [weight.path.split("/")[-3] for weight in weights]


class Block(layers.Layer):
    """Keeps layers in a list, a dict, a tuple and a nest of them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.in_list = [layers.Dense(4, name="l0"), layers.Dense(4, name="l1")]
        self.in_dict = {"a": layers.Dense(4, name="d0")}
        self.in_tuple = (layers.Dense(4, name="t0"), "text")
        self.nested = [{"b": [layers.Dense(4, name="n0")]}]
        self.alias = self.in_list[0]

    def _steps(self):
        return [
            *self.in_list,
            self.in_dict["a"],
            self.in_tuple[0],
            self.nested[0]["b"][0],
            self.alias,
        ]

    def build(self, input_shape):
        for step in self._steps():
            if not step.built:
                step.build((None, 4))

    def call(self, x):
        for step in self._steps():
            x = ops.tanh(step(x))
        return x


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Block(name="block")
        self.out = layers.Dense(2, name="out")

    def call(self, x):
        return self.out(self.block(x))


def _check_trip(model, x, target, count):
    """Wrap, train, disable, unwrap, load back, merge."""
    y = _numpy(model.predict(x, verbose=0))
    before = [w.numpy() for w in model.weights]
    bases = [w for w in model.weights]
    ks.wrap_model(model, "lora", target=target, rank=1)
    assert len(_adapter_weights(model)) == 2 * count
    assert len(model.trainable_weights) == 2 * count
    np.testing.assert_allclose(model.predict(x, verbose=0), y, atol=1e-6)
    _randomize(model)
    adapted = model.predict(x, verbose=0)
    assert np.abs(adapted - y).max() > 1e-3
    with ks.adapters_disabled(model):
        np.testing.assert_allclose(model.predict(x, verbose=0), y, atol=1e-6)
    values = [w.numpy() for w in model.trainable_weights]
    model.compile(optimizer="adam", loss="mse")
    model.fit(x, y, verbose=0)
    for weight, value in zip(model.trainable_weights, values):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path
        weight.assign(value)
    with ks.unwrapped(model):
        np.testing.assert_array_equal(model.predict(x, verbose=0), y)
    ks.merge_model(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), adapted, atol=1e-5)
    for weight, value in zip(bases, before):
        weight.assign(value)
    np.testing.assert_array_equal(model.predict(x, verbose=0), y)
    assert [id(w) for w in model.weights] == [id(w) for w in bases]
    assert len(model.trainable_weights) == len(bases)


def test_sequential():
    _check_trip(_mlp(), _x(6, 8), "all", 3)


def test_functional_with_a_shared_layer():
    inputs = keras.Input((8,))
    shared = layers.Dense(8, activation="tanh", name="shared")
    x = shared(shared(inputs))
    x = layers.Add()([x, layers.Dense(8, name="other")(inputs)])
    model = keras.Model(inputs, layers.Dense(2, name="out")(x))
    _check_trip(model, _x(6, 8), "all", 3)


def test_subclassed_with_lists_dicts_tuples():
    model = Subclassed()
    model(_x(2, 4))
    _check_trip(model, _x(6, 4), "block/.*", 5)


def test_nested_models_and_time_distributed():
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, name="deep")], name="inner"
    )
    inputs = keras.Input((3, 4))
    x = layers.TimeDistributed(inner, name="outer")(inputs)
    x = layers.TimeDistributed(layers.Dense(6, name="each"), name="td")(x)
    model = keras.Model(inputs, x)
    _check_trip(model, _x(5, 3, 4), [".*/deep", "td/each"], 2)


def test_multi_head_attention():
    inputs = keras.Input((5, 8))
    attention = layers.MultiHeadAttention(2, 4, name="attention")
    mask = np.tril(np.ones((5, 5), bool))[None]
    x = attention(inputs, inputs, attention_mask=mask)
    model = keras.Model(inputs, x)
    plain = model.predict(_x(4, 5, 8), verbose=0)
    ks.wrap_model(model, "lora", rank=2)
    assert _names(model.trainable_weights) == ["query"] * 2 + ["value"] * 2
    np.testing.assert_allclose(
        model.predict(_x(4, 5, 8), verbose=0), plain, atol=1e-6
    )
    _randomize(model)
    adapted = model.predict(_x(4, 5, 8), verbose=0)
    ks.merge_model(model)
    np.testing.assert_allclose(
        model.predict(_x(4, 5, 8), verbose=0), adapted, atol=1e-5
    )


def test_batch_normalisation_stands_still():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, name="conv"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(2, name="out"),
        ]
    )
    ks.wrap_model(model, ks.ConvLoRA, rank=2)
    frozen = [w.numpy() for w in model.non_trainable_weights]
    model.compile(optimizer="adam", loss="mse")
    model.fit(5 + _x(8, 6, 6, 2), np.zeros((8, 2)), epochs=2, verbose=0)
    for weight, value in zip(model.non_trainable_weights, frozen):
        np.testing.assert_array_equal(weight.numpy(), value)


@pytest.mark.compiled
def test_after_fit_the_next_fit_trains_adapters_only():
    model, x, y = _mlp(), _x(16, 8), np.ones((16, 3))
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    plain = model.predict(x, verbose=0)
    frozen = {w.path: w.numpy() for w in model.weights}
    ks.wrap_model(model, "lora", target="all-linear", rank=2)
    np.testing.assert_allclose(model.predict(x, verbose=0), plain, atol=1e-6)
    losses = model.fit(x, y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert len(model.optimizer.variables) == 2 + 2 * len(
        model.trainable_weights
    )
    assert float(model.optimizer.learning_rate) == pytest.approx(0.01)
    for weight in model.non_trainable_weights:
        if weight.path in frozen:
            np.testing.assert_array_equal(weight.numpy(), frozen[weight.path])
    assert np.abs(model.predict(x, verbose=0) - plain).max() > 1e-3
    # And back: training the plain model again goes on as before.
    ks.unwrap_model(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), plain, atol=1e-6)
    model.fit(x, y, verbose=0)
    assert all(
        np.abs(w.numpy() - frozen[w.path]).max() > 0
        for w in model.trainable_weights
    )


def test_gradients_do_not_pile_up():
    """PyTorch's `zero_grad` must reach the adapters: two equal steps."""
    model, x, y = _mlp(), _x(4, 8), np.ones((4, 3))
    ks.wrap_model(model, "lora", target="all", rank=2, seed=1)
    _randomize(model)
    start = [w.numpy() for w in model.trainable_weights]
    model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    ends = []
    for _ in range(2):
        for weight, value in zip(model.trainable_weights, start):
            weight.assign(value)
        model.train_on_batch(x, y)
        ends.append([w.numpy() for w in model.trainable_weights])
    for first, second in zip(*ends):
        np.testing.assert_allclose(first, second, atol=1e-6)


def test_trainable_toggles_do_not_thaw_the_base():
    model = _mlp()
    ks.wrap_model(model, "lora", target="first", rank=2)
    base = model.layers[0].layer
    for layer in (model, model.layers[0]):
        layer.trainable = False
        assert not model.layers[0].trainable_weights
        layer.trainable = True
        assert not any(w.trainable for w in base.weights)
        assert len(model.layers[0].trainable_weights) == 2
    ks.unwrap_model(model)
    assert all(w.trainable for w in model.weights)


def test_flags_come_back_as_they_were():
    model = _mlp()
    model.get_layer("first").trainable = False
    model.get_layer("second").kernel.trainable = False
    flags = [w.trainable for w in model.weights]
    ks.wrap_model(model, "lora", target="second", rank=2)
    ks.wrap_model(model, "lora", target="head", rank=2)
    assert len(model.trainable_weights) == 4
    ks.unwrap_model(model)
    assert [w.trainable for w in model.weights] == flags
    assert not model.get_layer("first").trainable


def test_trainable_patterns_and_overrides():
    model = _mlp()
    ks.wrap_model(
        model,
        "lora",
        target=["first", "second"],
        trainable="head",
        overrides={"second": {"rank": 5}},
        rank=2,
    )
    assert model.get_layer("first").rank == 2
    assert model.get_layer("second").rank == 5
    names = _names(model.trainable_weights)
    assert names.count("head") == 2 and len(names) == 6


@pytest.mark.once
def test_targets():
    def wrapped(**kwargs):
        model = _mlp()
        ks.wrap_model(model, "lora", rank=1, **kwargs)
        return [
            layer.name
            for layer in model.layers
            if isinstance(layer, ks.AdapterLayer)
        ]

    assert wrapped(target=r"f.*|head") == ["first", "head"]
    assert wrapped(target=["head", "first"]) == ["first", "head"]
    assert wrapped(target=layers.Dense) == ["first", "second", "head"]
    assert wrapped(target=lambda x: x.units == 16) == ["first", "second"]
    assert wrapped(target="all-linear") == ["first", "second"]
    assert wrapped(target="all", exclude="second") == ["first", "head"]
    assert wrapped(target="all", exclude=lambda x: x.units == 3) == [
        "first",
        "second",
    ]


@pytest.mark.once
def test_automatic_names_match_as_shown_and_by_stable_key():
    def make():
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(4), layers.Dense(2)]
        )

    make()
    model = make()
    shown = model.layers[1].name
    assert shown != "dense_1"
    ks.wrap_model(model, "lora", target=shown, rank=1)
    assert isinstance(model.layers[1], ks.LoRADense)
    model = make()
    ks.wrap_model(model, "lora", target="dense_1", rank=1)
    assert isinstance(model.layers[1], ks.LoRADense)


def test_second_model_that_shares_layers_sees_the_wrap():
    model = _mlp()
    features = keras.Model(model.inputs, model.get_layer("second").output)
    inner = keras.Model(
        model.get_layer("first").output, model.get_layer("second").output
    )
    x = _x(4, 8)
    plain = features.predict(x, verbose=0)
    inner.predict(_x(4, 16), verbose=0)
    also = [features, inner]
    ks.wrap_model(model, "lora", target="second", rank=2, also=also)
    _randomize(model)
    seen = features.predict(x, verbose=0)
    assert np.abs(seen - plain).max() > 1e-3
    assert len(_adapter_weights(features)) == len(_adapter_weights(inner)) == 2
    ks.unwrap_model(model)
    np.testing.assert_array_equal(features.predict(x, verbose=0), plain)
    assert not _adapter_weights(features) and not _adapter_weights(inner)


def test_a_second_model_that_was_not_named_cannot_be_wrapped_beside():
    model = _mlp()
    features = keras.Model(model.inputs, model.get_layer("second").output)
    ks.wrap_model(model, "lora", target="second", rank=2)
    with pytest.raises(RuntimeError, match="stop"), ks.unwrapped(model):
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match="also="):
        ks.wrap_model(features, "lora", target="second", rank=2)
    ks.unwrap_model(model)
    ks.wrap_model(features, "lora", target="second", rank=2)


def test_wrapped_model_on_a_new_input_and_as_a_part():
    model = _mlp()
    ks.wrap_model(model, "lora", target="all", rank=2)
    _randomize(model)
    inputs = keras.Input((8,))
    outer = keras.Model(inputs, layers.Dense(1)(model(inputs)))
    assert outer.predict(_x(2, 8), verbose=0).shape == (2, 1)
    again = keras.Model(inputs, model(inputs))
    np.testing.assert_allclose(
        again.predict(_x(2, 8), verbose=0),
        model.predict(_x(2, 8), verbose=0),
        atol=1e-6,
    )
    plain = ks.unwrap_model(model).predict(_x(2, 8), verbose=0)
    np.testing.assert_allclose(
        again.predict(_x(2, 8), verbose=0), plain, atol=1e-6
    )


def test_clone_model_copies_structure():
    model = _mlp()
    ks.wrap_model(model, "lora", target="first", rank=2)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert isinstance(clone.layers[0], ks.LoRADense)
    assert clone.layers[0] is not model.layers[0]
    np.testing.assert_allclose(
        _numpy(clone(_x(2, 8))), _numpy(model(_x(2, 8))), atol=1e-6
    )


def test_gc_freeze_does_not_hide_the_model():
    model = _mlp()
    gc.freeze()
    ks.wrap_model(model, "lora", target="all", rank=1)
    assert all(isinstance(x, ks.LoRADense) for x in model.layers)
    assert len(model.trainable_weights) == 6


@pytest.mark.once
@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"target": "nothing"}, "Nothing in model 'm' matches.*'first'"),
        ({"target": ".*/(query"}, "not a regular expression"),
        ({"target": 3}, "Expected a regex"),
        ({"target": "conv"}, "Nothing in model"),
        ({"target": "all", "exclude": "all"}, "Nothing in model"),
        ({"target": "all", "rank": 0}, "rank=0"),
        ({"target": "all", "rank": True}, "rank=True"),
        ({"target": "all", "rank": 2.0}, "rank=2.0"),
        ({"target": "all", "rank": 9}, "At 'first'.*at most 8"),
        ({"target": "all", "rank": 4}, "At 'head'.*at most 3"),
        ({"target": "all", "rnk": 4}, "rnk"),
        (
            {"target": "first", "overrides": {"head": {"rank": 1}}},
            "overrides has .head., which matches none",
        ),
        ({"target": "first", "trainable": ["haed"]}, "matches none"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(kwargs, match):
    model = _mlp("m")
    model.compile(optimizer="adam", loss="mse")
    model.fit(_x(4, 8), np.zeros((4, 3)), verbose=0)
    optimizer, kept = model.optimizer, list(model.layers)
    plain = model.predict(_x(4, 8), verbose=0)
    with pytest.raises(ValueError, match=match):
        ks.wrap_model(model, "lora", **kwargs)
    assert model.layers == kept and model.optimizer is optimizer
    assert len(model.trainable_weights) == 6
    np.testing.assert_array_equal(model.predict(_x(4, 8), verbose=0), plain)


@pytest.mark.once
def test_other_bad_calls():
    model = _mlp()
    with pytest.raises(ValueError, match="method='lroa'.*'lora'"):
        ks.wrap_model(model, "lroa")
    with pytest.raises(ValueError, match="Expected a Keras model"):
        ks.wrap_model("model", "lora")
    with pytest.raises(ValueError, match="no adapters"):
        ks.unwrap_model(model)
    with pytest.raises(ValueError, match="no adapters"):
        ks.merge_model(model)
    ks.wrap_model(model, "lora", target="all", rank=2)
    with pytest.raises(ValueError, match="Already wrapped"):
        ks.wrap_model(model, "lora", target="first", rank=2)
    unbuilt = keras.Sequential([layers.Dense(4, name="a")])
    with pytest.raises(ValueError, match="not built"):
        ks.wrap_model(unbuilt, "lora", target="a")
    lazy = Subclassed()
    with pytest.raises(ValueError, match="not built"):
        ks.wrap_model(lazy, "lora", target="out")
    with pytest.raises(ValueError, match="channels apart"):
        depthwise = keras.Sequential(
            [keras.Input((4, 4, 2)), layers.DepthwiseConv2D(3, name="d")]
        )
        ks.wrap_model(depthwise, "lora", target="d")


@pytest.mark.parametrize("name", ["first", "head"])
def test_merge_refuses_nan_and_changes_nothing(name):
    model = _mlp()
    ks.wrap_model(model, "lora", target="all", rank=2)
    _randomize(model)
    bad = model.get_layer(name).lora_b
    bad.assign(np.full(bad.shape, np.nan))
    before = [w.numpy() for w in model.weights]
    with pytest.raises(ValueError, match=f"'{name}' holds NaN"):
        ks.merge_model(model)
    for weight, value in zip(model.weights, before):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert isinstance(model.layers[0], ks.LoRADense)


def test_merge_and_save_refuse_switched_off_adapters(tmp_path):
    model = _mlp()
    ks.wrap_model(model, "lora", target="all", rank=2)
    with ks.adapters_disabled(model):
        with pytest.raises(ValueError, match="switched off"):
            ks.merge_model(model)
        with pytest.raises(ValueError, match="switched off"):
            ks.save_adapters(model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_an_error_inside_the_blocks_still_puts_all_back():
    model = _mlp()
    ks.wrap_model(model, "lora", target="all", rank=2)
    _randomize(model)
    adapted = _numpy(model(_x(2, 8)))
    with pytest.raises(RuntimeError), ks.unwrapped(model):
        raise RuntimeError
    with pytest.raises(RuntimeError), ks.adapters_disabled(model):
        raise RuntimeError
    np.testing.assert_array_equal(_numpy(model(_x(2, 8))), adapted)


@pytest.mark.compiled
def test_disabling_does_not_retrace():
    model, traces = _mlp(), []

    class Spy(layers.Layer):
        def call(self, x):
            traces.append(1)
            return x

    inputs = keras.Input((8,))
    outer = keras.Model(inputs, Spy()(model(inputs)))
    ks.wrap_model(outer, "lora", target=".*/first", rank=2)
    outer.predict(_x(4, 8), verbose=0)
    if keras.backend.backend() == "torch":
        pytest.skip("PyTorch runs eagerly: there is no trace to keep")
    count = len(traces)
    with ks.adapters_disabled(outer):
        outer.predict(_x(4, 8), verbose=0)
    outer.predict(_x(4, 8), verbose=0)
    assert len(traces) == count


def test_weights_file_of_the_wrapped_and_of_the_base(tmp_path):
    model = _mlp()
    model.save_weights(tmp_path / "base.weights.h5")
    plain = _numpy(model(_x(2, 8)))
    ks.wrap_model(model, "lora", target="all", rank=2)
    _randomize(model)
    adapted = _numpy(model(_x(2, 8)))
    model.save_weights(tmp_path / "wrapped.weights.h5")
    _randomize(model, 0.7)
    model.load_weights(tmp_path / "wrapped.weights.h5")
    np.testing.assert_array_equal(_numpy(model(_x(2, 8))), adapted)
    with ks.unwrapped(model):
        model.save_weights(tmp_path / "again.weights.h5")
        model.load_weights(tmp_path / "base.weights.h5")
    fresh = _mlp()
    fresh.load_weights(tmp_path / "again.weights.h5")
    np.testing.assert_array_equal(_numpy(fresh(_x(2, 8))), plain)


@pytest.mark.compiled
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="SavedModel export needs TensorFlow",
)
def test_export(tmp_path):
    import tensorflow as tf

    model = _mlp()
    model.predict(_x(2, 8), verbose=0)
    ks.wrap_model(model, "lora", target="all", rank=2)
    _randomize(model)
    for folder, step in (("saved", None), ("plain", ks.unwrap_model)):
        if step:
            step(model)
        model.export(tmp_path / folder, verbose=False)
        exported = tf.saved_model.load(tmp_path / folder)
        np.testing.assert_allclose(
            _numpy(exported.serve(_x(2, 8))), _numpy(model(_x(2, 8))), atol=1e-6
        )


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_base_runs_quantised_and_trains(mode):
    model = _mlp()
    model.quantize(mode)
    plain = model.predict(_x(8, 8), verbose=0)
    ks.wrap_model(model, "lora", target="all", rank=2)
    np.testing.assert_allclose(
        model.predict(_x(8, 8), verbose=0), plain, atol=1e-6
    )
    assert all(x.layer.quantization_mode == mode for x in model.layers)
    frozen = [w.numpy() for w in model.non_trainable_weights]
    model.compile(optimizer="adam", loss="mse")
    model.fit(_x(8, 8), np.ones((8, 3)), epochs=2, verbose=0)
    for weight, value in zip(model.non_trainable_weights, frozen):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert all(w.numpy().any() for w in model.trainable_weights)
    with pytest.raises(ValueError, match="quantised"):
        ks.merge_model(model)
    ks.unwrap_model(model)
    np.testing.assert_allclose(
        model.predict(_x(8, 8), verbose=0), plain, atol=1e-6
    )


def test_quantising_a_wrapped_model():
    model = _mlp()
    ks.wrap_model(model, "lora", target="all", rank=2)
    _randomize(model)
    adapted = model.predict(_x(8, 8), verbose=0)
    model.quantize("int8")
    got = model.predict(_x(8, 8), verbose=0)
    assert model.layers[0].layer.quantization_mode == "int8"
    np.testing.assert_allclose(got, adapted, atol=0.1)


def test_tied_embedding_only_by_class():
    table = layers.ReversibleEmbedding(12, 4, name="table")
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Dense(4, name="mix")(table(inputs))
    model = keras.Model(inputs, table(x, reverse=True))
    with pytest.raises(ValueError, match="ReversibleEmbedding"):
        ks.wrap_model(model, "lora", target="table", rank=2)
    ks.wrap_model(model, "lora", target="all", rank=2)
    assert model.get_layer("table") is table
    ks.unwrap_model(model)
    ks.wrap_model(model, "lora", target=layers.ReversibleEmbedding, rank=2)
    _randomize(model)
    ids = np.arange(10).reshape(2, 5)
    adapted = model.predict(ids, verbose=0)
    ks.merge_model(model)
    np.testing.assert_allclose(
        model.predict(ids, verbose=0), adapted, atol=1e-5
    )


@pytest.mark.once
def test_summary_counts(capsys):
    model = _mlp()
    ks.wrap_model(model, "lora", target="first", rank=2, trainable="head")
    summary = ks.adapter_summary(model)
    assert "first" in capsys.readouterr().out
    rows = {row.path: row for row in summary.rows}
    assert rows["first"].trainable == 2 * (8 + 16)
    assert rows["first"].rank == 2 and rows["first"].method == "lora"
    assert rows["head"].method is None and rows["head"].trainable == 51
    assert summary.trainable == 2 * (8 + 16) + 51
    assert summary.total == model.count_params()


@pytest.mark.once
def test_an_unknown_option_names_the_known_ones():
    model = _mlp()
    with pytest.raises(ValueError, match="'first'.*no option alpha.*columns"):
        ks.wrap_model(model, "spectral", target="first", alpha=16)
    with pytest.raises(ValueError, match="no option rnak"):
        ks.wrap_model(
            model, "lora", target="first", overrides={"first": {"rnak": 2}}
        )
    assert isinstance(model.layers[0], layers.Dense)
