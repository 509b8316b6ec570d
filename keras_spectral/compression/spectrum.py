"""One layer's singular values, and what each choice of a rank costs."""

import dataclasses
import math

import numpy as np


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
