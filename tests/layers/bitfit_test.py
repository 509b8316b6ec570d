import keras
import layer_cases
import numpy as np
import pytest
from keras import layers
from keras import ops
from variants import Variant

import keras_spectral as ks


def _no_change(variant, adapter, bias_delta):
    return np.zeros((adapter.view.n_in, adapter.view.n_out))


def _longer_bias(variant, adapter, bias):
    return bias + ops.convert_to_numpy(adapter.bias_delta)


WITH_BIAS = [
    case
    for case in layer_cases.ALL
    if getattr(case.make(), "use_bias", False)
    or getattr(case.make(), "bias_axes", None)
]
VARIANTS = [
    Variant(
        ks.BitFit,
        "bitfit",
        {},
        _no_change,
        lambda case, layer: np.prod(layer.bias.shape),
        cases=WITH_BIAS,
        bias=_longer_bias,
    )
]

SHAPE = (4, 3, 5, 6)
NORMS = {
    "layer": lambda: layers.LayerNormalization(),
    "layer_of_two": lambda: layers.LayerNormalization(axis=[2, 3]),
    "batch": lambda: layers.BatchNormalization(),
    "batch_of_first": lambda: layers.BatchNormalization(axis=1),
    "group": lambda: layers.GroupNormalization(2),
    "group_of_first": lambda: layers.GroupNormalization(3, axis=1),
    "depthwise": lambda: layers.DepthwiseConv2D(2, activation="relu"),
}
if keras.backend.backend() != "torch":  # where Keras itself fails
    NORMS["layer_of_first"] = lambda: layers.LayerNormalization(axis=1)
OVER_NORMS = pytest.mark.parametrize("kind", NORMS)


def _numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def _inputs():
    return np.random.default_rng(0).normal(size=SHAPE).astype("float32")


def _model(kind, dtype=None):
    """A norm, its weights away from their start."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE[1:], dtype="float32")
    layer = NORMS[kind]()
    config = {**layer.get_config(), "name": "norm"}
    if dtype:
        config["dtype"] = dtype
    layer = type(layer).from_config(config)
    model = keras.Model(inputs, layer(inputs))
    rng = np.random.default_rng(1)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(1, 0.2, weight.shape))
    return model


def _wrapped(kind, dtype=None):
    model = _model(kind, dtype)
    plain = _numpy(model(_inputs()))
    ks.wrap_model(model, "bitfit", target="norm")
    return model, model.layers[1], plain


def _shift(adapter):
    rng = np.random.default_rng(2)
    adapter.bias_delta.assign(rng.normal(size=adapter.bias_delta.shape))


@OVER_NORMS
def test_equals_a_base_with_another_bias(kind):
    model, adapter, plain = _wrapped(kind)
    assert adapter.view is None
    np.testing.assert_array_equal(_numpy(model(_inputs())), plain)
    _shift(adapter)
    got = _numpy(model(_inputs()))
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(_numpy(model(_inputs())), plain)
    base = adapter.layer
    bias = base.bias if kind == "depthwise" else base.beta
    bias.assign(bias + adapter.bias_delta)
    np.testing.assert_allclose(got, _numpy(base(_inputs())), atol=1e-5)


@OVER_NORMS
def test_merging_gives_the_plain_layer(kind):
    model, adapter, _ = _wrapped(kind)
    _shift(adapter)
    adapted = _numpy(model(_inputs()))
    values = [w.numpy() for w in adapter.layer.weights]
    with ks.merged(model):
        assert model.layers[1] is adapter.layer
        got = _numpy(model(_inputs()))
    np.testing.assert_allclose(got, adapted, atol=1e-5)
    for weight, value in zip(adapter.layer.weights, values):
        np.testing.assert_array_equal(weight.numpy(), value)
    ks.merge_model(model)
    assert model.layers[1] is adapter.layer
    got = _numpy(model(_inputs()))
    np.testing.assert_allclose(got, adapted, atol=1e-5)


@OVER_NORMS
def test_files_and_models_keep_it(kind, tmp_path):
    model, adapter, _ = _wrapped(kind)
    _shift(adapter)
    adapted = _numpy(model(_inputs()))
    ks.save_adapters(model, tmp_path / "bitfit.safetensors")
    fresh = _model(kind)
    ks.load_adapters(fresh, tmp_path / "bitfit.safetensors")
    np.testing.assert_allclose(_numpy(fresh(_inputs())), adapted, atol=1e-6)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_numpy(again(_inputs())), adapted, atol=1e-6)
    again.compile(keras.optimizers.SGD(0.1), "mse")
    before = [w.numpy() for w in again.layers[1].layer.weights]
    again.fit(_inputs(), np.zeros_like(adapted), verbose=0)
    for weight, value in zip(again.layers[1].layer.weights, before):
        np.testing.assert_array_equal(weight.numpy(), value)
    moved = again.layers[1].bias_delta.numpy() - adapter.bias_delta.numpy()
    assert np.abs(moved).max() > 0


@OVER_NORMS
def test_two_mix(kind, tmp_path):
    model, first, plain = _wrapped(kind)
    _shift(first)
    one = _numpy(model(_inputs()))
    ks.wrap_model(model, "bitfit", target="norm", adapter="two")
    np.testing.assert_array_equal(_numpy(model(_inputs())), plain)
    second = model.layers[1].members()[1]
    _shift(second)
    second.bias_delta.assign(-2 * second.bias_delta)
    two = _numpy(model(_inputs()))
    ks.set_adapters(model, {"default": 0.5, "two": 1.0})
    adapted = _numpy(model(_inputs()))
    if kind != "depthwise":  # which has an activation
        expected = plain + 0.5 * (one - plain) + (two - plain)
        np.testing.assert_allclose(adapted, expected, atol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_numpy(again(_inputs())), adapted, atol=1e-6)
    with ks.merged(model):
        got = _numpy(model(_inputs()))
    np.testing.assert_allclose(got, adapted, atol=1e-5)
    ks.delete_adapter(model, "two")
    ks.set_adapters(model, "default")
    np.testing.assert_allclose(_numpy(model(_inputs())), one, atol=1e-6)


@pytest.mark.parametrize("kind", ["layer", "batch", "depthwise"])
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_16_bits(kind, dtype):
    model, adapter, _ = _wrapped(kind, dtype)
    assert adapter.bias_delta.dtype == "float32"
    _shift(adapter)
    outputs = model(_inputs())
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    ks.merge_model(model)
    np.testing.assert_allclose(
        _numpy(outputs), _numpy(model(_inputs())), atol=0.1
    )


def _network(dtype=None):
    """Layers with a bias and without, and norms with a shift and without."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(5, name="value", dtype=dtype),
            layers.LayerNormalization(name="norm", dtype=dtype),
            layers.Dense(5, use_bias=False, name="query", dtype=dtype),
            layers.BatchNormalization(
                center=False, name="centred", dtype=dtype
            ),
            layers.Dense(2, name="head", dtype=dtype),
        ]
    )


