"""IVON: a Gaussian over every weight at the price of Adam."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import eagerly


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

    Source: Shen et al. 2024, arXiv 2402.17641, algorithm 1.

    Args:
        learning_rate: A number or a Keras schedule; 0.1 is a good start for
            a whole model.
        ess: Effective sample size, about the number of training examples:
            the larger, the narrower the posterior.
        hess_init: Start of h, above 0.
        beta_1: b1, at least 0 and below 1.
        beta_2: b2, the same.
        weight_decay: wd, the precision of the prior divided by `ess`; it acts
            through the gradient, not apart from it.
        clip_radius: Largest step before the learning rate, above 0.
        rescale_lr: Whether the rate is multiplied by `hess_init + wd`.
        debias: Whether g is divided by `1 - b1^t`.
        seed: Integer seed of the samples.
        **kwargs: Those of every Keras optimizer (`clipnorm`,
            `gradient_accumulation_steps`, `name`).

    Raises:
        ValueError: A number out of its range.

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
        learning_rate=0.1,
        ess=1000.0,
        hess_init=1.0,
        beta_1=0.9,
        beta_2=0.99999,
        weight_decay=1e-4,
        clip_radius=math.inf,
        rescale_lr=True,
        debias=True,
        seed=None,
        name="ivon",
        **kwargs,
    ):
        super().__init__(learning_rate, name=name, **kwargs)
        for key, value, low, high in (
            ("ess", ess, 0, math.inf),
            ("hess_init", hess_init, 0, math.inf),
            ("clip_radius", clip_radius, 0, None),
            ("beta_1", beta_1, None, 1),
            ("beta_2", beta_2, None, 1),
            ("weight_decay", weight_decay, None, math.inf),
        ):
            above = value > 0 if low == 0 else value >= 0
            if not above or (high is not None and not value < high):
                raise ValueError(
                    f"Received {key}={value!r}. Expected a number "
                    + ("above 0" if low == 0 else "of at least 0")
                    + (" and below 1." if high == 1 else ".")
                )
        self.ess = ess
        self.hess_init = hess_init
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        # Not Keras's own `weight_decay`, which would shrink weights itself.
        self.prior_precision = weight_decay
        self.clip_radius = clip_radius
        self.rescale_lr = rescale_lr
        self.debias = debias
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

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
        for mean, variable in zip(self._means, variables):
            mean.assign(ops.copy(variable))  # no two share one buffer
        self.sample()

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        dtype = variable.dtype
        gradient = ops.cast(gradient, dtype)
        mean, momentum, hessian = (
            ops.convert_to_tensor(state[index])
            for state in (self._means, self._momenta, self._hessians)
        )
        momentum, hessian, move = ivon_update(
            gradient,
            ops.convert_to_tensor(variable) - mean,
            mean,
            momentum,
            hessian,
            self._bias(dtype),
            self,
        )
        rate = ops.cast(learning_rate, dtype)
        if self.rescale_lr:
            rate = rate * (self.hess_init + self.prior_precision)
        mean = mean - rate * move
        self.assign(self._momenta[index], momentum)
        self.assign(self._hessians[index], hessian)
        self.assign(self._means[index], mean)
        self.assign(variable, mean + self._draw(index, hessian))

    def noise(self, index: int, shape: tuple, dtype: str):
        """Standard normal numbers for variable `index`; tests replace it."""
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
        self._check_built()
        self._check_variables_are_known([variable])
        mean, deviation = map(ops.convert_to_numpy, self.moments(variable))
        return mean, deviation

    def moments(self, variable: keras.Variable) -> tuple:
        """The same as tensors, also within a compiled step."""
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
        names += ("rescale_lr", "debias", "seed")
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

    def _check_built(self):
        if not self.built:
            raise ValueError(
                "The optimizer has no posterior yet. Expected one that is "
                "built: call `fit`, or `optimizer.build(variables)`."
            )


def ivon_update(gradient, noise, mean, momentum, hessian, bias, options):
    """New momentum, new h and the step before the learning rate."""
    b1, b2 = options.beta_1, options.beta_2
    decay = options.prior_precision
    momentum = b1 * momentum + (1 - b1) * gradient
    estimate = options.ess * (hessian + decay) * noise * gradient
    correction = ops.square(hessian - estimate) / (2 * (hessian + decay))
    hessian = b2 * hessian + (1 - b2) * estimate + (1 - b2) ** 2 * correction
    move = (momentum / bias + decay * mean) / (hessian + decay)
    if options.clip_radius < math.inf:
        move = ops.clip(move, -options.clip_radius, options.clip_radius)
    return momentum, hessian, move


def predict_mean(
    model: keras.Model, x: Any, samples: int = 8, activation: Any = None
) -> np.ndarray:
    """Averages predictions over samples of an IVON posterior.

    Args:
        model: A model that was trained with IVON.
        x: What `model.predict` takes.
        samples: How many, at least 1.
        activation: What makes probabilities of the model's output before it
            is averaged, as `"softmax"` for logits; `None`, nothing.

    Returns:
        The mean prediction. The model's weights are as before.

    Raises:
        ValueError: The model has no IVON optimizer that has trained its
            weights as they are now; `samples` below 1; an activation that
            Keras does not know.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(IVON(0.1, ess=100), "mse")
    >>> data = keras.ops.ones((4, 2)), keras.ops.ones((4, 1))
    >>> history = model.fit(*data, verbose=0)
    >>> predict_mean(model, data[0], samples=3).shape
    (4, 1)
    """
    optimizer = getattr(model, "optimizer", None)
    if not isinstance(optimizer, IVON):
        raise ValueError(
            f"Model '{model.name}' is compiled with "
            f"{type(optimizer).__name__}. Expected IVON."
        )
    # JAX builds optimizers also where nothing is trained.
    if not optimizer.built or not int(optimizer.iterations):
        raise ValueError(
            f"The IVON of model '{model.name}' has trained none of its weights "
            "yet (layers that are exchanged, as by `compact_ranks`, begin "
            "anew). Expected a model after `fit`."
        )
    if samples < 1:
        raise ValueError(f"Received samples={samples}. Expected at least 1.")
    activate = keras.activations.get(activation)
    total = 0.0
    with optimizer.mean():
        for _ in range(samples):
            optimizer.sample()
            output = ops.convert_to_tensor(model.predict(x, verbose=0))
            total = total + ops.convert_to_numpy(activate(output))
    return total / samples
