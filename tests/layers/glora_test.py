import dataclasses
import weakref

import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks

NONE = dict.fromkeys("abcde", "none")


def _value(weights, part):
    """A part as a matrix that broadcasts, 0 where it has no weights."""
    up, down = weights.get(f"{part}_up", 0.0), weights.get(f"{part}_down")
    return up if down is None else down @ up


# When `_bias` is asked the base holds the changed kernel already.
KERNELS = weakref.WeakKeyDictionary()


def _matrix(variant, adapter, **weights):
    kernel = np.float64(ops.convert_to_numpy(adapter.view.matrix()))
    KERNELS[adapter] = kernel
    a, b = _value(weights, "a"), _value(weights, "b")
    return on_blocks(adapter, kernel * (1 + a) + b) - kernel


def _bias(variant, adapter, bias):
    weights = {w.name: w.numpy() for w in adapter.trainable_weights}
    kernel = KERNELS[adapter]
    c, d, e = (_value(weights, part) for part in "cde")
    shift = c @ kernel + e if "c_up" in weights else e
    shape = (1, kernel.shape[1])
    d, shift = (
        np.broadcast_to(x, shape).reshape(bias.shape) for x in (d, shift)
    )
    return bias * (1 + d) + shift


def _with_bias(case):
    """A case with a bias that is not zero, so that D has a gradient."""

    def make():
        layer = case.make()
        config = {**layer.get_config(), "bias_initializer": "random_normal"}
        return type(layer).from_config(config)

    return dataclasses.replace(case, name=f"{case.name}_biased", make=make)


def _pairs(layer):
    return 4 * (layer_cases.rows(layer) + layer_cases.columns(layer))


NAMES = (
    "dense",
    "dense_3d",
    "einsum_heads",
    "einsum_batched",
    "conv_2d_strided",
    "conv_2d_groups",
    "conv_separable",
    "conv_2d_channels_first",
)
BIASED = [_with_bias(case) for case in layer_cases.named(*NAMES)]
VECTORS = dict.fromkeys("abcde", "vector")
SCALARS = {**dict.fromkeys("abde", "scalar"), "c": "none"}
VARIANTS = [
    Variant(
        ks.GLoRADense,
        "glora_without_d",
        {"rank": 2, "parts": {"d": "none"}},
        _matrix,
        lambda case, layer: (
            _pairs(layer)
            + 2 * (1 + layer_cases.rows(layer))
            + layer_cases.columns(layer)
        ),
        cases=layer_cases.named(*NAMES),
        bias=_bias,
    ),
    Variant(
        ks.GLoRADense,
        "glora",
        {"rank": 2},
        _matrix,
        lambda case, layer: (
            _pairs(layer)
            + 2 * (1 + layer_cases.rows(layer))
            + 2 * layer_cases.columns(layer)
        ),
        cases=BIASED,
        bias=_bias,
    ),
    Variant(
        ks.GLoRADense,
        "glora_vectors",
        {"rank": 2, "parts": VECTORS},
        _matrix,
        lambda case, layer: (
            layer_cases.rows(layer) + 4 * layer_cases.columns(layer)
        ),
        cases=BIASED,
        bias=_bias,
    ),
    Variant(
        ks.GLoRADense,
        "glora_scalars",
        {"rank": 2, "parts": SCALARS},
        _matrix,
        lambda case, layer: 4,
        cases=BIASED[:5],
        bias=_bias,
    ),
    Variant(
        ks.GLoRADense,
        "glora_kernel",
        {"rank": 2, "parts": {**NONE, "a": "lora", "b": "lora"}},
        _matrix,
        lambda case, layer: _pairs(layer),
        cases=layer_cases.named(
            "dense_no_bias", "einsum_kernel_last", "embedding"
        ),
    ),
]


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("Alora_Clora_Dvector", {}),
        (
            "Avector_Clora_Dconstant",
            {"a": "vector", "b": "vector", "d": "scalar", "e": "scalar"},
        ),
        ("Aconstant_Cnone_Dconstant", SCALARS),
    ],
)
def test_golden_numbers(case, parts):
    arrays = golden.arrays_of("glora_peft.npz", case)
    layer = ks.GLoRADense(golden.dense_of(arrays), 3, parts)
    layer.build(arrays["x"].shape)
    gradients = {}
    for weight in layer.trainable_weights:
        part, end = weight.name.split("_")
        # Theirs of C are not transposed: it is a column there.
        ends = {"down": "Xu", "up": "Xd"} if layer.parts[part] == "lora" else {}
        theirs = f"lin.glora_{part.upper()}.{ends.get(end, 'X')}"
        shape = weight.shape
        weight.assign(arrays[f"param.{theirs}"].T.reshape(shape))
        gradients[weight.name] = arrays[f"grad.{theirs}"].T.reshape(shape)
    golden.check_dense(layer, arrays, gradients)


