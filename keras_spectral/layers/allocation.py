"""RankAllocation: what AdaLoRA does after each update of the weights."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral.layers.budgeted import Budgeted
from keras_spectral.layers.importance import BAYESIAN
from keras_spectral.layers.importance import sensitivity

_AVERAGES = ("importance", "uncertainty")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When triplets go, in training steps.

    Attributes:
        warmup: t_i, steps before the first goes.
        final: t_f, steps at the end with the last ranks.
        interval: Steps between two masks.
        total: T, all steps.
        start: Triplets of all layers at the start.
        end: Triplets at the end.
    """

    warmup: int
    final: int
    interval: int
    total: int
    start: int
    end: int

    def __post_init__(self):
        if not 0 <= self.warmup < self.total - self.final <= self.total:
            raise ValueError(
                f"Received warmup={self.warmup} and final={self.final} steps "
                f"of {self.total}. Expected that they leave steps in between."
            )
        if self.interval < 1:
            raise ValueError(
                f"Received interval={self.interval}. Expected at least 1."
            )
        if not 0 < self.end <= self.start:
            raise ValueError(
                f"Received a target of {self.end} triplets for layers that "
                f"start with {self.start}. Expected at most as many, and one "
                "at least."
            )

    def budget(self, step):
        """How many triplets may be on after a step, from a tensor."""
        length = self.total - self.final - self.warmup
        share = 1 - ops.cast(step - self.warmup, "float32") / length
        between = (self.start - self.end) * share**3 + self.end
        # Of whole numbers float32 may give a last digit less.
        between = ops.cast(ops.floor(between + 1e-3), "int32")
        budget = ops.where(step <= self.warmup, self.start, between)
        return ops.where(step >= self.total - self.final, self.end, budget)

    def masks(self, step):
        """Whether triplets are chosen again after a step, from a tensor."""
        last = self.total - self.final
        regular = ops.logical_and(
            ops.logical_and(step > self.warmup, step < last),
            ops.equal(step % self.interval, 0),
        )
        return ops.logical_or(regular, ops.equal(step, last))


