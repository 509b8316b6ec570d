import keras
import numpy as np
import pytest
from keras import ops
from spectral_test import spectral_matrix
from variants import Variant
from variants import on_blocks

import keras_spectral as ks


def _formula(variant, adapter, u, s, v, gates):
    change = spectral_matrix(u, s, v, new_s=s * (1 + gates))
    return on_blocks(adapter, change)


VARIANTS = [
    Variant(
        ks.GatedSpectralDense,
        "gated",
        {"directions": 2},
        _formula,
        lambda case, layer: 2,
    ),
]


def _layer(shape=(5, 6), **options):
    base = keras.layers.Dense(shape[1], name="base")
    layer = ks.GatedSpectralDense(base, **options)
    layer.build((None, shape[0]))
    return layer


@pytest.mark.parametrize(
    "options",
    [{"directions": 6}, {"directions": 0}, {"l1": -1}, {"rank": "8"}],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="Expected"):
        _layer(**options)


def test_gates_start_closed_and_the_default_number_is_twice_the_rank():
    layer = _layer((40, 30), rank=4)
    assert layer.directions == 8 and not layer.gates.numpy().any()
    assert _layer().directions == 5  # no more are there


def test_l1_joins_the_loss_once():
    layer = _layer(directions=3, l1=0.5)
    layer.gates.assign([1.0, -2.0, 0.0])
    x = np.ones((2, 5), "float32")
    layer(x), layer(x)
    (loss,) = layer.losses
    assert ops.convert_to_numpy(loss) == 1.5


def test_prune_gates():
    layer = _layer(directions=4)
    layer.gates.assign([0.5, -0.05, 0.0, -0.2])
    assert layer.active_gates(0.1) == 2
    assert layer.prune_gates(0.1) == 2
    np.testing.assert_array_equal(
        layer.gates.numpy(), np.float32([0.5, 0, 0, -0.2])
    )
