"""The base of an adapter stays whole, whatever happens around it."""

import copy

import block_cases
import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks

pytestmark = pytest.mark.compiled


def _x(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def _mlp(dtype=None, head_dtype=None):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(32, activation="relu", name="hidden", dtype=dtype),
            layers.Dense(4, name="head", dtype=head_dtype or dtype),
        ]
    )


def _out(model, x=None):
    outputs = model(_x(8, 16) if x is None else x)
    return ops.convert_to_numpy(ops.cast(outputs, "float32"))


def _jolt(model):
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        value = ops.convert_to_numpy(weight)
        weight.assign(value + rng.normal(0, 0.3, weight.shape))


def _holding_lambda():
    layer = layers.Dense(8, activation="relu", name="d")
    inputs = keras.Input((16,))
    held = layers.Lambda(lambda t: layer(t), output_shape=(8,))
    outputs = layers.Add()([layer(inputs), held(inputs)])
    return keras.Model(inputs, outputs)


class _Helper:
    def __init__(self, layer):
        self.layer = layer


class _WithHelper(keras.Model):
    def __init__(self):
        super().__init__()
        self.d = layers.Dense(4, name="d")
        self.helper = _Helper(self.d)

    def call(self, x):
        return self.helper.layer(x)


@pytest.mark.parametrize(
    ("make", "kind"), [(_holding_lambda, "function"), (_WithHelper, "_Helper")]
)
def test_whoever_holds_the_base_gets_the_base_and_is_named(make, kind):
    model = make()
    plain = _out(model)
    with pytest.warns(UserWarning, match=f"also held by an? .*{kind}"):
        ks.wrap_model(model, "lora", target="d", rank=2)
    np.testing.assert_array_equal(_out(model), plain)


class _ReadsPrivately(keras.Model):
    def __init__(self):
        super().__init__()
        self.emb = layers.Embedding(4, 16, name="emb")
        self.out = layers.Dense(4, name="out")

    def call(self, x):
        first = self.emb(ops.zeros((1,), "int32"))
        return self.out(x + first + self.emb._embeddings[0])


def test_private_attributes_of_the_base_are_found():
    model = _ReadsPrivately()
    plain = _out(model)
    ks.wrap_model(model, "lora", target="emb", rank=2)
    np.testing.assert_array_equal(_out(model), plain)
    _jolt(model)
    adapted = _out(model)
    ks.merge_model(model)  # so it was the effective table that was read
    np.testing.assert_allclose(_out(model), adapted, atol=1e-5)
    layer = ks.LoRADense(layers.Dense(3), rank=1)
    with pytest.raises(AttributeError, match="LoRADense"):
        layer.nothing_of_that_name  # noqa: B018


def test_the_base_comes_back_with_its_own_head():
    model = _mlp()
    plain = _out(model)
    ks.wrap_model(model, "lora", target="hidden", trainable="head", rank=2)
    _jolt(model)
    adapted = _out(model)
    assert np.abs(adapted - plain).max() > 0.1
    model.compile("sgd", "mse")
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(_out(model), plain)
        # JAX gives buffers away here, so no two weights may share one.
        model.evaluate(_x(8, 16), plain, verbose=0)
        model.predict(_x(8, 16), verbose=0)
    with ks.unwrapped(model):
        np.testing.assert_array_equal(_out(model), plain)
    with ks.merged(model):
        np.testing.assert_allclose(_out(model), adapted, atol=1e-5)
    np.testing.assert_array_equal(_out(model), adapted)
    ks.unwrap_model(model)
    np.testing.assert_array_equal(_out(model), plain)
    assert len(model.trainable_weights) == 4


def test_merging_makes_the_trained_head_the_models_own():
    model = _mlp()
    ks.wrap_model(model, "lora", target="hidden", trainable="head", rank=2)
    _jolt(model)
    adapted = _out(model)
    ks.merge_model(model)
    np.testing.assert_allclose(_out(model), adapted, atol=1e-5)
    assert {type(layer) for layer in model.layers} == {layers.Dense}


def test_a_trained_batch_norm_keeps_statistics_of_its_own():
    model = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(8, name="d"),
            layers.BatchNormalization(name="norm"),
        ]
    )
    plain = _out(model)
    ks.wrap_model(model, "lora", target="d", trainable="norm", rank=2)
    model.compile("sgd", "mse")
    model.fit(_x(8, 16) + 3, np.ones((8, 8)), verbose=0)
    assert np.abs(_out(model) - plain).max() > 1e-3
    ks.unwrap_model(model)
    np.testing.assert_array_equal(_out(model), plain)