def _x():
    return np.random.default_rng(0).normal(size=(8, 6)).astype("float32")


def _fit(model, epochs=3):
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.optimizer.build(model.trainable_variables)
    model.fit(_x(), np.ones((8, 2)), epochs=epochs, verbose=0)


def _trained(model):
    """`{path: names of methods}`."""
    rows = ks.adapter_summary(model).rows
    return {row.path: row.method for row in rows if row.trainable}


def test_the_preset_takes_all_biases_and_reports_nothing_else():
    model = ks.wrap_model(_network(), "bitfit")
    assert _trained(model) == dict.fromkeys(("value", "norm", "head"), "bitfit")
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert count == 5 + 5 + 2
    rows = ks.list_targets(model, "bitfit").rows
    assert [row.path for row in rows] == ["value", "norm", "head"]


def test_biases_train_beside_adapters_of_another_method():
    model = _network()
    plain = _numpy(model(_x()))
    ks.wrap_model(
        model, "lora", target="value|query", rank=1, trainable="biases"
    )
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert count == 11 + 10 + 5 + 5 + 2
    np.testing.assert_array_equal(_numpy(model(_x())), plain)
    before = [w.numpy() for w in model.trainable_weights]
    _fit(model)
    for weight, value in zip(model.trainable_weights, before):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path
    adapted = _numpy(model(_x()))
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(_numpy(model(_x())), plain)
    with ks.merged(model):
        np.testing.assert_allclose(_numpy(model(_x())), adapted, atol=1e-5)
    with ks.unwrapped(model):
        np.testing.assert_array_equal(_numpy(model(_x())), plain)
    ks.merge_model(model)
    np.testing.assert_allclose(_numpy(model(_x())), adapted, atol=1e-5)
    assert [layer.name for layer in model.layers] == [
        layer.name for layer in _network().layers
    ]


def test_biases_of_each_adapter_are_its_own(tmp_path):
    model = _network()
    plain = _numpy(model(_x()))
    outputs = {}
    for name in ("one", "two"):
        ks.wrap_model(
            model,
            "lora",
            target="value",
            rank=1,
            trainable="biases",
            adapter=name,
        )
        np.testing.assert_array_equal(_numpy(model(_x())), plain)
        _fit(model, epochs=2 if name == "one" else 5)
        outputs[name] = _numpy(model(_x()))
    for name, expected in outputs.items():
        ks.set_adapters(model, name)
        got = _numpy(model(_x()))
        np.testing.assert_allclose(got, expected, atol=1e-6)
        ks.save_adapters(model, tmp_path / name, adapter=name)
    ks.delete_adapter(model, "two")
    ks.set_adapters(model, "one")
    got = _numpy(model(_x()))
    np.testing.assert_allclose(got, outputs["one"], atol=1e-6)
    fresh = _network()
    for name, expected in outputs.items():
        ks.load_adapters(fresh, tmp_path / name)
        ks.set_adapters(fresh, name)
        got = _numpy(fresh(_x()))
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("merge", [True, False])
def test_norms_are_tuned_with_an_adapter_and_go_with_it(merge):
    model = _network()
    plain = _numpy(model(_x()))
    norm = model.get_layer("norm")
    values = [w.numpy() for w in norm.weights]
    ks.wrap_model(model, "lora", target="value", rank=1, trainable="norms")
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert count == 11 + 2 * 5 + 5
    np.testing.assert_allclose(_numpy(model(_x())), plain, atol=1e-6)
    _fit(model)
    adapted = _numpy(model(_x()))
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(_numpy(model(_x())), plain)
    if merge:
        ks.merge_model(model)
        np.testing.assert_allclose(_numpy(model(_x())), adapted, atol=1e-5)
        assert np.abs(norm.gamma.numpy() - values[0]).max() > 0
    else:
        ks.unwrap_model(model)
        np.testing.assert_array_equal(_numpy(model(_x())), plain)
        for weight, value in zip(norm.weights, values):
            np.testing.assert_array_equal(weight.numpy(), value)
    assert model.get_layer("norm") is norm


