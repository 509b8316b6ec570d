"""How many singular values each layer keeps, for a budget or an error."""

from collections.abc import Sequence

import numpy as np

from keras_spectral.compression.rules import RULES
from keras_spectral.compression.rules import fitting
from keras_spectral.compression.spectrum import LEAVE
from keras_spectral.compression.spectrum import Choice
from keras_spectral.compression.spectrum import Spectrum

_HALVINGS = 60
_SEEDS = 15
_ROUNDS = 50


def allocate(
    spectra: Sequence[Spectrum],
    method: str,
    budget: float | None = None,
    max_error: float | None = None,
    unit: str = "weights",
) -> list[Choice]:
    """Chooses a rank and a number of slices for every layer.

    Every rule has one level for all layers, from 0 (rank 1) to 1 (all). The
    level is found by bisection. For a budget layers stay whole that have
    limits of 0, unless it cannot be met without them.

    Args:
        spectra: The layers.
        method: One of `RULES`.
        budget: At most so much cost in all of them, or
        max_error: at most this error bound in each layer.
        unit: What costs are counted in, for messages.

    Raises:
        ValueError: Rank 1 everywhere is still beyond the budget.
    """
    rule = RULES[method]

    def plan(level):
        return [rule(spectrum, level) for spectrum in spectra]

    if max_error is not None:
        spectra = [spectrum.with_slow_pairs() for spectrum in spectra]

        def is_low(level):
            return worst_error(spectra, plan(level)) > max_error

        return plan(_bisect(is_low)[1])
    smallest = plan(0.0)
    if total_cost(spectra, smallest) > budget:
        spectra = [spectrum.with_slow_pairs() for spectrum in spectra]
        smallest = plan(0.0)
    if total_cost(spectra, smallest) > budget:
        left = total_cost(spectra, smallest)
        raise ValueError(
            f"At rank 1 everywhere {number(left)} {unit} are left, and "
            f"{number(budget)} were asked for. Expected a larger budget, or "
            "more layers to compress."
        )
    if method == "alds":
        plan = _alternate(spectra, budget)
    elif method != "sensitivity":
        return _within(spectra, plan, budget)
    return _filled(spectra, plan, budget)


def total_cost(spectra: Sequence[Spectrum], choices: Sequence[Choice]) -> float:
    """What all layers cost."""
    return sum(s.cost(choice) for s, choice in zip(spectra, choices))


def number(cost: float) -> str:
    """Whole where it is large, else three digits."""
    return f"{cost:,.0f}" if abs(cost) >= 100 else f"{cost:.3g}"


def worst_error(
    spectra: Sequence[Spectrum], choices: Sequence[Choice]
) -> float:
    """The largest error bound."""
    return max(s.error(choice) for s, choice in zip(spectra, choices))


def _bisect(is_low):
    """The last level that is low and the first that is not, or 0 and 1."""
    low, high = 0.0, 1.0
    if not is_low(low):
        return low, low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_low(middle) else (low, middle)
    return low, high


def _within(spectra, plan, budget):
    """The plan of the highest level that meets the budget."""
    level, _ = _bisect(lambda x: total_cost(spectra, plan(x)) <= budget)
    return plan(level)


def _filled(spectra, plan, budget):
    """The same, and what is left of the budget for other layers.

    A layer whose next step is to stay whole, which costs too much, gets the
    rank that there is room for, and the level of the others rises.
    """
    settled = {}

    def going_on(level):
        return [settled.get(i, c) for i, c in enumerate(plan(level))]

    def is_low(level):
        return total_cost(spectra, going_on(level)) <= budget

    while True:
        low, high = _bisect(is_low)
        now, then = going_on(low), going_on(high)
        stuck = [
            i for i, c in enumerate(then) if c is LEAVE and now[i] is not LEAVE
        ]
        if not stuck:
            return now
        for i in stuck:
            others = total_cost(spectra, now) - spectra[i].cost(now[i])
            room, slices = budget - others, now[i].slices
            if spectra[i].cost(LEAVE) <= room:
                now[i] = LEAVE
            else:
                now[i] = Choice(spectra[i].within(room, slices), slices)
            settled[i] = now[i]


def _alternate(spectra, budget):
    """ALDS: slicings from several starts, each improved until it stands.

    In turn: with all slicings fixed, the smallest common error that meets
    the budget; then for each layer the slicing with the smallest error at
    the size that it got. Returns the best slicings' plan of a level.
    """
    rng = np.random.default_rng(0)
    tables = [_tables(spectrum) for spectrum in spectra]
    starts = [[1] * len(spectra)] + [
        [int(rng.choice(list(s.values))) for s in spectra]
        for _ in range(_SEEDS)
    ]
    plans = []
    for slicing in starts:
        for _ in range(_ROUNDS):

            def plan(level, slicing=slicing):
                rows = zip(spectra, tables, slicing)
                return [_sliced(s, t, k, level) for s, t, k in rows]

            if total_cost(spectra, plan(0.0)) > budget:
                break
            choices = _within(spectra, plan, budget)
            plans.append((choices, plan))
            better = [
                _best_slicing(s, t, c, k)
                for s, t, c, k in zip(spectra, tables, choices, slicing)
            ]
            if better == slicing:
                break
            slicing = better

    def merit(found):
        choices = found[0]
        return worst_error(spectra, choices), -total_cost(spectra, choices)

    return min(plans, key=merit)[1]


def _tables(spectrum):
    return {count: spectrum.errors(count) for count in spectrum.values}


def _sliced(spectrum, tables, slices, level):
    """The smallest rank of a slicing, or where that is too slow of none."""
    found = fitting(spectrum, tables[slices], slices, level)
    if found is LEAVE and slices > 1:
        return fitting(spectrum, tables[1], 1, level)
    return found


def _best_slicing(spectrum, tables, choice, slices):
    if choice.rank is None:
        return slices
    cost, best = spectrum.cost(choice), (spectrum.error(choice), slices)
    for count, errors in tables.items():
        rank = spectrum.within(cost, count)
        if rank:
            best = min(best, (float(errors[rank - 1]), count))
    return best[1]