def _supernet(**options):
    keras.utils.set_random_seed(0)
    layer = ks.GLoRADense(
        keras.layers.Dense(6, bias_initializer="ones"),
        2,
        supernet=True,
        seed=1,
        **options,
    )
    layer.build((None, 5))
    rng = np.random.default_rng(0)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


X = np.random.default_rng(1).normal(size=(3, 5)).astype("float32")


def _fixed(layer, parts):
    """What the equation gives on a path of a supernet."""
    weights = {w.name: w.numpy() for w in layer.trainable_weights}
    used = {}
    for part, kind in parts.items():
        up, down = weights[f"{part}_up"], weights.get(f"{part}_down")
        used[part] = np.zeros((1, 1))
        if kind == "lora":
            used[part] = down @ up
        elif kind != "none":
            used[part] = up[:1] if kind == "vector" else up[:1, :1]
    kernel, bias = (w.numpy() for w in layer.layer.weights)
    c = used["c"] @ kernel if parts["c"] != "none" else 0
    kernel = kernel * (1 + used["a"]) + used["b"]
    return X @ kernel + bias * (1 + used["d"]) + used["e"] + c


PATHS = [
    dict(zip("abcde", path))
    for path in (
        ("lora", "vector", "lora", "scalar", "none"),
        ("vector", "scalar", "vector", "none", "vector"),
        ("scalar", "none", "none", "vector", "scalar"),
        ("none", "lora", "none", "none", "none"),
        ("none",) * 5,
    )
]


@pytest.mark.parametrize("parts", PATHS)
def test_a_supernet_on_a_path(parts):
    layer = _supernet(parts=parts)
    assert layer.path_in_use() == parts
    expected = _fixed(layer, parts)
    got = ops.convert_to_numpy(layer(X, training=False))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    other = _supernet()
    other.use_path(parts)
    np.testing.assert_array_equal(ops.convert_to_numpy(other(X)), got)
    layer.merge()
    got = ops.convert_to_numpy(layer.layer(X))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_training_draws_a_path_each_time():
    layer = _supernet(parts=PATHS[-1])
    draws = [ops.convert_to_numpy(layer(X, training=True)) for _ in range(20)]
    assert len({draw.tobytes() for draw in draws}) > 15
    layer.trainable = False
    plain = ops.convert_to_numpy(layer.layer(X))
    still = ops.convert_to_numpy(layer(X, training=True))
    np.testing.assert_array_equal(still, plain)


def test_every_kind_is_drawn_as_often_as_others():
    layer = _supernet()
    for part, count in zip("abcde", (4, 4, 3, 3, 3)):
        drawn = [
            np.argmax([float(x) for x in layer._chosen(part, True).values()])
            for _ in range(200)
        ]
        shares = np.bincount(drawn, minlength=count) / 200
        np.testing.assert_allclose(shares, 1 / count, atol=0.12)