class RankAllocation:
    """Importances, budget and masks of adapters with directions.

    It holds variables of an optimizer, and is called after each of its
    updates, within the compiled step. The optimizer is saved without them:
    the layers save, load and give them back (`Budgeted.progress`).

    Args:
        optimizer: A built Keras optimizer, IVON for the Bayesian criteria.
        adapters: The layers.
        schedule: When triplets go.
        criterion: One of `CRITERIA`.
        beta_1: Of the moving average of |w g|.
        beta_2: Of the moving average of its variation.
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        adapters: list[Budgeted],
        schedule: Schedule,
        criterion: str = "sensitivity",
        beta_1: float = 0.85,
        beta_2: float = 0.85,
    ):
        self.optimizer = optimizer
        self.adapters = adapters
        self.schedule = schedule
        self.criterion = criterion
        self.beta_1, self.beta_2 = beta_1, beta_2
        self.weights = [a.direction_weights() for a in adapters]
        self.step = optimizer.add_variable((), dtype="int32", name="rank_step")
        self.kept = optimizer.add_variable(
            (schedule.start,), name="rank_kept", initializer="ones"
        )
        self.averages = {}
        if criterion == "sensitivity":
            for variable in self._variables():
                self.averages[id(variable)] = [
                    optimizer.add_variable_from_reference(variable, name=name)
                    for name in _AVERAGES
                ]

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables that it added to the optimizer."""
        pairs = self.averages.values()
        return [self.step, self.kept, *(v for pair in pairs for v in pair)]

    def __call__(self, gradients, variables):
        """After an update: `gradients` are those that it used."""
        schedule = self.schedule
        step = ops.convert_to_tensor(self.step) + 1
        if self.averages:
            self._average(dict(zip(map(id, variables), gradients)), step)
        scores = ops.concatenate([self._scores(*w) for w in self.weights])
        cut = schedule.start - schedule.budget(step)
        ordered = ops.concatenate([-ops.ones(1), ops.sort(scores)])
        keep = ops.cast(scores > ops.take(ordered, cut), "float32")
        kept = ops.convert_to_tensor(self.kept)
        masks = schedule.masks(step)
        kept = ops.where(masks, keep, kept)
        self.step.assign(step)
        self.kept.assign(kept)
        # Between masks E may grow back; at the end it is off for good.
        last = schedule.total - schedule.final
        applied = ops.where(ops.logical_or(masks, step > last), kept, 1.0)
        self._switch_off(applied)

    def ranks(self) -> list[int]:
        """How many triplets of each layer the last mask kept."""
        kept = ops.convert_to_numpy(self.kept)
        return [int(kept[part].sum()) for part in self._parts()]

    def state(self, adapter: Budgeted) -> dict[str, np.ndarray]:
        """Where it stands: the step, and what belongs to one layer."""
        kept = ops.convert_to_numpy(self.kept)
        part = self._parts()[self.adapters.index(adapter)]
        state = {"step": np.int32(number_in(self.step)), "kept": kept[part]}
        for name, variable in self._named(adapter).items():
            state[name] = ops.convert_to_numpy(variable)
        return state

    def take(self, adapter: Budgeted, state: dict[str, np.ndarray]) -> None:
        """Goes on where `state` stood; what it lacks starts at zero."""
        kept = ops.convert_to_numpy(self.kept).copy()
        kept[self._parts()[self.adapters.index(adapter)]] = state["kept"]
        self.kept.assign(kept)
        self.step.assign(state["step"])
        for name, variable in self._named(adapter).items():
            zeros = np.zeros(variable.shape, "float32")
            variable.assign(state.get(name, zeros))

    def _parts(self):
        """Where each layer's triplets are among all."""
        sizes = [numbers.shape[0] for numbers, _ in self.weights]
        ends = np.cumsum(sizes).tolist()
        return [slice(end - size, end) for end, size in zip(ends, sizes)]

    def _variables(self):
        """All variables that count."""
        return [
            variable
            for numbers, others in self.weights
            for variable in (numbers, *(other for other, _ in others))
        ]

    def _named(self, adapter):
        """The averages of one layer by name."""
        if not self.averages:
            return {}
        numbers, others = self.weights[self.adapters.index(adapter)]
        weights = [numbers, *(other for other, _ in others)]
        return {
            f"{name}_{letter}": average
            for letter, variable in zip("eab", weights)
            for name, average in zip(_AVERAGES, self.averages[id(variable)])
        }

    def _average(self, gradients, step):
        """Ibar and Ubar, which stand still in the final steps."""
        schedule = self.schedule
        moving = step < schedule.total - schedule.final
        for variable in self._variables():
            if id(variable) not in gradients:
                continue
            pair = self.averages[id(variable)]
            mean, spread = map(ops.convert_to_tensor, pair)
            now = ops.abs(
                self._weight(variable)
                * ops.cast(gradients[id(variable)], "float32")
            )
            new_mean = self.beta_1 * mean + (1 - self.beta_1) * now
            new_spread = self.beta_2 * spread
            new_spread += (1 - self.beta_2) * ops.abs(now - new_mean)
            pair[0].assign(ops.where(moving, new_mean, mean))
            pair[1].assign(ops.where(moving, new_spread, spread))

    def _weight(self, variable):
        """Its value, or with IVON, whose variables hold samples, its mean."""
        if hasattr(self.optimizer, "moments"):
            return self.optimizer.moments(variable)[0]
        return ops.convert_to_tensor(variable)

    def _scores(self, numbers, others):
        """The importance of each direction, (rank,)."""
        total = self._importance(numbers)
        for variable, axis in others:
            total = total + ops.mean(self._importance(variable), axis)
        return total

    def _importance(self, variable):
        if self.criterion == "sensitivity":
            return sensitivity(
                *map(ops.convert_to_tensor, self.averages[id(variable)])
            )
        moments = self.optimizer.moments(variable)
        return BAYESIAN[self.criterion](*moments)

    def _switch_off(self, keep):
        for (numbers, _), part in zip(self.weights, self._parts()):
            if hasattr(self.optimizer, "multiply_mean"):
                self.optimizer.multiply_mean(numbers, keep[part])
            else:
                value = ops.convert_to_tensor(numbers)
                numbers.assign(value * keep[part])
