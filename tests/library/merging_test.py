import json
import os
import pathlib

import numpy as np
import pytest

from keras_spectral.library.merge_options import check_weights
from keras_spectral.library.merging import DELTA_METHODS
from keras_spectral.library.merging import METHODS
from keras_spectral.library.merging import PAIR_METHODS
from keras_spectral.library.merging import combine_deltas
from keras_spectral.library.merging import combine_pairs
from keras_spectral.library.merging import truncated
from keras_spectral.library.merging import truncated_product

pytestmark = pytest.mark.once

RANDOM = [name for name in METHODS if "dare" in name]
PLAIN = ("cat", "linear", "svd")
GOLDEN_CASES = ["linear", "cat", "svd", "ties_total", "dare_linear"]


class Drawn(np.random.Generator):
    """Gives the masks it holds, one after the other, for numbers drawn."""

    def __init__(self, masks):
        super().__init__(np.random.PCG64())
        self.masks = iter(masks)

    def random(self, size, dtype):
        mask = next(self.masks)
        assert mask.shape == size
        return np.where(mask, 0.0, 1 - 1e-6).astype(dtype)


def _parts(count=3, shape=(5, 4), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype("float32") for _ in range(count)]


def _pairs(ranks=(2, 2, 2), n_in=6, n_out=5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n_in, r)), rng.normal(size=(r, n_out)), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


def _oracle(parts, weights, method, density, sign, masks=None):
    """Entry by entry."""
    kept = []
    for i, part in enumerate(parts):
        part = np.float64(part)
        if density == 1:
            pass  # nor does it draw
        elif "dare" in method:
            part = np.where(masks[i], part / density, 0)
        elif density is not None:
            order = sorted(
                np.ndindex(part.shape), key=lambda at: -abs(part[at])
            )
            for at in order[int(density * part.size) :]:
                part[at] = 0
        kept.append(part)
    result = np.zeros(parts[0].shape)
    for at in np.ndindex(result.shape):
        entries = [part[at] for part in kept]
        chosen = list(zip(weights, entries))
        if "ties" in method:
            votes = entries if sign == "total" else np.sign(entries)
            plus = sum(votes) >= 0
            chosen = [(w, x) for w, x in chosen if x and (x > 0) == plus]
        result[at] = sum(w * x for w, x in chosen)
        if "ties" in method:
            result[at] /= max(len(chosen), 1)
    return result


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_peft(name):
    folder = pathlib.Path(os.environ.get("KERAS_SPECTRAL_GOLDEN", "golden"))
    if not (folder / "merges.npz").exists():
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    golden = np.load(folder / "merges.npz")
    assert {key.split("/")[0] for key in golden if "/" in key} == set(
        GOLDEN_CASES
    )
    cfg = json.loads(str(golden[f"{name}/cfg"]))
    pairs = []
    for adapter in cfg["adapters"]:
        own = {k: golden[f"adapter.{adapter}.{k}"] for k in ("A", "B")}
        scale = golden[f"adapter.{adapter}.alpha"] / len(own["A"])
        pairs.append((own["A"].T, own["B"].T, float(scale)))
    method, rank = cfg["combination_type"], int(golden[f"{name}/rank"])
    options = {
        "density": cfg.get("density"),
        "sign": cfg.get("majority_sign_method", "total"),
    }
    if method in DELTA_METHODS:
        deltas = [s * a @ b for a, b, s in pairs]
        merged = combine_deltas(deltas, cfg["weights"], method, **options)
        a, b = truncated(merged, rank)
    else:
        masks = [key for key in golden if key.startswith(f"{name}/mask")]
        masks = [golden[key].T for key in sorted(masks)]
        rng = Drawn(masks)
        a, b = combine_pairs(pairs, cfg["weights"], method, rng=rng, **options)
        assert next(rng.masks, None) is None
        np.testing.assert_allclose(a, golden[f"{name}/A"].T, atol=1e-5)
        np.testing.assert_allclose(b, golden[f"{name}/B"].T, atol=1e-5)
    assert a.shape == (12, rank) and b.shape == (rank, 16)
    np.testing.assert_allclose(a @ b, golden[f"{name}/delta"].T, atol=1e-5)
    y = golden["x"] @ (golden["W"].T + a @ b) + golden["bias"]
    np.testing.assert_allclose(y, golden[f"{name}/y"], atol=1e-5)


