import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks


def lora_matrix(adapter, scale, lora_a, lora_b):
    """`scale A B`, as far as the kernel has weights."""
    return on_blocks(adapter, scale * (lora_a @ lora_b))


def _standard(variant, adapter, **weights):
    alpha = variant.options.get("alpha", 2)
    return lora_matrix(adapter, alpha / 2, **weights)


def _rslora(variant, adapter, **weights):
    return lora_matrix(adapter, 3 / np.sqrt(2), **weights)


def _pissa(variant, adapter, start_a, start_b, **weights):
    start = lora_matrix(adapter, 1, start_a, start_b)
    return lora_matrix(adapter, 1, **weights) - start


SOME = layer_cases.named("dense", "conv_2d_groups")
VARIANTS = [
    Variant(
        ks.LoRADense, "lora", {"rank": 2}, _standard, cases=layer_cases.ALL
    ),
    Variant(
        ks.LoRADense,
        "rslora",
        {"rank": 2, "scaling": "rslora", "alpha": 3},
        _rslora,
        cases=layer_cases.named("dense", "conv_2d_strided"),
    ),
    Variant(
        ks.LoRADense,
        "pissa",
        {"rank": 2, "initializer": "pissa"},
        _pissa,
        exact_start=False,
    ),
    Variant(
        ks.LoRADense,
        "olora",
        {"rank": 2, "initializer": "olora"},
        _pissa,
        exact_start=False,
        cases=SOME,
    ),
    Variant(
        ks.LoRADense,
        "orthogonal",
        {"rank": 2, "initializer": "orthogonal"},
        _standard,
        exact_start=False,
        cases=SOME,
    ),
    Variant(
        ks.LoRADense,
        "mica",
        {"rank": 2, "initializer": "mica"},
        _standard,
        lambda case, layer: 2 * layer_cases.rows(layer),
        cases=SOME,
    ),
]


def _layer(**options):
    layer = ks.LoRADense(keras.layers.Dense(6, name="base"), **options)
    layer.build((None, 5))
    return layer


def test_start_values():
    keras.utils.set_random_seed(1)
    layer = ks.LoRADense(keras.layers.Dense(40), rank=30)
    layer.build((None, 400))
    a = layer.lora_a.numpy()
    bound = np.sqrt(1 / 400)
    assert a.shape == (400, 30) and np.abs(a).max() <= bound
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.05)
    assert not layer.lora_b.numpy().any()
    assert float(layer.scale) == 1.0


def test_scaling():
    assert float(_layer(rank=4, alpha=8).scale) == 2.0
    rslora = _layer(rank=4, alpha=8, scaling="rslora")
    assert float(rslora.scale) == 4.0


