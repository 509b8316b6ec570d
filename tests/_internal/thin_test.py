"""Products with thin matrices are what `ops.matmul` gives, and so derive."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_spectral._backend import gradient_function
from keras_spectral._backend import thin_factor
from keras_spectral._backend import thin_product


@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("shape", [(9, 2), (2, 9), (4, 4), (150, 140)])
def test_a_thin_product_and_its_gradients(rows, shape):
    rng = np.random.default_rng(0)
    x = keras.Variable(rng.normal(size=(*rows, shape[0])), dtype="float32")
    matrix = keras.Variable(rng.normal(size=shape), dtype="float32")
    weights = ops.cast(rng.normal(size=(*rows, shape[1])), "float32")

    def value(product):
        y = product(ops.convert_to_tensor(x), ops.convert_to_tensor(matrix))
        assert tuple(y.shape) == (*rows, shape[1])
        return ops.sum(y * weights)

    for found, wanted in zip(
        gradient_function(lambda: value(thin_product), [x, matrix])(),
        gradient_function(lambda: value(ops.matmul), [x, matrix])(),
    ):
        found, wanted = map(ops.convert_to_numpy, (found, wanted))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(
        ops.convert_to_numpy(value(thin_product)),
        ops.convert_to_numpy(value(ops.matmul)),
        rtol=1e-5,
    )


def test_a_thin_product_of_arrays_and_of_two_dtypes():
    x, matrix = np.ones((2, 3, 4), "float32"), np.ones((4, 2), "float32")
    found = thin_product(ops.convert_to_tensor(x), matrix)
    np.testing.assert_array_equal(ops.convert_to_numpy(found), x @ matrix)
    half = ops.cast(x, "bfloat16")
    found = thin_product(half, ops.convert_to_tensor(matrix))
    assert keras.backend.standardize_dtype(found.dtype) == "float32"


def test_a_thin_factor_is_itself():
    a = np.arange(24.0).reshape(2, 3, 4)
    found = thin_factor(ops.convert_to_tensor(a, "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(found), a)
