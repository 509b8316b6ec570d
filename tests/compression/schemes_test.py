import json

import golden
import keras
import numpy as np
import pytest

from keras_spectral import schemes
from keras_spectral.compression import codebook
from keras_spectral.compression import sparsity
from keras_spectral.compression.schemes import best_rank
from keras_spectral.kernels import kernel_view

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)


def _view(layer=None, shape=(None, 20)):
    layer = layer or keras.layers.Dense(12)
    layer.build(shape)
    return kernel_view(layer)


@pytest.fixture(scope="module")
def lc():
    path = golden.folder() / "lc.npz"
    if not path.exists():
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    return np.load(path)


def test_ranks_equal_the_authors(lc):
    w = lc["dense_a/w"]
    values = np.linalg.svd(w, compute_uv=False)
    cases = json.loads(str(lc["cases"]))
    for case in cases:
        scheme = schemes.LearnedRank(
            case["alpha"], normalize=case["normalize"], least=0
        )
        got = scheme.project(w, case["mu"], _view())
        assert scheme.rank(got) == case["rank"] or case["rank"] == 0
        assert np.any(got) == (case["rank"] > 0)
        cost = case["alpha"] * sum(w.shape)
        assert case["rank"] == best_rank(
            values, cost, case["mu"], case["normalize"], 0
        )
    got = schemes.LearnedRank(0.01, least=0).project(w, 1.0, _view())
    expected = lc["dense_a/projection_alpha0.01_mu1"]
    np.testing.assert_allclose(got, expected, atol=1e-10)


def test_flops_count_positions_and_rank_zero_is_asked_for():
    conv = _view(keras.layers.Conv2D(4, 3, padding="same"), (None, 5, 7, 2))
    matrix = RNG.normal(size=(18, 4))
    s = np.linalg.svd(matrix, compute_uv=False)
    alpha = 1e-3
    got = schemes.LearnedRank(alpha, "flops").project(matrix, 3.0, conv)
    costs = [
        alpha * 35 * 22 * r + 1.5 * (s[r:] ** 2).sum() for r in range(1, 5)
    ]
    assert np.linalg.matrix_rank(got) == 1 + np.argmin(costs)
    expensive = schemes.LearnedRank(1e6)
    assert expensive.rank(expensive.project(matrix, 1.0, conv)) == 1
    nothing = schemes.LearnedRank(1e6, least=0)
    assert not nothing.project(matrix, 1.0, conv).any()


def test_masks():
    kernel = RNG.normal(size=(5, 8))
    mask = sparsity.largest_mask(kernel, 0.35)
    assert mask.sum() == 26
    assert np.abs(kernel[mask]).min() >= np.abs(kernel[~mask]).max()
    assert sparsity.largest_mask(np.ones((4, 5)), 0.5).sum() == 10
    mask = sparsity.n_of_m_mask(kernel.T, 2, 4)
    for column, kept in zip(kernel, mask.T):
        for start in (0, 4):
            four = np.abs(column[start : start + 4])
            expected = np.argsort(four)[-2:]
            found = np.flatnonzero(kept[start : start + 4])
            assert set(found) == set(expected)
    assert sparsity.n_of_m_mask(kernel, 1, 4).sum() == 16  # 4 rows and 1


@pytest.mark.parametrize(
    ("scheme", "cost"),
    [
        (schemes.L0Penalty(0.3), lambda x: 0.3 * (x != 0)),
        (schemes.L1Penalty(0.3), lambda x: 0.3 * np.abs(x)),
    ],
)
def test_penalties_are_the_best_of_a_grid(scheme, cost):
    matrix, mu = RNG.normal(size=(3, 4)), 0.8
    got = scheme.project(matrix, mu, None)
    for w, theta in zip(matrix.ravel(), got.ravel()):
        grid = np.append(np.linspace(-4, 4, 8001), 0.0)

        def total(x, w=w):
            return cost(x) + mu / 2 * (w - x) ** 2

        assert total(theta) <= total(grid).min() + 1e-6


def test_l1_ball_is_the_nearest_point():
    matrix = RNG.normal(size=(4, 6))
    got = sparsity.l1_ball(matrix, 3.0)
    np.testing.assert_allclose(np.abs(got).sum(), 3.0)
    for _ in range(200):
        other = RNG.normal(size=matrix.shape) * (RNG.random(matrix.shape) < 0.3)
        other *= 3.0 / np.abs(other).sum()
        assert np.linalg.norm(matrix - got) < np.linalg.norm(matrix - other)
    np.testing.assert_array_equal(sparsity.l1_ball(matrix, 1e3), matrix)


def test_k_means_is_lloyd():
    kernel = RNG.normal(size=(30, 20))
    start = np.linspace(-2, 2, 8)
    values = start.copy()
    for _ in range(100):  # by distances, not by borders
        codes = np.abs(kernel.ravel()[:, None] - values).argmin(axis=1)
        for i in range(8):
            if (codes == i).any():
                values[i] = kernel.ravel()[codes == i].mean()
    got = codebook.k_means(kernel, 8, start)
    np.testing.assert_allclose(got, values)
    quantised = schemes.KMeans(3).project(kernel, 1.0, None)
    assert len(np.unique(quantised)) == 8
    three = np.array([[1.0, 1.0, 2.0, 5.0]])
    np.testing.assert_array_equal(
        schemes.KMeans(2).project(three, 1.0, None), three
    )


def test_linear_steps_of_each_column():
    matrix = RNG.normal(size=(9, 4)) * [1, 10, 0.1, 0]
    got = schemes.Linear(3).project(matrix, 1.0, None)
    step = np.abs(matrix).max(axis=0) / 3
    assert (np.abs(got - matrix) <= step / 2 + 1e-12).all()
    for column, s in zip(got.T[:3], step):
        whole = column / s
        np.testing.assert_allclose(whole, np.round(whole), atol=1e-9)
        assert np.abs(whole).max() == pytest.approx(3)
    assert not got[:, 3].any()


def test_a_sum_is_nearer_than_its_parts():
    low = RNG.normal(size=(20, 2)) @ RNG.normal(size=(2, 12))
    matrix = low.copy()
    matrix.flat[RNG.permutation(240)[:12]] += 20
    parts = schemes.FixedRank(2), schemes.Magnitude(0.95)
    both = schemes.Sum(*parts).project(matrix, 1.0, None)
    alone = [part.project(matrix, 1.0, None) for part in parts]
    error, *others = (np.linalg.norm(matrix - x) for x in (both, *alone))
    assert error < 0.8 * min(others)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: schemes.LearnedRank(-1), "alpha=-1"),
        (lambda: schemes.LearnedRank(1, "size"), "cost='size'"),
        (lambda: schemes.FixedRank(0), "rank=0"),
        (lambda: schemes.Magnitude(1.0), "share=1.0"),
        (lambda: schemes.KMeans(9), "bits=9"),
        (lambda: schemes.Linear(1), "bits=1"),
        (lambda: schemes.L1Constraint(0), "radius=0"),
        (lambda: schemes.Sum(schemes.KMeans(2), 3), "second=3"),
    ],
)
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=match):
        make()
