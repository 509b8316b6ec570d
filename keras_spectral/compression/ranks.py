"""How many singular values each layer keeps: pure functions on spectra."""

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np

_HALVINGS = 60
_SEEDS = 15
_ROUNDS = 50
_DIGITS = 30


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """One layer's singular values and sizes, for rank allocation.

    Attributes:
        values: For each number of slices the singular values of the parts
            that are factored apart (parts, m), descending.
        weights: Numbers in the kernel.
        per_rank: For each number of slices what one rank costs in weights.
        true_bound: Whether choices are judged by `bound`, or by it without
            its root.
        price: What a dropped sum of squares of 1 costs the model.
        costs: What is to be saved: for each number of slices what a pair of
            the ranks 1, 2, .. has of it, ascending; weights if None.
        whole: What the layer itself has of it.
        limits: The largest ranks that are fast enough, for each number of
            slices; 0 where none is, None where it does not matter.
    """

    values: dict[int, np.ndarray]
    weights: int
    per_rank: dict[int, int]
    true_bound: bool = True
    price: float | None = None
    costs: dict[int, np.ndarray] | None = None
    whole: float | None = None
    limits: dict[int, int | None] | None = None

    @property
    def norm(self) -> float:
        """The kernel's largest singular value."""
        return float(self.values[1].max())

    def with_slow_pairs(self) -> "Spectrum":
        """Without a limit where it is 0."""
        limits = {n: limit or None for n, limit in (self.limits or {}).items()}
        return dataclasses.replace(self, limits=limits)

    def bound(self, choice: "Choice") -> float:
        """Bound of the spectral norm of what is dropped, over the kernel's.

        `sqrt(slices) * max over parts of sigma_(rank + 1) / sigma_1(K)`.
        """
        if choice.rank is None:
            return 0.0
        error = self._beyond(choice.slices)[choice.rank - 1]
        return math.sqrt(choice.slices) * float(error)

    def relative_error(self, choice: "Choice") -> float:
        """The dropped part over the kernel, in Frobenius norms, exactly."""
        if choice.rank is None:
            return 0.0
        squares = self.values[choice.slices].astype("float64") ** 2
        total = max(float(squares.sum()), 1e-60)
        return math.sqrt(float(squares[:, choice.rank :].sum()) / total)

    def error(self, choice: "Choice") -> float:
        """The error a choice is judged by: the bound, or without its root."""
        if choice.rank is None:
            return 0.0
        return float(self._errors(choice.slices)[choice.rank - 1])

    def errors(self, slices: int) -> np.ndarray:
        """`error` of the ranks 1 to m, or to the limit."""
        return self._errors(slices)[: self._limit(slices)]

    def _limit(self, slices):
        return (self.limits or {}).get(slices)

    def _errors(self, slices):
        factor = math.sqrt(slices) if self.true_bound else 1.0
        return factor * self._beyond(slices)

    def _beyond(self, slices):
        values = self.values[slices]
        beyond = np.append(values[:, 1:].max(axis=0), 0.0)
        return beyond / max(self.norm, 1e-30)

    def loss(self, slices: int = 1) -> np.ndarray:
        """What the ranks 1 to m cost the model, or to the limit."""
        squares = (self.values[slices].astype("float64") ** 2).sum(axis=0)
        dropped = np.append(np.cumsum(squares[::-1])[::-1][1:], 0.0)
        return self.price * dropped[: self._limit(slices)]

    def size(self, choice: "Choice") -> int:
        """Numbers that are left of the kernel."""
        if choice.rank is None:
            return self.weights
        return choice.rank * self.per_rank[choice.slices]

    def cost(self, choice: "Choice") -> float:
        """How much is left of what is to be saved."""
        if choice.rank is None:
            return self.weights if self.costs is None else self.whole
        return float(self.cost_table(choice.slices)[choice.rank - 1])

    def cost_table(self, slices: int = 1) -> np.ndarray:
        """`cost` of the ranks 1 to m."""
        if self.costs is not None:
            return self.costs[slices]
        count = self.values[slices].shape[-1]
        return self.per_rank[slices] * np.arange(1, count + 1)

    def within(self, cost: float, slices: int = 1) -> int:
        """The largest fast rank that costs no more, 0 if there is none."""
        costs = self.cost_table(slices)[: self._limit(slices)]
        return int(np.searchsorted(costs, cost, "right"))

    def choice(self, rank: int, slices: int = 1) -> "Choice":
        """This rank, at least 1, or none where nothing would be saved."""
        table = self.cost_table(slices)
        found = Choice(min(max(1, int(rank)), len(table)), slices)
        return found if self.cost(found) < self.cost(LEAVE) else LEAVE


