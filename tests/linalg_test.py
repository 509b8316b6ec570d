import numpy as np
import pytest
from keras import ops

from keras_spectral._backend import solve_positive
from keras_spectral._internal.linalg import cayley
from keras_spectral._internal.linalg import leading_pair
from keras_spectral._internal.linalg import nearest_pair
from keras_spectral._internal.linalg import pair_along
from keras_spectral._internal.linalg import randomized_svd
from keras_spectral._internal.linalg import right_vectors
from keras_spectral._internal.linalg import singular_values
from keras_spectral._internal.linalg import truncated_svd


def _matrix(values, n_in=60, n_out=90, seed=0):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.normal(size=(n_in, len(values))))
    v, _ = np.linalg.qr(rng.normal(size=(n_out, len(values))))
    return ((u * values) @ v.T).astype("float32"), u, v


def _largest_sine(u, true):
    u = np.float64(ops.convert_to_numpy(u))
    rest = u - true @ (true.T @ u)
    return np.linalg.norm(rest, 2)


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(300, 500), (500, 300)])
def test_randomized_finds_the_leading_subspace(decay, shape):
    values = np.arange(1, 301) ** -decay
    matrix, u, v = _matrix(values, *shape)
    got_u, got_s, got_v, error = randomized_svd(matrix, 8)
    assert got_u.shape == (shape[0], 8) and got_v.shape == (shape[1], 8)
    np.testing.assert_allclose(
        ops.convert_to_numpy(got_s), values[:8], rtol=1e-4
    )
    sine = _largest_sine(got_u, u[:, :8])
    assert sine < 1e-3
    assert sine / 3 <= float(error) < 1e-2 or sine < 1e-5


def test_randomized_agrees_with_exact_and_is_repeatable():
    matrix, _, _ = _matrix(0.7 ** np.arange(60))
    exact = truncated_svd(matrix, 5)
    found = randomized_svd(matrix, 5)
    again = randomized_svd(matrix, 5)
    for a, b, c in zip(exact, found, again):
        np.testing.assert_allclose(
            ops.convert_to_numpy(a), ops.convert_to_numpy(b), atol=2e-4
        )
        np.testing.assert_array_equal(
            ops.convert_to_numpy(b), ops.convert_to_numpy(c)
        )


def test_error_is_honest_where_the_spectrum_is_flat():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(300, 300)).astype("float32")
    u, s, v, error = randomized_svd(matrix, 8, num_blocks=2)
    assert float(error) > 0.1
    # Whatever the error, these are right singular vectors of their own u.
    product = ops.convert_to_numpy(ops.matmul(matrix.T, u))
    np.testing.assert_allclose(
        product, ops.convert_to_numpy(v * s), atol=1e-3 * float(s[0])
    )


@pytest.mark.once
def test_batches_equal_single_matrices_and_signs_are_fixed():
    stack = np.stack([_matrix(0.6 ** np.arange(60), seed=i)[0] for i in (1, 2)])
    for function in (truncated_svd, randomized_svd):
        together = function(stack, 4)
        for i in range(2):
            for part, single in zip(together, function(stack[i], 4)):
                np.testing.assert_allclose(
                    ops.convert_to_numpy(part[i]),
                    ops.convert_to_numpy(single),
                    atol=1e-4,
                )
        u = ops.convert_to_numpy(together[0])
        largest = np.abs(u).argmax(axis=-2)
        assert (np.take_along_axis(u, largest[:, None], axis=-2) > 0).all()


@pytest.mark.parametrize("function", [truncated_svd, randomized_svd])
def test_half_precision_is_factorised_in_float32(function):
    matrix, _, _ = _matrix(0.6 ** np.arange(60))
    u, s, v, *_ = function(ops.cast(matrix, "bfloat16"), 3)
    assert u.dtype == s.dtype == v.dtype or str(u.dtype).endswith("float32")
    np.testing.assert_allclose(
        ops.convert_to_numpy(s), 0.6 ** np.arange(3), rtol=0.02
    )