@pytest.mark.parametrize("weights", [[0.7, 0.5, 0.2], [1.0, -0.5, -2.0]])
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.01, 0.35, 0.6, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_formula(method, density, sign, weights):
    density = None if method in PLAIN else density
    masks = [part > 0.2 for part in _parts(6, seed=7)]
    if method in DELTA_METHODS:
        parts = _parts()
        got = combine_deltas(
            parts, weights, method, density, sign, Drawn(masks)
        )
        expected = _oracle(parts, weights, method, density, sign, masks)
        assert got.dtype == "float32"
        np.testing.assert_allclose(got, expected, atol=1e-5)
        return
    pairs = _pairs(n_in=10, n_out=10)
    masks = [m.reshape(10, 2) for m in masks[:3]] + [
        m.reshape(2, 10) for m in masks[3:]
    ]
    a, b = combine_pairs(pairs, weights, method, density, sign, Drawn(masks))
    assert a.dtype == b.dtype == "float32"
    scaled = [w * s for w, (_, _, s) in zip(weights, pairs)]
    if method == "cat":
        delta = sum(w * a @ b for w, (a, b, _) in zip(scaled, pairs))
        assert a.shape == (10, 6)
        np.testing.assert_allclose(a @ b, delta, atol=1e-5)
        return
    roots = np.sqrt(np.abs(scaled))
    rest = method, density, sign
    many_a, many_b = [p[0] for p in pairs], [p[1] for p in pairs]
    expected = _oracle(many_a, np.sign(scaled) * roots, *rest, masks[:3])
    np.testing.assert_allclose(a, expected, atol=1e-5)
    expected = _oracle(many_b, roots, *rest, masks[3:])
    np.testing.assert_allclose(b, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("sign", "expected"),
    [("total", [[9.0, 2.0, 1.0, 0.0]]), ("frequency", [[-1.5, 2.0, 1.0, 0.0]])],
)
def test_election(sign, expected):
    """A large minority, an agreement, a draw, nothing at all."""
    parts = [[[9, 1, 1, 0]], [[-1, 2, -1, 0]], [[-2, 3, 0, 0]]]
    got = combine_deltas(parts, [1, 1, 1], "ties_svd", 1, sign)
    np.testing.assert_array_equal(got, expected)


def test_the_first_of_equal_entries_stay():
    part = np.array([[1.0, -2.0, 2.0], [3.0, 2.0, -2.0]])
    got = combine_deltas([part], [1.0], "magnitude_prune_svd", 0.5)
    np.testing.assert_array_equal(got, [[0, -2, 2], [3, 0, 0]])


@pytest.mark.parametrize("method", RANDOM)
def test_seed_decides_the_draws(method):
    def merged(rng):
        if method in DELTA_METHODS:
            parts = _parts(2, (40, 30))
            return combine_deltas(parts, [1, 1], method, 0.5, rng=rng)
        pairs = _pairs((4, 4), 40, 30)
        return np.concatenate(
            [
                m.ravel()
                for m in combine_pairs(pairs, [1, 1], method, 0.5, rng=rng)
            ]
        )

    first, again, other = merged(3), merged(3), merged(4)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    generator = np.random.default_rng(3)
    np.testing.assert_array_equal(first, merged(generator))
    assert (first != merged(generator)).any()


def test_every_draw_is_its_own_and_keeps_the_mean():
    ones = np.ones((200, 50), "float32")
    parts = [np.stack([ones, 0 * ones]), np.stack([0 * ones, ones])]
    parts = [part.reshape(400, 50) for part in parts]
    got = combine_deltas(parts, [1, 1], "dare_linear_svd", 0.3, rng=0)
    first, second = got.reshape(2, 200, 50)
    assert set(np.unique(got)) == {0, np.float32(1 / 0.3)}
    assert abs(got.mean() - 1) < 0.03
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05


def test_what_was_given_stays_as_it_was():
    parts = _parts()
    before = [part.copy() for part in parts]
    for method in DELTA_METHODS:
        density = None if method in PLAIN else 0.5
        combine_deltas(parts, [1, 1, 1], method, density, rng=0)
    np.testing.assert_array_equal(parts, before)