@dataclasses.dataclass(frozen=True)
class Choice:
    """The rank that one layer gets; without one it stays as it is."""

    rank: int | None
    slices: int = 1


LEAVE = Choice(None)
Rule = Callable[[Spectrum, float], Choice]


def uniform(spectrum: Spectrum, level: float) -> Choice:
    """Keeps an equal share of each kernel's cost."""
    if level >= 1:  # the largest pair may still be too far off
        return LEAVE
    return spectrum.choice(spectrum.within(level * spectrum.cost(LEAVE)))


def energy(spectrum: Spectrum, level: float) -> Choice:
    """Keeps an equal share of the sum of squared singular values."""
    squares = (spectrum.values[1].astype("float64") ** 2).sum(axis=0)
    total = np.cumsum(squares)
    wanted = level * total[-1]
    return spectrum.choice(1 + np.searchsorted(total, wanted * (1 - 1e-12)))


def largest(spectrum: Spectrum, level: float) -> Choice:
    """All singular values above `1 - level` of the layer's largest."""
    kept = spectrum.values[1] > (1 - level) * spectrum.norm
    return spectrum.choice(kept.sum(axis=1).max())


def alds(spectrum: Spectrum, level: float) -> Choice:
    """The cheapest slicing and rank whose error is at most `1 - level`."""
    found = [
        _fitting(spectrum, spectrum.errors(count), count, level)
        for count in spectrum.values
    ]
    return min(found, key=spectrum.cost)


def sensitivity(spectrum: Spectrum, level: float) -> Choice:
    """The slicing and rank of the least loss, with a price on what is saved.

    The price is the same in all layers, from 1e30 at level 0 to 1e-30 at 1.
    """
    price = 10 ** (_DIGITS * (1 - 2 * level))
    found, least = LEAVE, price * spectrum.cost(LEAVE)
    for count in spectrum.values:
        losses = spectrum.loss(count)
        costs = losses + price * spectrum.cost_table(count)[: len(losses)]
        if len(costs) and costs.min() < least:
            found = spectrum.choice(int(np.argmin(costs)) + 1, count)
            least = costs.min()
    return found


RULES: dict[str, Rule] = {
    "uniform": uniform,
    "energy": energy,
    "global": largest,
    "alds": alds,
    "sensitivity": sensitivity,
}


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
    found = _fitting(spectrum, tables[slices], slices, level)
    if found is LEAVE and slices > 1:
        return _fitting(spectrum, tables[1], 1, level)
    return found


def _fitting(spectrum, errors, slices, level):
    """The smallest rank of a slicing whose error is at most `1 - level`."""
    # Errors fall with the rank.
    rank = len(errors) - np.searchsorted(errors[::-1], 1 - level, "right") + 1
    full = spectrum.values[slices].shape[-1]
    if rank > len(errors) < full:  # not at a rank that is fast enough
        return LEAVE
    return spectrum.choice(min(rank, full), slices)


def _best_slicing(spectrum, tables, choice, slices):
    if choice.rank is None:
        return slices
    cost, best = spectrum.cost(choice), (spectrum.error(choice), slices)
    for count, errors in tables.items():
        rank = spectrum.within(cost, count)
        if rank:
            best = min(best, (float(errors[rank - 1]), count))
    return best[1]