def test_a_head_trains_as_it_would_without_adapters():
    """Gradients must not add up from step to step."""
    histories = []
    for wrapped in (False, True):
        model = _mlp()
        model.get_layer("hidden").trainable = False
        if wrapped:
            ks.wrap_model(model, "lora", "hidden", trainable="head", rank=2)
            model.get_layer("hidden").lora_a.assign(np.zeros((16, 2)))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        paths = [weight.path for weight in model.weights]
        assert len(set(paths)) == len(paths)
        history = model.fit(_x(8, 16), np.ones((8, 4)), epochs=4, verbose=0)
        histories.append(history.history["loss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)


def test_toggling_trainable_thaws_only_what_trains():
    model = _mlp()
    ks.wrap_model(model, "lora", target="hidden", trainable="head", rank=2)
    names = [weight.path for weight in model.trainable_weights]
    model.trainable = False
    assert not model.trainable_weights
    model.trainable = True
    assert [w.path for w in model.trainable_weights] == names
    assert len(names) == 4


def test_heads_of_16_bits_train_in_32():
    model = _mlp("bfloat16")
    plain = _out(model)
    ks.wrap_model(model, "lora", target="hidden", trainable="head", rank=2)
    np.testing.assert_array_equal(_out(model), plain)
    head = model.get_layer("head")
    before = ops.convert_to_numpy(head.kernel)
    model.compile("adam", "mse")
    history = model.fit(_x(8, 16), np.ones((8, 4)), epochs=3, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert head.kernel.dtype == "float32"
    assert np.abs(ops.convert_to_numpy(head.kernel) - before).max() > 1e-3
    ks.unwrap_model(model)
    assert model.get_layer("head").kernel.dtype == "bfloat16"
    np.testing.assert_array_equal(_out(model), plain)


@pytest.mark.parametrize("method", ["bottleneck", "prefix", "unipelt", "lora"])
def test_switched_off_even_if_it_holds_nan(method):
    model = block_cases.model()
    plain = _out(model, block_cases.inputs())
    ks.wrap_model(model, method, r".*/query" if method == "lora" else None)
    for weight in model.trainable_weights:
        weight.assign(np.full(weight.shape, np.nan))
    with ks.adapters_disabled(model):
        got = _out(model, block_cases.inputs())
    np.testing.assert_allclose(got, plain, atol=1e-6)
    assert np.isnan(_out(model, block_cases.inputs())).any()


def test_merging_says_what_16_bits_round_away():
    model = _mlp("bfloat16")
    ks.wrap_model(model, "lora", target="hidden", rank=4)
    layer = model.get_layer("hidden")
    small = np.random.default_rng(1).normal(0, 2e-4, layer.lora_b.shape)
    layer.lora_b.assign(small)
    plain = ops.convert_to_numpy(ops.cast(layer.layer.kernel, "float32"))
    change = ops.convert_to_numpy(layer.delta_matrix())
    with pytest.warns(UserWarning, match="lost .* of the correction"):
        with ks.merged(model):
            pass
    ks.merge_model(model, dtype="float32")
    kernel = model.get_layer("hidden").kernel
    assert kernel.dtype == "float32"
    got = ops.convert_to_numpy(kernel) - plain
    assert np.linalg.norm(got - change) < 1e-3 * np.linalg.norm(change)
    assert _out(model).shape == (8, 4)


def test_merging_into_float32_rounds_no_bias():
    model = _mlp("bfloat16")
    ks.wrap_model(model, "lora", "hidden", rank=2, trainable="biases")
    for weight in model.trainable_weights:
        weight.assign(np.full(weight.shape, 1 / 3))
    ks.merge_model(model, dtype="float32")
    bias = ops.convert_to_numpy(model.get_layer("hidden").bias)
    np.testing.assert_allclose(bias, 1 / 3, rtol=1e-6)


def test_no_wrap_inside_of_an_unwrapped_block():
    model = _mlp()
    ks.wrap_model(model, "lora", target="hidden", rank=2)
    for context in (ks.unwrapped, ks.merged):
        with context(model):
            with pytest.raises(ValueError, match="after the block"):
                ks.wrap_model(model, "lora", target="head", rank=2)
    assert len(model.trainable_weights) == 2


class _Refuses(keras.Model):
    """A model that lets nobody exchange its second layer."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(6, activation="relu", name="first")
        self.second = layers.Dense(4, name="second")

    def call(self, x):
        return self.second(self.first(x))

    def __setattr__(self, name, value):
        if name == "second" and isinstance(value, ks.AdapterLayer):
            raise RuntimeError("no")
        super().__setattr__(name, value)


def test_a_models_own_setattr_that_fails_leaves_it_as_it_was():
    model = _Refuses()
    plain = _out(model)
    flags = [w.trainable for w in model.weights]
    with pytest.raises(RuntimeError, match="no"):
        ks.wrap_model(model, "lora", target="all", rank=2)
    assert type(model) is _Refuses and type(model.first) is layers.Dense
    assert [w.trainable for w in model.weights] == flags
    np.testing.assert_array_equal(_out(model), plain)


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX has no float64 by default"
)
def test_float64():
    inputs = keras.Input((16,), dtype="float64")
    layer = layers.Dense(8, name="hidden", dtype="float64")
    model = keras.Model(inputs, layer(inputs))
    ks.wrap_model(model, "lora", target="hidden", rank=2)
    _jolt(model)
    adapted = _out(model)
    ks.merge_model(model)
    np.testing.assert_allclose(_out(model), adapted, atol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="a plain model fails in TensorFlow's recompute_grad as well",
)
def test_rematerialised():
    with keras.RematScope(mode="full"):
        model = _mlp()
    ks.wrap_model(model, "lora", target="hidden", rank=4)
    model.compile("sgd", "mse")
    model.fit(_x(8, 16), np.ones((8, 4)), verbose=0)
    if keras.backend.backend() == "jax":
        ks.unwrap_model(model)
        ks.wrap_model(model, "dylora", target="hidden", rank=4)
        with pytest.raises((ValueError, RuntimeError), match="RematScope"):
            model.fit(_x(8, 16), np.ones((8, 4)), verbose=0)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="TensorFlow's strategies"
)
def test_wrapped_outside_of_its_strategys_scope():
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = _mlp()
        model.compile("sgd", "mse")
    ks.wrap_model(model, "lora", target="hidden", rank=2)
    before = model.get_layer("hidden").lora_b.numpy()
    model.fit(_x(8, 16), np.ones((8, 4)), verbose=0)
    adapted = _out(model)
    assert np.abs(model.get_layer("hidden").lora_b.numpy() - before).max() > 0
    ks.merge_model(model)
    np.testing.assert_allclose(_out(model), adapted, atol=1e-5)


def _classifier():
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=30,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=None
    )


def _ids():
    return {
        "token_ids": np.ones((2, 8), "int32"),
        "segment_ids": np.zeros((2, 8), "int32"),
        "padding_mask": np.ones((2, 8), "int32"),
    }


@pytest.mark.filterwarnings(
    "ignore:.*was not called as part of model loading:UserWarning"
)
def test_a_wrapped_task_is_saved_whole_or_refused(tmp_path):
    model = _classifier()
    plain = _out(model, _ids())
    ks.wrap_model(model, "lora", rank=2)
    _jolt(model)
    adapted = _out(model, _ids())
    model.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras")
    for again in (loaded, copy.deepcopy(model)):
        np.testing.assert_allclose(_out(again, _ids()), adapted, atol=1e-6)
        assert len(again.trainable_weights) == len(model.trainable_weights)
    clone = keras.models.clone_model(model)
    found = [x for x in clone._flatten_layers() if isinstance(x, ks.LoRADense)]
    assert len(found) == 2
    for part in (model, model.backbone):
        with pytest.raises(ValueError, match="no preset can hold them"):
            part.save_to_preset(tmp_path / "preset")
    with ks.unwrapped(model):
        model.save_to_preset(tmp_path / "preset")
    again = type(_classifier()).from_preset(
        str(tmp_path / "preset"), preprocessor=None
    )
    np.testing.assert_allclose(_out(again, _ids()), plain, atol=1e-6)


def test_a_model_that_was_never_finished_is_no_owner():
    """Its constructor raised, say, and somebody keeps the object."""

    class Broken(keras.Model):
        pass

    unfinished = object.__new__(Broken)
    inner = _mlp()
    inputs = keras.Input((16,))
    outer = keras.Model(inputs, inner(inputs))
    ks.wrap_model(inner, "lora", target="hidden", rank=2)
    _jolt(inner)
    assert type(unfinished) is Broken
    np.testing.assert_array_equal(_out(outer), _out(inner))