@pytest.mark.compiled
def test_a_supernet_trains_all_its_weights(tmp_path):
    layer = keras.layers.Dense(6, bias_initializer="ones")
    model = keras.Sequential([keras.Input((5,)), layer])
    plain = ops.convert_to_numpy(model(X))
    ks.wrap_model(model, "glora", "all", rank=2, supernet=True, seed=1)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(X)), plain)
    (adapter,) = model.layers
    before = [w.numpy() for w in adapter.trainable_weights]
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(X, plain + 1, epochs=60, verbose=0)
    for weight, value in zip(adapter.trainable_weights, before):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path
    losses = []
    for parts in PATHS:
        adapter.use_path(parts)
        losses.append(model.evaluate(X, plain + 1, verbose=0))
    assert max(losses[:4]) < losses[4]
    adapter.use_path(PATHS[0])
    outputs = ops.convert_to_numpy(model(X))
    ks.save_adapters(model, tmp_path / "adapters.safetensors")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        ops.convert_to_numpy(again(X)), outputs, atol=1e-6
    )
    ks.unwrap_model(model)
    ks.load_adapters(model, tmp_path / "adapters.safetensors")
    np.testing.assert_allclose(
        ops.convert_to_numpy(model(X)), outputs, atol=1e-6
    )
    assert model.layers[0].path_in_use() == PATHS[0]
    ks.merge_model(model)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model(X)), outputs, atol=1e-5
    )


def test_without_a_bias():
    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6, use_bias=False)]
    )
    ks.wrap_model(model, "glora", "all", rank=2)
    adapter = model.layers[0]
    assert "d_up" not in [w.name for w in adapter.trainable_weights]
    plain = ops.convert_to_numpy(model(X))
    c = np.random.default_rng(0).normal(size=(2, 5))
    adapter.c_up.assign(c)
    adapter.e_up.assign(np.ones((1, 6)))
    row = adapter.c_down.numpy() @ c @ adapter.layer.kernel.numpy() + 1
    np.testing.assert_allclose(
        ops.convert_to_numpy(model(X)), plain + row, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"no bias to take.*\['c', 'e'\]"):
        ks.merge_model(model)
    assert model.layers[0] is adapter


def test_a_quantised_base():
    layer = keras.layers.Dense(6, bias_initializer="ones")
    model = keras.Sequential([keras.Input((5,)), layer])
    model.quantize("int8")
    plain = ops.convert_to_numpy(model(X))
    ks.wrap_model(model, "glora", "all", rank=2)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(X)), plain)
    adapter = model.layers[0]
    for name in ("a_up", "b_up", "c_up", "d_up", "e_up"):
        weight = getattr(adapter, name)
        weight.assign(np.ones(weight.shape))
    delta, shift = adapter.delta_matrix(), adapter.bias_change()
    expected = plain + X @ ops.convert_to_numpy(delta)
    expected = expected + ops.convert_to_numpy(shift)
    np.testing.assert_allclose(
        ops.convert_to_numpy(model(X)), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.ReversibleEmbedding(5, 4), {}, "one direction"),
        (keras.layers.Conv1DTranspose(3, 2), {}, "patches overlap"),
        (keras.layers.Dense(3), {"rank": 0}, "rank=0"),
        (keras.layers.Dense(3), {"supernet": 1}, "supernet=1"),
        (keras.layers.Dense(3), {"parts": {"f": "lora"}}, "'f': 'lora'"),
        (keras.layers.Dense(3), {"parts": {"c": "scalar"}}, "'c'.*scalar"),
        (keras.layers.Dense(3), {"parts": "lora"}, "parts='lora'"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.GLoRADense(base, **options)


@pytest.mark.parametrize(
    ("parts", "options", "match"),
    [
        (NONE, {}, "would train"),
        ({**NONE, "d": "vector"}, {}, "would train"),
        ({}, {"rank": 7}, "rank=7.*at most 5"),
    ],
)
def test_what_it_refuses_once_it_is_built(parts, options, match):
    base = keras.layers.Dense(6, use_bias=False)
    layer = ks.GLoRADense(base, parts=parts, **options)
    with pytest.raises(ValueError, match=match):
        layer.build((None, 5))
    assert base.trainable


def test_a_fixed_path_stays():
    layer = ks.GLoRADense(keras.layers.Dense(6))
    layer.build((None, 5))
    with pytest.raises(ValueError, match="fixed path.*supernet=True"):
        layer.use_path(NONE)
