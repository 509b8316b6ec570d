import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from lora_test import lora_matrix
from variants import Variant

import keras_spectral as ks

WITH_COLUMNS = [c for c in layer_cases.ALL if "transpose" not in c.name]


def _matrix(adapter, change, magnitude, kernel_norms):
    """`V m / |V| - K` with V = K + change."""
    kernel = np.float64(ops.convert_to_numpy(adapter.view.matrix()))
    np.testing.assert_allclose(
        kernel_norms, np.linalg.norm(kernel, axis=0), rtol=1e-5
    )
    v = kernel + change
    return v * magnitude / np.linalg.norm(v, axis=0) - kernel


def _standard(variant, adapter, lora_a, lora_b, **weights):
    change = lora_matrix(adapter, 6 / 2, lora_a, lora_b)
    return _matrix(adapter, change, **weights)


def _rslora(variant, adapter, lora_a, lora_b, **weights):
    change = lora_matrix(adapter, 3 / np.sqrt(2), lora_a, lora_b)
    return _matrix(adapter, change, **weights)


def _pissa(variant, adapter, lora_a, lora_b, start_a, start_b, **weights):
    change = lora_matrix(adapter, 1, lora_a, lora_b)
    change = change - lora_matrix(adapter, 1, start_a, start_b)
    return _matrix(adapter, change, **weights)


def _size(case, layer):
    return 2 * case.size + layer_cases.columns(layer)


VARIANTS = [
    Variant(
        ks.DoRADense,
        "dora",
        {"rank": 2, "alpha": 6},
        _standard,
        _size,
        cases=WITH_COLUMNS,
    ),
    Variant(
        ks.DoRADense,
        "dora_rslora",
        {"rank": 2, "scaling": "rslora", "alpha": 3},
        _rslora,
        _size,
        cases=layer_cases.named("dense", "conv_2d_strided"),
    ),
    Variant(
        ks.DoRADense,
        "dora_pissa",
        {"rank": 2, "initializer": "pissa"},
        _pissa,
        _size,
        cases=layer_cases.named("dense", "conv_2d_groups", "embedding"),
        exact_start=False,
    ),
]


def test_golden_numbers():
    arrays = golden.arrays_of("dora.npz", "linear")
    layer = ks.DoRADense(golden.dense_of(arrays), rank=3, alpha=6)
    layer.build(arrays["x"].shape)
    start = "param.lin.lora_"
    layer.lora_a.assign(arrays[f"{start}A.weight"].T)
    layer.lora_b.assign(arrays[f"{start}B.weight"].T)
    layer.magnitude.assign(arrays[f"{start}magnitude_vector.weight"])
    start = "grad.lin.lora_"
    gradients = {
        "lora_a": arrays[f"{start}A.weight"].T,
        "lora_b": arrays[f"{start}B.weight"].T,
        "magnitude": arrays[f"{start}magnitude_vector.weight"],
    }
    golden.check_dense(layer, arrays, gradients)


def _layer(base=None, **options):
    layer = ks.DoRADense(base or keras.layers.Dense(6), **options)
    layer.build((None, 5))
    return layer


def test_dropout_acts_on_the_pair_alone():
    layer = _layer(rank=2, dropout=0.5, seed=1)
    x = np.ones((64, 5), "float32")
    layer.magnitude.assign(2 * layer.magnitude)
    still = ops.convert_to_numpy(layer(x, training=True))
    assert np.abs(still - still[0]).max() == 0
    layer.lora_b.assign(np.ones((2, 6)))
    moving = ops.convert_to_numpy(layer(x, training=True))
    assert np.abs(moving - moving[0]).max() > 1e-3
    still = ops.convert_to_numpy(layer(x, training=False))
    assert np.abs(still - still[0]).max() == 0


def test_columns_of_zeros_train():
    base = keras.layers.Dense(6, kernel_initializer="zeros")
    layer = _layer(base, rank=2)
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    assert not ops.convert_to_numpy(layer(x)).any()
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.optimizer.build(model.trainable_variables)
    y = x @ np.ones((5, 6), "float32")
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, epochs=20, verbose=0)
    assert model.evaluate(x, y, verbose=0) < 0.8 * before


def test_a_pair_that_takes_a_column_away_stays_finite():
    layer = _layer(rank=5)
    layer.lora_a.assign(-layer.layer.kernel.numpy()[:, :5])
    layer.lora_b.assign(np.eye(5, 6))
    got = ops.convert_to_numpy(layer(np.ones((2, 5), "float32")))
    assert np.isfinite(got).all()


def test_the_kernel_is_read_dequantised():
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.quantize("int8")
    x = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    plain = ops.convert_to_numpy(model(x))
    ks.wrap_model(model, "dora", target="all", rank=2, alpha=4)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), plain)
    adapter = model.layers[0]
    kernel = ops.convert_to_numpy(adapter.view.matrix())
    model.compile("adam", "mse")
    model.fit(x, np.ones((8, 8)), epochs=3, verbose=0)
    pair = adapter.lora_a.numpy() @ adapter.lora_b.numpy()
    v = kernel + 2 * pair
    ratio = adapter.magnitude.numpy() / np.linalg.norm(v, axis=0)
    assert np.abs(ratio - 1).max() > 1e-4
    expected = (plain + 2 * x @ pair) * ratio
    got = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    with pytest.raises(ValueError, match="quantised"):
        ks.merge_model(model)


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.Conv1DTranspose(3, 2), {}, "patches overlap"),
        (keras.layers.ReversibleEmbedding(5, 4), {}, "one direction"),
        (keras.layers.Embedding(5, 4), {"dropout": 0.1}, "token ids"),
        (keras.layers.Dense(3), {"rank": 0}, "rank=0"),
        (keras.layers.Dense(3), {"scaling": "root"}, "scaling='root'"),
        (keras.layers.Dense(3), {"initializer": "svd"}, "initializer='svd'"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.DoRADense(base, **options)


def test_a_model_may_be_built_by_fit():
    layer = ks.DoRADense(keras.layers.Dense(6), rank=2)
    model = keras.Sequential([layer])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    model.fit(x, np.ones((8, 6)), verbose=0)
    assert len(layer.trainable_weights) == 3
    norms = np.linalg.norm(layer.layer.kernel.numpy(), axis=0)
    np.testing.assert_allclose(layer.kernel_norms.numpy(), norms, rtol=1e-5)
    assert np.abs(layer.magnitude.numpy() - norms).max() > 1e-4
