import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from lora_test import lora_matrix
from variants import Variant

import keras_spectral as ks


def _formula(variant, adapter, lora_a, lora_b, **state):
    alpha = variant.options.get("alpha", 2)
    return lora_matrix(adapter, alpha / 2, lora_a, lora_b)


VARIANTS = [
    Variant(ks.DyLoRADense, "dylora", {"rank": 2, "alpha": 3}, _formula),
    Variant(
        ks.DyLoRADense,
        "dylora_frozen",
        {"rank": 2, "frozen": True},
        _formula,
        cases=layer_cases.named("dense", "conv_2d_strided"),
    ),
]


def _layer(**options):
    keras.utils.set_random_seed(0)
    layer = ks.DyLoRADense(
        keras.layers.Dense(6, name="base"), **{"rank": 4, **options}
    )
    layer.build((None, 5))
    rng = np.random.default_rng(0)
    for weight in layer.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def _x():
    return np.random.default_rng(1).normal(size=(3, 5)).astype("float32")


def _oracle(layer, rank):
    a, b = layer.lora_a.numpy(), layer.lora_b.numpy()
    base = ops.convert_to_numpy(layer.layer(_x()))
    return base + layer.alpha / rank * _x() @ a[:, :rank] @ b[:rank]


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_truncated_is_the_first_pairs(rank):
    layer = _layer(alpha=3)
    layer.truncate(rank)
    got = ops.convert_to_numpy(layer(_x()))
    np.testing.assert_allclose(got, _oracle(layer, rank), atol=1e-5)
    matrix = layer.layer.kernel.numpy()
    merged = ops.convert_to_numpy(layer.merged_matrix())
    a, b = layer.lora_a.numpy(), layer.lora_b.numpy()
    expected = matrix + 3 / rank * a[:, :rank] @ b[:rank]
    np.testing.assert_allclose(merged, expected, atol=1e-5)


@pytest.mark.parametrize("top", [4, 3])
def test_training_draws_every_rank_up_to_the_one_in_use(top):
    layer = _layer(seed=3)
    layer.truncate(top)
    expected = [_oracle(layer, rank) for rank in range(1, 5)]
    seen = []
    for _ in range(40):
        got = ops.convert_to_numpy(layer(_x(), training=True))
        errors = [np.abs(got - wanted).max() for wanted in expected]
        assert min(errors) < 1e-4
        seen.append(1 + int(np.argmin(errors)))
    assert set(seen) == set(range(1, top + 1))


def test_frozen_trains_one_pair_a_step():
    layer = _layer(frozen=True, seed=1)
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    moved = set()
    for _ in range(12):
        before = [w.numpy().copy() for w in layer.trainable_weights]
        model.fit(_x(), np.ones((3, 6)), verbose=0)
        a, b = (
            np.abs(w.numpy() - old).max(axis=axis) > 0
            for w, old, axis in zip(layer.trainable_weights, before, (0, 1))
        )
        assert a.sum() == b.sum() == 1 and a.argmax() == b.argmax()
        moved.add(int(a.argmax()))
    assert len(moved) > 1


def test_all_pairs_below_the_rank_train_otherwise():
    layer = _layer(seed=1)
    model = keras.Sequential([keras.Input((5,)), layer])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    for _ in range(6):
        before = layer.lora_b.numpy().copy()
        model.fit(_x(), np.ones((3, 6)), verbose=0)
        moved = np.abs(layer.lora_b.numpy() - before).max(axis=1) > 0
        assert moved[0] and (np.diff(moved.astype(int)) <= 0).all()


def test_the_rank_in_use_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((5,)), _layer()])
    model.layers[0].truncate(2)
    expected = model.predict(_x(), verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.layers[0].active_rank() == 2
    np.testing.assert_array_equal(again.predict(_x(), verbose=0), expected)


@pytest.mark.parametrize("rank", [0, 5, 1.5, True])
def test_ranks_that_are_not_there(rank):
    layer = _layer()
    with pytest.raises(ValueError, match="rank="):
        layer.truncate(rank)
    assert layer.active_rank() == 4