def test_norms_of_two_adapters():
    model = _network()
    outputs = {}
    for name in ("one", "two"):
        ks.wrap_model(
            model,
            "lora",
            target="value",
            rank=1,
            trainable="norms",
            adapter=name,
        )
        _fit(model, epochs=2 if name == "one" else 5)
        outputs[name] = _numpy(model(_x()))
    for name, expected in outputs.items():
        ks.set_adapters(model, name)
        got = _numpy(model(_x()))
        np.testing.assert_allclose(got, expected, atol=1e-6)
    ks.delete_adapter(model, "one")
    got = _numpy(model(_x()))
    np.testing.assert_allclose(got, outputs["two"], atol=1e-6)


def test_norms_and_biases_together():
    model = _network()
    ks.wrap_model(
        model,
        "lora",
        target="value",
        rank=1,
        trainable=["norms", "biases"],
    )
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    # LoRA, biases of "value" and "head", whole norms.
    assert count == 11 + 5 + 2 + 2 * 5 + 5
    _fit(model)
    adapted = _numpy(model(_x()))
    ks.merge_model(model)
    np.testing.assert_allclose(_numpy(model(_x())), adapted, atol=1e-5)


def test_merging_into_float32_widens_layers_with_kernels():
    model = _network("bfloat16")
    options = {"rank": 1, "trainable": "biases"}
    ks.wrap_model(model, "lora", target="value", **options)
    _fit(model)
    adapted = _numpy(model(_x()))
    ks.merge_model(model, dtype="float32")
    np.testing.assert_allclose(_numpy(model(_x())), adapted, atol=0.05)
    assert model.get_layer("value").kernel.dtype == "float32"
    assert model.get_layer("norm").beta.dtype == "bfloat16"


def test_a_lora_has_no_room_for_a_bias():
    model = ks.wrap_model(_network(), "bitfit")
    with pytest.raises(ValueError, match="changes the bias as well"):
        ks.to_lora(model)
    assert len(_trained(model)) == 3


def test_cells_keep_their_biases():
    """Their bias is no last summand of what they give."""
    model = keras.Sequential(
        [keras.Input((4, 3)), layers.GRU(5), layers.Dense(2, name="head")]
    )
    ks.wrap_model(model, "bitfit")
    assert list(_trained(model)) == ["head"]
    with pytest.raises(ValueError, match="has no bias"):
        ks.BitFit(layers.GRUCell(5))


def test_what_is_built_without_a_bias_is_refused():
    base = layers.Lambda(lambda x: x)
    base.use_bias = True
    layer = ks.BitFit(base)
    with pytest.raises(ValueError, match="has no bias"):
        layer.build((None, 6))
    assert base.trainable


def test_a_quantised_base_takes_a_merged_bias():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6)])
    model.quantize("int8")
    x = np.random.default_rng(0).normal(size=(4, 8)).astype("float32")
    ks.wrap_model(model, "bitfit")
    _shift(model.layers[0])
    adapted = _numpy(model(x))
    ks.merge_model(model)
    np.testing.assert_allclose(_numpy(model(x)), adapted, atol=1e-5)


def test_a_factorised_base_takes_a_merged_bias():
    down, up = layers.Conv2D(2, 3, use_bias=False), layers.Conv2D(4, 1)
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), ks.LowRank(down, up, name="pair")]
    )
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype("float32")
    ks.wrap_model(model, "bitfit", target="pair")
    _shift(model.layers[0])
    adapted = _numpy(model(x))
    ks.merge_model(model)
    np.testing.assert_allclose(_numpy(model(x)), adapted, atol=1e-5)


@pytest.mark.parametrize(
    "base",
    [
        layers.Dense(3, use_bias=False),
        layers.LayerNormalization(center=False),
        layers.Embedding(5, 4),
        layers.ReLU(),
    ],
)
def test_a_base_without_bias_is_refused(base):
    with pytest.raises(ValueError, match="has no bias"):
        ks.BitFit(base)
