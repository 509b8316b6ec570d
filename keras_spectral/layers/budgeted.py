"""Adapters whose directions a RankBudget can take away."""

from typing import Protocol

import keras
import numpy as np
from keras import ops

_PROGRESS = "rank_budget_"  # of the names in a file of weights


class Progress(Protocol):
    """The keeper of a RankBudget's progress."""

    def state(self, adapter) -> dict[str, np.ndarray]:
        """The state that a layer saves with its weights."""

    def take(self, adapter, state: dict[str, np.ndarray]) -> None:
        """Takes the state that a layer has loaded."""


class Loaded:
    """Keeps what a file said until a RankBudget goes on from there."""

    def __init__(self, state):
        self._state = state

    def state(self, adapter):
        return self._state

    def take(self, adapter, state):
        self._state = state


class Budgeted:
    """Mixed into adapters that are a sum of directions, each with a number.

    A direction whose number is zero changes nothing: so a `RankBudget` takes
    it away.
    """

    has_budget = True  # whether this one has such numbers
    budget: Progress | None = None

    def direction_weights(self) -> tuple[keras.Variable, list]:
        """The numbers, and what else belongs to a direction.

        Returns:
            The variable (r,) of the numbers, and pairs of another variable
            and the axis of it that runs within a direction.
        """
        raise NotImplementedError

    def active_rank(self) -> int:
        """How many directions are on."""
        numbers, _ = self.direction_weights()
        return int((ops.convert_to_numpy(numbers) != 0).sum())

    def progress(self) -> dict[str, np.ndarray]:
        """Where a RankBudget stands, by name; empty if none has begun."""
        return self.budget.state(self) if self.budget else {}

    def save_own_variables(self, store):
        super().save_own_variables(store)
        for name, value in self.progress().items():
            store[_PROGRESS + name] = value

    def load_own_variables(self, store):
        values = {name: store[name] for name in store.keys()}
        state = {
            name.removeprefix(_PROGRESS): np.array(values.pop(name))
            for name in list(values)
            if name.startswith(_PROGRESS)
        }
        super().load_own_variables(values)
        if state and self.budget is None:
            self.budget = Loaded(state)
        elif state:
            self.budget.take(self, state)