@pytest.mark.parametrize("alpha", [6, -2])
def test_pissa_starts_as_the_first_singular_triplets(alpha):
    layer = _layer(rank=2, alpha=alpha, initializer="pissa")
    kernel = layer.layer.kernel.numpy()
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    product = (u[:, :2] * s[:2]) @ vt[:2]
    got = layer.lora_a.numpy() @ layer.lora_b.numpy() * alpha / 2
    np.testing.assert_allclose(got, product, atol=1e-5)
    balance = np.linalg.norm(layer.lora_a.numpy(), axis=0)
    expected = np.sqrt(s[:2] / abs(alpha / 2))
    np.testing.assert_allclose(balance, expected, rtol=1e-4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_golden_starts(start):
    arrays = golden.arrays_of("lora_inits.npz", start)
    whole = np.load(golden.folder() / "lora_inits.npz")
    base = keras.layers.Dense(20)
    base.build((None, 24))
    base.kernel.assign(whole["W"].T)
    layer = ks.LoRADense(base, rank=4, alpha=8, initializer=start)
    layer.build((None, 24))
    scale = float(arrays["scaling"])
    assert float(layer.scale) == scale
    a, b = layer.lora_a.numpy(), layer.lora_b.numpy()
    np.testing.assert_allclose(a @ b, (arrays["B"] @ arrays["A"]).T, atol=1e-5)
    residual = base.kernel.numpy() - scale * a @ b
    np.testing.assert_allclose(residual.T, arrays["base_after"], atol=1e-5)
    x = whole["x"]
    got, plain = ops.convert_to_numpy(layer(x)), ops.convert_to_numpy(base(x))
    np.testing.assert_allclose(got, plain, atol=1e-5)


def test_an_orthogonal_start_is_random_and_cancels():
    layer = _layer(rank=4, initializer="orthogonal", seed=1)
    a, b = layer.lora_a.numpy(), layer.lora_b.numpy()
    assert np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == 2
    assert np.abs(a @ b).max() < 1e-6
    assert 0.02 < a.std() < 0.3 and 0.02 < b.std() < 0.3
    with pytest.raises(ValueError, match="Expected an even rank"):
        _layer(rank=3, initializer="orthogonal")


def test_mica_freezes_the_last_singular_vectors():
    layer = _layer(rank=2, initializer="mica")
    assert [w.name for w in layer.trainable_weights] == ["lora_a"]
    b = layer.lora_b.numpy()
    np.testing.assert_allclose(b @ b.T, np.eye(2), atol=1e-5)
    s = np.linalg.svd(layer.layer.kernel.numpy(), compute_uv=False)
    sizes = np.linalg.norm(layer.layer.kernel.numpy() @ b.T, axis=0)
    np.testing.assert_allclose(sizes, s[-2:], atol=1e-5)


def test_dropout_acts_while_training_only():
    layer = _layer(rank=2, dropout=0.5, seed=1)
    layer.lora_b.assign(np.ones((2, 6)))
    x = np.ones((4096, 5), "float32")
    still = ops.convert_to_numpy(layer(x, training=False))
    assert np.abs(still - still[0]).max() == 0
    moving = ops.convert_to_numpy(layer(x, training=True))
    assert np.abs(moving - moving[0]).max() > 1e-3
    # Dropped inputs are scaled up: the mean correction stays.
    base = ops.convert_to_numpy(layer.layer(x))
    np.testing.assert_allclose(
        (moving - base).mean(), (still - base).mean(), atol=0.1
    )


def test_delta_enters_before_the_activation():
    layer = ks.LoRADense(keras.layers.Dense(6, activation="relu"), rank=2)
    layer.build((None, 5))
    layer.lora_b.assign(-10 * np.ones((2, 6)))
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    assert ops.convert_to_numpy(layer(x)).min() >= 0


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "8", None])
def test_bad_rank(rank):
    base = keras.layers.Dense(6, activation="relu")
    with pytest.raises(ValueError, match="Received rank="):
        ks.LoRADense(base, rank=rank)
    assert base.activation is keras.activations.relu


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": "x"}, "alpha='x'"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"scaling": "root"}, "scaling='root'"),
        ({"initializer": "svd"}, "initializer='svd'"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_bad_options(options, match):
    base = keras.layers.Dense(6)
    with pytest.raises(ValueError, match=match):
        ks.LoRADense(base, **options)


def test_rank_above_the_smaller_dimension_leaves_the_base_whole():
    base = keras.layers.Dense(6, activation="relu")
    layer = ks.LoRADense(base, rank=7)
    with pytest.raises(ValueError, match="at most 5"):
        layer.build((None, 5))
    assert base.activation is keras.activations.relu and base.trainable


def test_embedding_takes_no_dropout():
    base = keras.layers.Embedding(5, 4)
    with pytest.raises(ValueError, match="token ids cannot be dropped"):
        ks.LoRADense(base, rank=2, dropout=0.1)


def test_an_adapter_is_not_wrapped_again():
    layer = _layer(rank=2)
    with pytest.raises(ValueError, match="already wrapped"):
        ks.LoRADense(layer)


def test_attributes_are_the_bases_and_kernel_is_effective():
    layer = _layer(rank=2)
    layer.lora_b.assign(np.ones((2, 6)))
    assert layer.units == 6
    expected = layer.layer.kernel.numpy() + layer.lora_a.numpy() @ np.ones(
        (2, 6)
    )
    got = ops.convert_to_numpy(layer.kernel)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    with pytest.raises(AttributeError):
        layer.no_such_thing  # noqa: B018


def test_tied_embedding_changes_both_directions():
    base = keras.layers.ReversibleEmbedding(9, 4, logit_soft_cap=2.0)
    layer = ks.LoRADense(base, rank=2)
    ids = np.array([[1, 2, 3]])
    layer(ids)
    rng = np.random.default_rng(0)
    layer.lora_b.assign(rng.normal(size=(2, 4)))
    hidden = rng.normal(size=(1, 3, 4)).astype("float32")
    forward, logits = layer(ids), layer(hidden, reverse=True)
    layer.merge()
    close = dict(atol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(forward), ops.convert_to_numpy(base(ids)), **close
    )
    expected = ops.convert_to_numpy(base(hidden, reverse=True))
    np.testing.assert_allclose(ops.convert_to_numpy(logits), expected, **close)


def test_gradient_reaches_only_the_factors_of_a_quantised_base():
    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(8), keras.layers.Dense(4)]
    )
    model.quantize("int8")
    ks.wrap_model(model, "lora", target="all", rank=2)
    x = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    frozen = [w.numpy() for w in model.non_trainable_weights]
    model.compile(optimizer="adam", loss="mse")
    model.fit(x, np.ones((8, 4)), epochs=2, verbose=0)
    for weight, value in zip(model.non_trainable_weights, frozen):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert all(w.numpy().any() for w in model.trainable_weights)
    with pytest.raises(ValueError, match="quantised"):
        ks.merge_model(model)
