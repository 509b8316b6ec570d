import dataclasses
import itertools

import numpy as np
import pytest

from keras_spectral.compression.ranks import allocate
from keras_spectral.compression.ranks import total_cost
from keras_spectral.compression.ranks import worst_error
from keras_spectral.compression.rules import RULES
from keras_spectral.compression.spectrum import LEAVE
from keras_spectral.compression.spectrum import Choice
from keras_spectral.compression.spectrum import Spectrum

pytestmark = pytest.mark.once


def _spectrum(seed, n_in=24, n_out=16, slicings=(1, 2, 4)):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(n_in, n_out)) * 0.8 ** np.arange(n_out)
    values = {
        n: np.linalg.svd(matrix.reshape(n, -1, n_out), compute_uv=False)
        for n in slicings
    }
    per_rank = {n: n_in + n * n_out for n in slicings}
    return Spectrum(values, n_in * n_out, per_rank, price=0.1 * (seed + 1))


def _all_choices(spectrum):
    yield LEAVE
    for n, values in spectrum.values.items():
        for rank in range(1, values.shape[1] + 1):
            if spectrum.choice(rank, n) is not LEAVE:
                yield Choice(rank, n)


def test_error_and_size_are_their_formulas():
    spectrum = _spectrum(0)
    for n, rank in itertools.product((1, 2, 4), (1, 3, 4)):
        s = spectrum.values[n]
        beyond = s[:, rank].max() if rank < s.shape[1] else 0.0
        wanted = np.sqrt(n) * beyond / spectrum.values[1][0, 0]
        choice = Choice(rank, n)
        np.testing.assert_allclose(spectrum.error(choice), wanted)
        np.testing.assert_allclose(spectrum.bound(choice), wanted)
        rootless = dataclasses.replace(spectrum, true_bound=False)
        plain = wanted / np.sqrt(n)
        np.testing.assert_allclose(rootless.error(choice), plain)
        np.testing.assert_allclose(rootless.bound(choice), wanted)
        assert spectrum.size(choice) == rank * (24 + n * 16)
    assert spectrum.error(LEAVE) == 0 and spectrum.size(LEAVE) == 24 * 16


