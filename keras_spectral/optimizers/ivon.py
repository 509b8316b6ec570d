"""IVON: a Gaussian over every weight at the price of Adam."""

import contextlib
import math
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import eagerly
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import check_whole
from keras_spectral.optimizers.ivon_update import HESSIANS
from keras_spectral.optimizers.ivon_update import check_positive
from keras_spectral.optimizers.ivon_update import check_rate
from keras_spectral.optimizers.ivon_update import ivon_curvature
from keras_spectral.optimizers.ivon_update import ivon_update


@keras.saving.register_keras_serializable("keras_spectral")
class IVON(keras.optimizers.Optimizer):
    """Improved variational online Newton: trains a posterior N(m, sigma^2).

    Each weight has a mean m and `sigma = 1 / sqrt(ess (h + weight_decay))`.
    While it trains, the model holds a sample `theta = m + e` of it,
    `e = sigma * eps` with standard normal eps; the gradient is taken there:

        g  <- b1 g + (1 - b1) grad
        f   = ess (h + wd) e grad
        h  <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + wd))
        m  <- m - lr' clip((g / (1 - b1^t) + wd m) / (h + wd))

    with the old h in f and in the third line, the new h in the last, and
    `lr' = lr (hess_init + wd)` with `rescale_lr`. Then a new sample is drawn.

    So a model holds noisy weights from `build` (the first `fit`) on. Put the
    means in with `with optimizer.mean():`, or let `callbacks.MeanWeights` do
    it for validation, checkpoints and the end of training. `posterior` gives
    mean and deviation of a variable, `predict_mean` averages predictions over
    samples. The state (means, momenta, h, random state) is saved with the
    model like that of any optimizer.

    Use it where uncertainty counts: calibrated predictions, or importances
    of weights. A step costs about as much as Adam's. Adapters' gradients
    differ by orders of magnitude, and h needs about `1 / (1 - b2)` steps to
    even that out; with `IVON(2, ess=1e7, hess_init=3e-4, clip_radius=1e-3,
    rescale_lr=False)` nearly every weight moves by `lr * clip_radius` instead,
    as by Adam's rate.

    `mc_samples` = k makes a step of k batches, each at a sample of its own:
    grad and e grad are their means. Keras calls an optimizer once a batch, so
    it is the authors' k evaluations of one batch only where each batch comes
    k times in a row (`dataset.flat_map` of repeats); else it is a batch k
    times as large whose parts have samples of their own. Schedules and
    `clipnorm` see single batches, `iterations` counts steps.

    All random numbers come from `noise(index, shape, dtype)`, which gives
    standard normal ones for the variable at `index`; a subclass or
    `optimizer.noise = function` may put others in their place.

    Within a LossScaleOptimizer (`mixed_float16`) the gradients arrive
    unscaled; a batch whose gradients overflow is skipped, and the sample
    stays for the next one.

    Source: Shen et al. 2024, arXiv 2402.17641, algorithm 1; `hess_approx` and
    `mc_samples` as in the authors' code, ivon-opt 0.1.3.

    Args:
        learning_rate: At least 0, or a Keras schedule; 0.1 suits whole models.
        ess: Effective sample size, about the number of training examples:
            the larger, the narrower the posterior.
        hess_init: Start of h, above 0.
        beta_1: b1, at least 0 and below 1.
        beta_2: b2, the same.
        weight_decay: wd, the precision of the prior divided by `ess`; it acts
            through the gradient, not apart from it.
        clip_radius: Largest step before the rate, above 0; may be infinite.
        rescale_lr: Whether the rate is multiplied by `hess_init + wd`.
        debias: Whether g is divided by `1 - b1^t`.
        seed: Integer seed of the samples.
        hess_approx: What f is: `"price"`, the formula above, or `"gradsq"`,
            `f = ess grad^2`, which is never negative.
        mc_samples: Batches, each at its own sample, of one step; at least 1.
        **kwargs: Those of every Keras optimizer (`clipnorm`, `name`,
            `gradient_accumulation_steps`, whose batches share one sample),
            but no `use_ema`: means are what `mean` puts in.

    Raises:
        ValueError: A bad option; `mc_samples` together with
            `gradient_accumulation_steps`.

    Example:

    >>> layer = keras.layers.Dense(1, name="score")
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> model.compile(IVON(0.1, ess=100), "mse")
    >>> history = model.fit(
    ...     keras.ops.ones((4, 2)), keras.ops.ones((4, 1)), verbose=0)
    >>> mean, deviation = model.optimizer.posterior(layer.kernel)
    >>> mean.shape, bool((deviation > 0).all())
    ((2, 1), True)
    """

    def __init__(
        self,
        learning_rate: float
        | keras.optimizers.schedules.LearningRateSchedule = 0.1,
        ess: float = 1000.0,
        hess_init: float = 1.0,
        beta_1: float = 0.9,
        beta_2: float = 0.99999,
        weight_decay: float = 1e-4,
        clip_radius: float = math.inf,
        rescale_lr: bool = True,
        debias: bool = True,
        seed: int | None = None,
        name: str = "ivon",
        hess_approx: str = "price",
        mc_samples: int = 1,
        **kwargs,
    ):
        super().__init__(check_rate(learning_rate), name=name, **kwargs)
        check_positive(ess, "ess")
        check_positive(hess_init, "hess_init")
        if clip_radius != math.inf:
            check_positive(clip_radius, "clip_radius")
        check_number(beta_1, "beta_1", 0, 1)
        check_number(beta_2, "beta_2", 0, 1)
        check_number(weight_decay, "weight_decay", 0)
        check_choice(hess_approx, "hess_approx", HESSIANS)
        self.ess = ess
        self.hess_init = hess_init
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        # Not Keras's own `weight_decay`, which would shrink weights itself.
        self.prior_precision = weight_decay
        self.clip_radius = clip_radius
        self.rescale_lr = check_flag(rescale_lr, "rescale_lr")
        self.debias = check_flag(debias, "debias")
        self.hess_approx = hess_approx
        self.mc_samples = check_whole(mc_samples, "mc_samples", 1)
        self._check_keras_options()
        self.seed = check_seed(seed)
        self.seed_generator = keras.random.SeedGenerator(seed)

    @property
    def iterations(self):
        """How many steps were made, of `mc_samples` batches each."""
        batches = super().iterations
        if self.mc_samples == 1:
            return batches
        return ops.floor_divide(batches, self.mc_samples)

    def build(self, variables):
        if self.built:
            return
        # On TensorFlow `fit` builds within a graph, which each step runs.
        with eagerly():
            self._build(variables)

    def _build(self, variables):
        super().build(variables)
        self._track_variable(self.seed_generator.state)
        self._means, self._momenta, self._hessians = (
            [self.add_variable_from_reference(v, name=name) for v in variables]
            for name in ("mean", "momentum", "hessian")
        )
        for hessian in self._hessians:
            hessian.assign(ops.convert_to_tensor(hessian) + self.hess_init)
        if self.mc_samples > 1:
            self._gradients, self._curvatures = (
                [self.add_variable_from_reference(v, name) for v in variables]
                for name in ("gradient_sum", "curvature_sum")
            )
        for mean, variable in zip(self._means, variables):
            mean.assign(ops.copy(variable))  # no two share one buffer
        self.sample()

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        dtype = variable.dtype
        gradient = ops.cast(gradient, dtype)
        states = self._means, self._momenta, self._hessians
        mean, momentum, hessian = old = [
            ops.convert_to_tensor(state[index]) for state in states
        ]
        noise = ops.convert_to_tensor(variable) - mean
        gradient, curvature, complete = self._of_the_step(
            index, gradient, ivon_curvature(gradient, noise, self)
        )
        momentum, hessian, move = ivon_update(
            gradient, curvature, *old, self._bias(dtype), self
        )
        rate = ops.cast(learning_rate, dtype)
        if self.rescale_lr:
            rate = rate * (self.hess_init + self.prior_precision)
        new = [mean - rate * move, momentum, hessian]
        if complete is not None:
            new = [ops.where(complete, n, o) for n, o in zip(new, old)]
        for state, value in zip(states, new):
            self.assign(state[index], value)
        self.assign(variable, new[0] + self._draw(index, new[2]))

    def _of_the_step(self, index, *values):
        """Means over a step's samples, and whether these were all of them."""
        if self.mc_samples == 1:
            return *values, None
        batches = ops.convert_to_tensor(self._iterations) + 1
        complete = ops.equal(batches % self.mc_samples, 0)
        means = []
        for sums, value in zip((self._gradients, self._curvatures), values):
            total = ops.convert_to_tensor(sums[index]) + value
            self.assign(
                sums[index], ops.where(complete, ops.zeros_like(total), total)
            )
            means.append(total / self.mc_samples)
        return *means, complete

    def noise(self, index: int, shape: tuple, dtype: str):
        """Standard normal numbers for variable `index`; may be replaced."""
        return keras.random.normal(shape, dtype=dtype, seed=self.seed_generator)

    def sample(self) -> None:
        """Puts a fresh sample of the posterior into the variables."""
        self._check_built()
        for index, variable in enumerate(self._trainable_variables):
            draw = self._draw(index, self._hessians[index])
            variable.assign(self._means[index] + draw)

    def use_mean(self) -> None:
        """Puts the means into the variables; `sample` ends it."""
        self._check_built()
        for mean, variable in zip(self._means, self._trainable_variables):
            variable.assign(ops.copy(mean))

    @contextlib.contextmanager
    def mean(self) -> Iterator[None]:
        """The variables hold their means for as long as the block lasts.

        Raises:
            ValueError: The optimizer is not built.
        """
        self._check_built()
        values = [ops.copy(v) for v in self._trainable_variables]
        self.use_mean()
        try:
            yield
        finally:
            for variable, value in zip(self._trainable_variables, values):
                variable.assign(value)

    def posterior(
        self, variable: keras.Variable
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of a variable's weights.

        Raises:
            ValueError: The optimizer is not built, or not for that variable.
        """
        self._check_knows(variable)
        mean, deviation = map(ops.convert_to_numpy, self.moments(variable))
        return mean, deviation

    def momentum(self, variable: keras.Variable) -> np.ndarray:
        """g of a variable, not divided by `1 - b1^t`; raises as `posterior`."""
        self._check_knows(variable)
        state = self._momenta[self._get_variable_index(variable)]
        return ops.convert_to_numpy(state)

    def hessian(self, variable: keras.Variable) -> np.ndarray:
        """h of a variable, without `weight_decay`; raises as `posterior`."""
        self._check_knows(variable)
        state = self._hessians[self._get_variable_index(variable)]
        return ops.convert_to_numpy(state)

    def moments(self, variable: keras.Variable) -> tuple:
        """`posterior` as tensors, also within a compiled step."""
        index = self._get_variable_index(variable)
        mean, hessian = (
            ops.convert_to_tensor(state[index])
            for state in (self._means, self._hessians)
        )
        return mean, self._deviation(hessian)

    def multiply_mean(self, variable: keras.Variable, factor) -> None:
        """Multiplies a variable's mean; its sample moves along with it."""
        index = self._get_variable_index(variable)
        mean = ops.convert_to_tensor(self._means[index])
        change = mean * factor - mean
        self._means[index].assign(mean + change)
        variable.assign(ops.convert_to_tensor(variable) + change)

    def get_config(self):
        config = super().get_config()
        names = ("ess", "hess_init", "beta_1", "beta_2", "clip_radius")
        names += ("rescale_lr", "debias", "seed", "hess_approx", "mc_samples")
        own = {name: getattr(self, name) for name in names}
        return {**config, **own, "weight_decay": self.prior_precision}

    def _draw(self, index, hessian):
        deviation = self._deviation(ops.convert_to_tensor(hessian))
        variable = self._means[index]
        eps = self.noise(index, tuple(variable.shape), variable.dtype)
        return deviation * ops.cast(eps, variable.dtype)

    def _deviation(self, hessian):
        return ops.rsqrt(self.ess * (hessian + self.prior_precision))

    def _bias(self, dtype):
        """`1 - b1^t` in step t."""
        if not self.debias or not self.beta_1:
            return 1.0
        step = ops.cast(self.iterations + 1, dtype)
        return -ops.expm1(math.log(self.beta_1) * step)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        raise ValueError(
            "IVON's weight_decay is the precision of the prior, without which "
            "no weight has a posterior. Expected one value for all weights."
        )

    def _check_keras_options(self):
        if self.use_ema:
            raise ValueError(
                "Received use_ema=True. Expected IVON without it: an average "
                "would replace the samples that training needs; `mean` and "
                "`callbacks.MeanWeights` put the means in."
            )
        if self.mc_samples > 1 and self.gradient_accumulation_steps:
            raise ValueError(
                f"Received mc_samples={self.mc_samples} and "
                "gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}. Expected one of them: "
                "both make a step of several batches."
            )

    def _check_knows(self, variable):
        self._check_built()
        self._check_variables_are_known([variable])

    def _check_built(self):
        if not self.built:
            raise ValueError(
                "The optimizer has no posterior yet. Expected one that is "
                "built: call `fit`, or `optimizer.build(variables)`."
            )
