import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from lora_test import lora_matrix
from variants import Variant

import keras_spectral as ks


def _matrix(variant, adapter, lora_a, lora_b):
    return lora_matrix(adapter, 6 / 2, lora_a, lora_b)


VARIANTS = [
    Variant(
        ks.OrthogonalAdaptation,
        "orthogonal_adaptation",
        {"rank": 2, "alpha": 6},
        _matrix,
        lambda case, layer: 2 * layer_cases.columns(layer),
    )
]


def _layer(index, rank=3):
    layer = ks.OrthogonalAdaptation(
        keras.layers.Dense(6), rank=rank, index=index
    )
    layer.build((None, 12))
    return layer


def test_parts_of_the_basis_are_orthogonal_and_the_same_everywhere():
    parts = [_layer(index).lora_a.numpy() for index in range(4)]
    whole = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(whole.T @ whole, np.eye(12), atol=1e-5)
    np.testing.assert_array_equal(parts[1], _layer(1).lora_a.numpy())
    # Drawn by numpy, so that all backends have the same.
    np.testing.assert_allclose(parts[0][0, 0], 0.051518, atol=1e-5)


def test_what_one_has_learned_another_leaves_alone():
    """An input in one adapter's subspace sees that one alone."""
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(6)])
    rng, own = np.random.default_rng(0), []
    for index in range(3):
        ks.wrap_model(
            model,
            "orthogonal_adaptation",
            "all",
            rank=3,
            index=index,
            adapter=f"a{index}",
        )
        member = model.layers[0].members()[-1]
        member.lora_b.assign(rng.normal(size=(3, 6)))
        own.append(member.lora_a.numpy())
    for index, a in enumerate(own):
        x = rng.normal(size=(4, 3)).astype("float32") @ a.T
        ks.set_adapters(model, f"a{index}")
        alone = ops.convert_to_numpy(model(x))
        ks.set_adapters(model, ["a0", "a1", "a2"])
        together = ops.convert_to_numpy(model(x))
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="room for 4 adapters"):
        _layer(4)
    with pytest.raises(ValueError, match="seed=None"):
        ks.OrthogonalAdaptation(keras.layers.Dense(3), seed=None)
    with pytest.raises(ValueError, match="index=-1"):
        ks.OrthogonalAdaptation(keras.layers.Dense(3), index=-1)