def test_the_error_of_slices_bounds_the_spectral_norm():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(24, 16))
    spectrum = _spectrum(0)
    parts = matrix.reshape(4, 6, 16)
    u, s, v = np.linalg.svd(parts, full_matrices=False)
    values = {1: np.linalg.svd(matrix, compute_uv=False)[None], 4: s}
    spectrum = Spectrum(values, 384, {1: 40, 4: 88})
    for rank in (1, 2, 4):
        left = parts - (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        size = np.linalg.norm(left.reshape(24, 16), 2) / values[1].max()
        assert size <= spectrum.error(Choice(rank, 4)) + 1e-9


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_the_relative_error_is_exact(slices):
    matrix = np.random.default_rng(0).normal(size=(24, 16))
    parts = matrix.reshape(slices, -1, 16)
    u, s, v = np.linalg.svd(parts, full_matrices=False)
    spectrum = Spectrum({slices: s}, 384, {slices: 24 + 16 * slices})
    for rank in (1, 2, 4):
        left = parts - (u[..., :rank] * s[:, None, :rank]) @ v[:, :rank]
        wanted = np.linalg.norm(left) / np.linalg.norm(matrix)
        got = spectrum.relative_error(Choice(rank, slices))
        np.testing.assert_allclose(got, wanted)
    assert spectrum.relative_error(LEAVE) == 0


def test_a_layer_that_would_grow_is_left():
    spectrum = _spectrum(0)
    assert spectrum.choice(9, 1) == Choice(9, 1)  # 360 of 384
    assert spectrum.choice(10, 1) is LEAVE
    assert spectrum.choice(0.4, 1) == Choice(1, 1)


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_budgets_are_met_and_used(method, share):
    spectra = [_spectrum(i) for i in range(5)]
    budget = int(share * 5 * 384)
    choices = allocate(spectra, method, budget)
    size = total_cost(spectra, choices)
    # ALDS moves in steps of whole slicings.
    assert budget - 5 * 120 < size <= budget


@pytest.mark.parametrize("method", RULES)
def test_max_error_is_kept(method):
    spectra = [_spectrum(i) for i in range(4)]
    loose, tight = (
        allocate(spectra, method, max_error=error) for error in (0.5, 0.2)
    )
    assert worst_error(spectra, loose) <= 0.5
    assert worst_error(spectra, tight) <= 0.2
    assert total_cost(spectra, loose) < total_cost(spectra, tight)


@pytest.mark.parametrize("method", RULES)
def test_what_no_pair_is_near_enough_to_stays_whole(method):
    """Flat spectra: pairs that save anything drop a value of full size."""
    values = {1: np.ones((1, 16))}
    spectra = [Spectrum(values, 384, {1: 40}, price=0.1)] * 3
    choices = allocate(spectra, method, max_error=0.5)
    assert choices == [LEAVE] * 3


def test_alds_finds_the_smallest_largest_error():
    """Every combination of two layers, tried one by one."""
    spectra = [_spectrum(i, 12, 12, (1, 2, 3)) for i in (1, 2)]
    for budget in (90, 140, 200):
        best = min(
            worst_error(spectra, pair)
            for pair in itertools.product(*map(_all_choices, spectra))
            if total_cost(spectra, pair) <= budget
        )
        found = allocate(spectra, "alds", budget)
        assert total_cost(spectra, found) <= budget
        assert worst_error(spectra, found) == pytest.approx(best)


def test_rules_on_a_spectrum_made_by_hand():
    values = {1: np.array([[4.0, 2.0, 1.0, 1.0]])}
    spectrum = Spectrum(values, 1000, {1: 10})
    rank = {
        (name, level): RULES[name](spectrum, level).rank
        for name in ("energy", "global", "uniform", "alds")
        for level in (0.0, 0.03, 0.5, 0.76, 1.0)
    }
    # Squares 16, 4, 1, 1 of 22: shares 0.73, 0.91, 0.95, 1.
    assert [rank["energy", x] for x in (0.0, 0.5, 0.76, 1.0)] == [1, 1, 2, 4]
    # Relative sizes 1, 0.5, 0.25, 0.25; what is kept is above 1 - level.
    assert [rank["global", x] for x in (0.0, 0.5, 0.76, 1.0)] == [1, 1, 4, 4]
    # Errors of ranks 1 to 4: 0.5, 0.25, 0.25, 0, at most 1 - level.
    assert [rank["alds", x] for x in (0.0, 0.5, 0.76, 1.0)] == [1, 1, 4, 4]
    assert [rank["uniform", x] for x in (0.0, 0.03, 0.5)] == [1, 3, 4]


@pytest.mark.parametrize("method", RULES)
def test_what_is_saved_may_be_anything(method):
    """Time that jumps between ranks, and rises by more for slices."""
    spectra = []
    for seed in range(4):
        plain = _spectrum(seed)
        costs = {
            n: n * np.ceil(np.arange(1, values.shape[1] + 1) / 4)
            for n, values in plain.values.items()
        }
        spectra.append(dataclasses.replace(plain, costs=costs, whole=3.5))
    choices = allocate(spectra, method, 9.0, unit="ms")
    assert total_cost(spectra, choices) <= 9
    assert total_cost(spectra, [LEAVE] * 4) == 14
    for spectrum, choice in zip(spectra, choices):
        assert choice is LEAVE or spectrum.cost(choice) < 3.5
    with pytest.raises(ValueError, match="4 ms are left, and 3.5 were"):
        allocate(spectra, method, 3.5, unit="ms")


def test_slices_beyond_their_limit_are_left_out():
    spectra = [
        dataclasses.replace(_spectrum(i), limits={1: None, 2: 2, 4: 1})
        for i in range(4)
    ]
    for budget in (300, 600, 900, 1200):
        for choice in allocate(spectra, "alds", budget):
            if choice is not LEAVE and choice.slices > 1:
                assert choice.rank <= {2: 2, 4: 1}[choice.slices]


def test_a_layer_that_stands_still_leaves_the_budget_to_others():
    """Its next step would be to stay whole, which costs too much."""
    large, small = _spectrum(0, 96, 96, (1,)), _spectrum(1, slicings=(1,))
    large = dataclasses.replace(large, limits={1: 2})
    spectra, fast = [large, small, small], 2 * large.per_rank[1]
    for budget in (fast + 600, fast + 740):
        found = allocate(spectra, "alds", budget)
        assert found[0] == Choice(2)
        assert 0 <= budget - total_cost(spectra, found) < 2 * 40
    # Of two whole layers there is room for one.
    found = allocate([large, large, small], "alds", 96 * 96 + fast + 300)
    assert found[:2] == [LEAVE, Choice(2)] and found[2].rank == 7


def test_what_dropped_squares_cost():
    values = {
        1: np.array([[4.0, 2.0, 1.0, 1.0]]),
        2: np.array([[3.0, 1], [2, 2]]),
    }
    spectrum = Spectrum(values, 1000, {1: 10}, price=0.5)
    np.testing.assert_allclose(spectrum.loss(), [3, 1, 0.5, 0])
    np.testing.assert_allclose(spectrum.loss(2), [2.5, 0])
    limited = dataclasses.replace(spectrum, limits={1: 3, 2: 0})
    np.testing.assert_allclose(limited.loss(), [3, 1, 0.5])
    assert not len(limited.loss(2))


def _loss(spectra, choices):
    rows = zip(spectra, choices)
    return sum(s.loss(c.slices)[c.rank - 1] for s, c in rows if c.rank)


@pytest.mark.parametrize("slicings", [(1,), (1, 2, 3)])
def test_weights_go_where_they_lower_the_loss_most(slicings):
    """Near the least sum of losses within the budget, of all choices."""
    spectra = [_spectrum(i, 12, 12, slicings) for i in (0, 3)]
    prices = (0.2, 0.001)
    spectra = [dataclasses.replace(s, price=p) for s, p in zip(spectra, prices)]
    pairs = list(itertools.product(*map(_all_choices, spectra)))
    for budget in (120, 150, 200, 250):
        found = allocate(spectra, "sensitivity", budget)
        assert total_cost(spectra, found) <= budget
        best = min(
            _loss(spectra, p) for p in pairs if total_cost(spectra, p) <= budget
        )
        assert _loss(spectra, found) <= 1.25 * best + 1e-9
        assert spectra[0].size(found[0]) > spectra[1].size(found[1])


def test_sensitivity_leaves_whole_what_no_pair_makes_faster():
    spectra = [
        dataclasses.replace(_spectrum(i, slicings=(1, 2)), limits=limits)
        for i, limits in enumerate(({1: 0, 2: 0}, {1: 0, 2: 3}, {1: 5, 2: 0}))
    ]
    found = allocate(spectra, "sensitivity", 2 * 384)
    assert found[0] is LEAVE
    assert found[1] is LEAVE or found[1].slices == 2 and found[1].rank <= 3
    assert found[2] is LEAVE or found[2].slices == 1 and found[2].rank <= 5
    assert LEAVE not in allocate(spectra, "sensitivity", 384)


def test_an_unreachable_budget():
    with pytest.raises(ValueError, match="80 weights are left, and 79"):
        allocate([_spectrum(0), _spectrum(1)], "energy", 79)
