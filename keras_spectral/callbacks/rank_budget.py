"""RankBudget: spreads a budget of directions over adapted layers."""

import math
import warnings

import keras

from keras_spectral._backend import number_in
from keras_spectral._backend import scope_of
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.checks import is_whole
from keras_spectral._internal.optimizers import after_update
from keras_spectral._internal.optimizers import called_after_update
from keras_spectral._internal.optimizers import innermost
from keras_spectral._internal.optimizers import stop_after_update
from keras_spectral.layers.allocation import RankAllocation
from keras_spectral.layers.allocation import Schedule
from keras_spectral.layers.importance import CRITERIA
from keras_spectral.model import surgery
from keras_spectral.model.convert import budgeted_places
from keras_spectral.model.convert import compact_ranks
from keras_spectral.optimizers import IVON


class RankBudget(keras.callbacks.Callback):
    """Takes the least important directions of adapted layers away.

    These are the triplets of AdaLoRADense, the singular directions of
    SpectralDense with `adaptive=True` and of GatedSpectralDense; triplets in
    what follows, E being the mask or the gate.

    The number of triplets that may be on, over all layers, is the sum of
    their ranks b_0 for the first `warmup` steps, and b_T = `target_rank` times
    the number of layers in the last `final` ones; between, after step t,

        b = int((b_0 - b_T) (1 - (t - warmup) / (T - final - warmup))^3 + b_T)

    Every `interval` steps the triplets whose importance is not among the b
    largest of the model get E = 0; they may grow back until the next time. In
    the final steps the last choice stands. A triplet's importance is s(E_i) +
    mean s(A_:i) + mean s(B_i:), with s by `criterion`:

    - `"sensitivity"` (AdaLoRA): Ibar * Ubar, moving averages of I = |w g| and
      of |I - Ibar|, w after the update (with IVON its mean) and g the
      gradient that it used;
    - with IVON, from each weight's mean m and deviation sigma: `"snr"`
      |m| / sigma, `"snr_abs"` E|t| / sd|t|, `"mean"` |m|, `"precision"`
      1 / sigma.

    All of that runs inside of the optimizer's compiled step, without a second
    backward pass, with clipping, accumulation and several steps an execution.
    The logs gain `rank_budget`, the number of triplets on, and `rank/PATH`
    for each layer; `ranks` keeps them, one dictionary an epoch. At the end of
    training it warns if no triplet was chosen.

    Where it stands is saved with the layers' weights while it runs, by
    `BackupAndRestore` before or behind it in the list, `ModelCheckpoint` and
    `model.save`. A training that was interrupted, also by Ctrl-C, goes on
    from there in the next `fit` with a RankBudget; after one that ended, the
    next begins at step 0.

    Source: Zhang et al. 2023, arXiv 2303.10512, section 3; Bayesian
    criteria: Chen et al. 2024, arXiv 2409.10673.

    Args:
        target_rank: Mean number of triplets a layer at the end, above 0.
        criterion: `"sensitivity"`, `"snr"`, `"mean"`, `"precision"` or
            `"snr_abs"`.
        warmup: Steps (whole number) or share of training (below 1).
        final: The same, at the end.
        interval: Steps between two choices, a whole number of at least 1.
        total_steps: T. Defaults to epochs times steps of the `fit`. A step
            is an update of the optimizer; with IVON's `mc_samples`, a batch.
        beta_1: Of the average Ibar.
        beta_2: Of the average Ubar.
        compact: Whether `compact_ranks` follows after training.

    Raises:
        ValueError: A bad option. At the start of training: no such layer,
            no steps left between warmup and final, a target above the ranks,
            a Bayesian criterion without IVON, a MultiOptimizer, an unknown
            number of steps.

    Example:

    >>> import numpy as np
    >>> import keras_spectral as ks
    >>> layer = ks.AdaLoRADense(keras.layers.Dense(4, name="hidden"), rank=3)
    >>> model = keras.Sequential([keras.Input((5,)), layer])
    >>> model.compile("adam", "mse")
    >>> budget = ks.callbacks.RankBudget(1, warmup=2, final=2, interval=1)
    >>> history = model.fit(
    ...     np.ones((8, 5)), np.ones((8, 4)), epochs=10, verbose=0,
    ...     callbacks=[budget],
    ... ).history
    >>> history["rank_budget"]
    [3, 3, 2, 1, 1, 1, 1, 1, 1, 1]
    >>> layer.active_rank()
    1
    """

    def __init__(
        self,
        target_rank: float,
        criterion: str = "sensitivity",
        warmup: float = 0.1,
        final: float = 0.3,
        interval: int = 10,
        total_steps: int | None = None,
        beta_1: float = 0.85,
        beta_2: float = 0.85,
        compact: bool = False,
    ):
        super().__init__()
        check_number(target_rank, "target_rank", 0)
        if not target_rank:
            raise ValueError(
                "Received target_rank=0. Expected a number above 0; "
                "`unwrap_model` drops the adapters."
            )
        check_choice(criterion, "criterion", CRITERIA)
        check_number(beta_1, "beta_1", 0, 1)
        check_number(beta_2, "beta_2", 0, 1)
        check_flag(compact, "compact")
        if total_steps is not None:
            total_steps = check_whole(total_steps, "total_steps", 1)
        self.target_rank = target_rank
        self.criterion = criterion
        self.warmup = _check_steps(warmup, "warmup")
        self.final = _check_steps(final, "final")
        self.interval = check_whole(interval, "interval", 1)
        self.total_steps = total_steps
        self.betas = beta_1, beta_2
        self.compact = compact
        self.ranks: list[dict[str, int]] = []
        self.allocation: RankAllocation | None = None

    def on_train_begin(self, logs=None):
        adapters = [p.layer for p in budgeted_places(self.model)]
        optimizer = self._optimizer()
        schedule = self._schedule(adapters, optimizer)
        if self.criterion != "sensitivity" and not isinstance(optimizer, IVON):
            raise ValueError(
                f"Received criterion={self.criterion!r} with the optimizer "
                f"{type(optimizer).__name__}. Expected IVON, which knows means "
                "and deviations; or criterion='sensitivity'."
            )
        reached = [adapter.progress() for adapter in adapters]
        self._take_off()  # what an interrupted training has left
        with scope_of(self.model):
            if not self.model.optimizer.built:
                self.model.optimizer.build(self.model.trainable_variables)
            allocation = RankAllocation(
                optimizer, adapters, schedule, self.criterion, *self.betas
            )
        if _goes_on(reached, schedule):
            for adapter, state in zip(adapters, reached):
                allocation.take(adapter, state)
        self._watch(allocation)

    def _watch(self, allocation):
        self.allocation = allocation
        after_update(self.model.optimizer, allocation, allocation.variables)
        for adapter in allocation.adapters:
            adapter.budget = allocation
        surgery.forget_compiled([self.model])
        self.model.make_train_function()

    def on_epoch_end(self, epoch, logs=None):
        places = budgeted_places(self.model)
        ranks = self.allocation.ranks()
        self.ranks.append(dict(zip((p.path for p in places), ranks)))
        if logs is not None:
            logs["rank_budget"] = sum(ranks)
            logs |= {f"rank/{path}": n for path, n in self.ranks[-1].items()}

    def on_train_end(self, logs=None):
        steps = number_in(self.allocation.step)
        schedule = self.allocation.schedule
        self._take_off()
        for adapter in self.allocation.adapters:
            adapter.budget = None
        surgery.forget_compiled([self.model])
        if steps <= schedule.warmup:
            warnings.warn(
                f"RankBudget took no triplet away: {steps} steps were trained, "
                f"and warmup={schedule.warmup} of {schedule.total}. Expected "
                "a training that is as long as `total_steps`.",
                stacklevel=2,
            )
        if self.compact:
            compact_ranks(self.model)

    def _take_off(self):
        optimizer = self.model.optimizer
        if isinstance(called_after_update(optimizer), RankAllocation):
            stop_after_update(optimizer)

    def _optimizer(self):
        optimizer = innermost(self.model.optimizer)
        if hasattr(optimizer, "optimizers"):
            raise ValueError(
                f"Model '{self.model.name}' is compiled with "
                f"{type(optimizer).__name__}. Expected one optimizer for all "
                "weights, whose updates RankBudget can follow."
            )
        return optimizer

    def _schedule(self, adapters, optimizer):
        total = self.total_steps
        if total is None:
            epochs, steps = (self.params.get(k) for k in ("epochs", "steps"))
            if not epochs or not steps:
                raise ValueError(
                    "The number of training steps is not known beforehand. "
                    "Expected RankBudget(..., total_steps=...)."
                )
            accumulated = optimizer.gradient_accumulation_steps or 1
            total = epochs * steps // accumulated
        numbers = [adapter.direction_weights()[0] for adapter in adapters]
        start = sum(number.shape[0] for number in numbers)
        end = round(self.target_rank * len(adapters))
        warmup, final = (_steps(x, total) for x in (self.warmup, self.final))
        return Schedule(warmup, final, self.interval, total, start, end)


def _check_steps(given, name):
    """Raises unless it is a whole number of steps or a share."""
    check_number(given, name, 0)
    if not is_whole(given) and given >= 1:
        raise ValueError(
            f"Received {name}={given!r}. Expected a whole number of steps, or "
            "a share of all below 1."
        )
    return given


def _goes_on(reached, schedule):
    """Whether all layers say that a training is under way, and the same."""
    steps = {int(state.get("step", 0)) for state in reached}
    return len(steps) == 1 and 0 < steps.pop() < schedule.total


def _steps(given, total):
    """Steps from a whole number of them or from a share."""
    return int(given) if is_whole(given) else math.floor(given * total)
