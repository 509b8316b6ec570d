import keras
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks


def _matrix(variant, adapter, lidb_a, lidb_b, outer_a, outer_b):
    product = (outer_a @ lidb_a) @ (lidb_b @ outer_b)
    return on_blocks(adapter, 6 / 2 * product)


VARIANTS = [
    Variant(
        ks.LiDBDense,
        "lidb",
        {"rank": 2, "alpha": 6, "down": 3, "up": 2},
        _matrix,
        lambda case, layer: 2 * (3 + 2),
    )
]


def test_outer_factors_are_orthonormal_and_frozen():
    layer = ks.LiDBDense(keras.layers.Dense(30), down=20, up=10, seed=0)
    layer.build((None, 40))
    a, b = layer.outer_a.numpy(), layer.outer_b.numpy()
    np.testing.assert_allclose(a.T @ a, np.eye(20), atol=1e-5)
    np.testing.assert_allclose(b @ b.T, np.eye(10), atol=1e-5)
    assert [w.name for w in layer.trainable_weights] == ["lidb_a", "lidb_b"]


def test_it_becomes_a_lora():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(9)])
    ks.wrap_model(model, "lidb", "all", down=4, up=3)
    adapter = model.layers[0]
    adapter.lidb_b.assign(np.ones((1, 3)))
    x = np.random.default_rng(0).normal(size=(3, 12)).astype("float32")
    before = ops.convert_to_numpy(model(x))
    ks.to_lora(model)
    assert model.layers[0].lora_a.shape == (12, 1)
    after = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"down": 13, "up": 3}, "down=13.*1 to 12"),
        ({"down": 4, "up": 10}, "up=10.*1 to 9"),
        ({"down": 4, "up": 3, "rank": 4}, "up=3, rank=4"),
    ],
)
def test_sizes_that_do_not_fit(options, match):
    layer = ks.LiDBDense(keras.layers.Dense(9), **options)
    with pytest.raises(ValueError, match=match):
        layer.build((None, 12))