@pytest.mark.parametrize("rank", [1, 4, 5])
def test_truncated_is_the_nearest(rank):
    pairs = _pairs((1, 3), 7, 5)
    a, b = combine_pairs(pairs, [1.0, -0.7], "cat")
    u, s, vt = np.linalg.svd(np.float64(a) @ b)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    for got in (truncated(a @ b, rank), truncated_product(a, b, rank)):
        assert got[0].shape == (7, rank) and got[1].shape == (rank, 5)
        np.testing.assert_allclose(got[0] @ got[1], expected, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 6, True, 2.0])
def test_truncated_refuses(rank):
    a, b, _ = _pairs((2,))[0]
    with pytest.raises(ValueError, match="Received rank="):
        truncated(a @ b, rank)
    with pytest.raises(ValueError, match="Received rank="):
        truncated_product(a, b, rank)


@pytest.mark.parametrize("method", [m for m in PAIR_METHODS if m != "cat"])
def test_unlike_ranks_need_cat_or_svd(method):
    density = None if method in PLAIN else 0.5
    with pytest.raises(ValueError, match=r"ranks \[2, 3\].*'cat', 'svd'"):
        combine_pairs(_pairs((2, 3)), [1, 1], method, density)


@pytest.mark.parametrize("density", [None, 0, -0.5, 1.5, True, np.nan, "0.5"])
@pytest.mark.parametrize("method", [m for m in METHODS if m not in PLAIN])
def test_density_must_be_a_share(method, density):
    combine = combine_deltas if method in DELTA_METHODS else combine_pairs
    with pytest.raises(ValueError, match="Received density=.*share"):
        combine([], [], method, density)


@pytest.mark.parametrize("method", PLAIN)
def test_density_without_pruning(method):
    combine = combine_deltas if method in DELTA_METHODS else combine_pairs
    with pytest.raises(ValueError, match="prunes nothing. Expected None"):
        combine([], [], method, 0.5)


@pytest.mark.parametrize(
    ("weights", "count", "match"),
    [
        ([], 0, "0 adapters"),
        ([1.0], 2, "1 weights for 2 adapters"),
        (0.5, 1, "a list with a number for each"),
        ([True], 1, "weight=True"),
        ([np.nan], 1, "weight=nan"),
        (["1"], 1, "weight='1'"),
    ],
)
def test_weights_must_fit(weights, count, match):
    with pytest.raises(ValueError, match=match):
        check_weights(weights, count)
    with pytest.raises(ValueError, match=match):
        combine_deltas([np.eye(2)] * count, weights, "svd")
    with pytest.raises(ValueError, match=match):
        combine_pairs(_pairs((2,) * count), weights, "linear")


@pytest.mark.parametrize(
    ("combine", "options", "match"),
    [
        (combine_pairs, {"method": "liner"}, "Did you mean 'linear'"),
        (combine_pairs, {"method": "ties_svd"}, "Did you mean 'ties'"),
        (combine_deltas, {"method": "ties"}, "Did you mean 'ties_svd'"),
        (combine_deltas, {"method": None}, "method=None"),
        (combine_deltas, {"method": "svd", "sign": "totl"}, "mean 'total'"),
    ],
)
def test_unknown_words(combine, options, match):
    with pytest.raises(ValueError, match=match):
        combine([], [], **options)


def test_what_does_not_fit_is_refused():
    (a, b, scale), eye = _pairs((2,))[0], np.eye(3)
    with pytest.raises(ValueError, match="shapes of changes"):
        combine_deltas([eye, np.eye(4)], [1, 1], "svd")
    with pytest.raises(ValueError, match="shapes of changes"):
        combine_pairs([(a, b, 1), (a[1:], b, 1)], [1, 1], "linear")
    with pytest.raises(ValueError, match=r"Expected \(n_in, r\)"):
        combine_pairs([(a, b[1:], 1)], [1], "linear")
    with pytest.raises(ValueError, match="scale=inf"):
        combine_pairs([(a, b, np.inf)], [1], "linear")
    with pytest.raises(ValueError, match="A of shape.*finite"):
        combine_pairs([(a * np.nan, b, scale)], [1], "linear")
    with pytest.raises(ValueError, match="matrix of finite"):
        combine_deltas([eye[0]], [1], "svd")
    with pytest.raises(ValueError, match="rng=-1"):
        combine_deltas([eye], [1], "dare_ties_svd", 0.5, rng=-1)
