import block_cases
import keras
import numpy as np
import pytest
from block_cases import WIDTH
from keras import ops
from variants import BlockVariant

import keras_spectral as ks

VARIANTS = [BlockVariant(ks.RED, "red", {}, 2 * WIDTH)]


def test_equals_its_formula():
    model = block_cases.model()
    ks.wrap_model(model, "red")
    *_, block = (x for x in model.layers if isinstance(x, ks.RED))
    rng = np.random.default_rng(0)
    gains, shifts = rng.normal(size=(2, WIDTH)).astype("float32")
    block.gains.assign(gains)
    block.shifts.assign(shifts)
    x = rng.normal(size=(2, 5, WIDTH)).astype("float32")
    expected = ops.convert_to_numpy(block.layer(x)) * gains + shifts
    got = ops.convert_to_numpy(block(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_layer_is_no_block():
    with pytest.raises(ValueError, match="Dense"):
        ks.RED(keras.layers.Dense(3))