_DEGENERATE = {
    "zero": np.zeros(200),
    "low rank": np.array([2.0, 1.0] + [0.0] * 198),
    "nearly low rank": np.array([1.0] * 4 + [1e-9] * 196),
    "identity": np.ones(200),
    "steep": 10.0 ** -np.minimum(np.arange(200), 30),
}


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", _DEGENERATE)
def test_directions_are_orthonormal_where_the_matrix_is_degenerate(
    name, rotated
):
    values = _DEGENERATE[name]
    matrix = _matrix(values, 200, 230)[0] if rotated else np.diag(values)
    u, s, v, _ = randomized_svd(matrix.astype("float32"), 8)
    u = ops.convert_to_numpy(u)
    np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-4)
    np.testing.assert_allclose(
        ops.convert_to_numpy(s), values[:8], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("size", [1, 4, 9])
def test_cayley_is_a_rotation_even_of_large_angles(size):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 50, (size, size)).astype("float32")
    q = np.float64(ops.convert_to_numpy(cayley(x)))
    np.testing.assert_allclose(q @ q.T, np.eye(size), atol=1e-4)
    z = np.float64(x - x.T) / 2
    expected = (np.eye(size) - z) @ np.linalg.inv(np.eye(size) + z)
    np.testing.assert_allclose(q, expected, atol=1e-4)


def test_cayley_of_zero_is_exactly_one():
    np.testing.assert_array_equal(
        ops.convert_to_numpy(cayley(np.zeros((3, 3), "float32"))), np.eye(3)
    )


@pytest.mark.parametrize("size", [1, 2, 5, 32])
def test_many_systems_in_one_step(size):
    rng = np.random.default_rng(0)
    skew = rng.normal(size=(3, 7, size, size)).astype("float32")
    matrix = np.eye(size) + 2 * (skew - np.swapaxes(skew, -1, -2))
    right = rng.normal(size=(3, 7, size, 4)).astype("float32")
    got = solve_positive(
        ops.convert_to_tensor(matrix, "float32"), ops.convert_to_tensor(right)
    )
    wanted = np.linalg.solve(matrix, right)
    np.testing.assert_allclose(
        ops.convert_to_numpy(got), wanted, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 5, 7)])
def test_values_and_right_vectors_in_numpy(shape):
    matrix = np.random.default_rng(3).normal(size=shape).astype("float32")
    _, s, vt = np.linalg.svd(np.float64(matrix), full_matrices=False)
    np.testing.assert_allclose(singular_values(matrix), s, rtol=1e-6)
    rank = min(shape[-2:])
    v = right_vectors(matrix, rank)
    shared = np.abs(np.swapaxes(v, -1, -2) @ np.swapaxes(vt, -1, -2))
    np.testing.assert_allclose(
        shared,
        np.broadcast_to(np.eye(shared.shape[-1]), shared.shape),
        atol=1e-6,
    )
    a, b = pair_along(matrix, v)
    np.testing.assert_allclose(a @ b, matrix, atol=1e-5)
    lengths = np.linalg.norm(a, axis=-2), np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(*lengths, rtol=1e-5)
    for pair in (leading_pair(matrix, 3), (a[..., :3], b[..., :3, :])):
        wanted = [ops.convert_to_numpy(x) for x in nearest_pair(matrix, 3)]
        np.testing.assert_allclose(
            np.matmul(*pair), np.matmul(*wanted), atol=1e-5
        )
        lengths = (
            np.linalg.norm(pair[0], axis=-2),
            np.linalg.norm(pair[1], axis=-1),
        )
        np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_right_vectors_of_a_low_rank(shape):
    """What is only rounding adds nothing, however a pair is cut."""
    rng = np.random.default_rng(4)
    factors = (
        rng.integers(-3, 4, (shape[0], 3)),
        rng.integers(-3, 4, (3, shape[1])),
    )
    matrix = np.matmul(*factors).astype("float32")  # exact: of rank 3
    zeros = np.zeros(shape, "float32")
    for rank in (3, 10, 40):
        v = right_vectors(matrix, rank).astype("float32")
        for a, b in (pair_along(matrix, v), leading_pair(matrix, rank)):
            np.testing.assert_allclose(a @ b, matrix, atol=1e-3)
        v = right_vectors(zeros, rank)
        for a, b in (pair_along(zeros, v), leading_pair(zeros, rank)):
            assert np.isfinite(a).all() and np.isfinite(b).all()
