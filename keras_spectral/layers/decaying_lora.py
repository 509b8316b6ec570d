"""DecayingLoRA: a low-rank pair takes over while the original fades."""

import math

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter
from keras_spectral.layers.low_rank_pair import LowRankPair
from keras_spectral.layers.low_rank_pair import lora_start

_MOST_STEPS = 2**31  # steps are counted in int32
_SMALLEST = 1e-3  # where an exponential decay to 0 is cut off


@register_method("decaying_lora")
class DecayingLoRA(LowRankAdapter):
    """Weight transfer: `y = d(t) base(x) + (alpha / rank) x A B`.

    The factor d falls from 1 at `start_step` to `min_decay` at `end_step`,
    counted in training steps (calls with `training=True`) inside the layer.
    So the pair A (n_in x rank), B (rank x n_out) slowly takes over the
    layer's whole work, and the original kernel can be thrown away: what is
    left is a factorised layer with `rank (n_in + n_out)` weights. The base's
    bias stays, unless `decay_bias`.

    With `initializer="svd"` the pair starts as the kernel's own truncated
    SVD. `residual="truncated"` then lets only the rest of the kernel fade,
    `y = d (base(x) - s x A0 B0) + s x A B`, so the adapted layer starts as
    the base exactly; `residual="full"` fades the whole kernel beside the
    pair, and starts from `base(x) + s x A0 B0`.

    Use it to make a model smaller while it trains. Merging folds `d K + s A
    B` into the kernel, whatever d is at the time.

    Source: the decay is of this project (`benchmarks/transfer.py`); the SVD
    start after PiSSA, arXiv 2404.02948.

    Args:
        layer: The base layer: any kind that LoRADense takes.
        rank: Columns of A, 1 to min(n_in, n_out).
        alpha: Strength of the pair, not 0; `s = alpha / rank`. Defaults to
            `rank`.
        start_step: Training step at which the decay begins, at least 0.
        end_step: Training step at which it ends, after `start_step`.
        min_decay: What d ends at, 0 <= min_decay < 1.
        schedule: `"linear"`, `"cosine"` or `"exponential"`. An exponential
            decay to 0 falls to 1e-3 and then drops to 0.
        initializer: `"svd"`, `"fan_in"` (A uniform in +-sqrt(1/n_in), B in
            +-sqrt(1/rank)) or `"zeros"` (B zero; A alone trains slowly once
            the original is gone).
        residual: `"truncated"` or `"full"`; the same but for
            `initializer="svd"`.
        inference: What `training=False` returns: `"current"`, the sum as it
            is now, or `"adapter"`, the pair without the original.
        decay_bias: Whether the base's bias fades as well.
        seed: Integer seed of the start.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean; True counts as one step. A layer that a model
            calls twice in a step counts twice.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            a base that no view covers, or a ReversibleEmbedding.

    Example:

    >>> layer = DecayingLoRA(keras.layers.Dense(8), rank=4, end_step=2)
    >>> layer.build((None, 16))
    >>> factors = []
    >>> for _ in range(3):
    ...     factors.append(layer.decay_factor())
    ...     outputs = layer(keras.ops.ones((2, 16)), training=True)
    >>> factors
    [1.0, 0.5, 0.0]
    """

    default_target = "all-linear"
    one_direction = True
    needs_outputs = True
    trains = "a thin pair that takes over while the kernel fades"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        start_step: int = 0,
        end_step: int = 1000,
        min_decay: float = 0.0,
        schedule: str = "linear",
        initializer: str = "svd",
        residual: str = "truncated",
        inference: str = "current",
        decay_bias: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        _check_steps(start_step, end_step)
        check_choice(schedule, "schedule", tuple(_SCHEDULES))
        check_choice(initializer, "initializer", ("svd", "fan_in", "zeros"))
        check_choice(residual, "residual", ("truncated", "full"))
        check_choice(inference, "inference", ("current", "adapter"))
        self.start_step = int(start_step)
        self.end_step = int(end_step)
        self.min_decay = check_number(min_decay, "min_decay", 0, 1)
        self.schedule = schedule
        self.initializer = initializer
        self.residual = residual
        self.inference = inference
        self.decay_bias = check_flag(decay_bias, "decay_bias")
        self.seed = check_seed(seed)

    def triplets_needed(self, view):
        return self.rank if self.initializer == "svd" else 0

    def build_adapter(self):
        self.pair = LowRankPair(
            self,
            self.view,
            self.rank,
            *self._start(),
            keeps_start=self._keeps_start,
        )
        self.step = self.add_weight(
            name="step",
            shape=(),
            initializer="zeros",
            trainable=False,
            dtype="int32",
        )
        alone = float(self.inference == "adapter")
        self.alone = self.add_weight(
            name="alone",
            shape=(),
            initializer=keras.initializers.Constant(alone),
            trainable=False,
        )

    def change(self, inputs, outputs, training=None, **kwargs):
        training = is_training(training) and self.trainable
        decay = self._decay(training)
        if training:
            self.step.assign_add(1)
        fading = outputs
        bias = self.view.bias(outputs)
        if bias is not None and not self.decay_bias:
            fading = outputs - bias
        a, b = (ops.cast(x, self.compute_dtype) for x in self._pair(decay))
        pair = ops.cast(self.view.apply(inputs, a, b, **kwargs), outputs.dtype)
        return pair - fading * ops.cast(1 - decay, outputs.dtype)

    def decay_factor(self) -> float:
        """The original's factor in the next training step."""
        return float(self._schedule())

    def delta_matrix(self):
        decay = self._decay(False)
        a, b = self._pair(decay)
        kernel = self.view.matrix()
        pair = ops.cast(ops.matmul(a, b), kernel.dtype)
        return pair - ops.cast(1 - decay, kernel.dtype) * kernel

    def bias_change(self):
        bias = getattr(self.layer, "bias", None)
        if bias is None or not self.decay_bias:
            return None
        return bias * (self._decay(False) - 1)

    @property
    def _keeps_start(self):
        return self.initializer == "svd" and self.residual == "truncated"

    def _pair(self, decay):
        """A and B in full strength, the fading start included."""
        a, b = self.pair.factors(decay)
        return a, b * self.adapter_scale

    def _schedule(self):
        length = self.end_step - self.start_step
        step = ops.cast(self.step, "float32") - self.start_step
        share = ops.clip(step / length, 0.0, 1.0)
        factor = _SCHEDULES[self.schedule](share, self.min_decay)
        return ops.where(share < 1, factor, self.min_decay)

    def _decay(self, training):
        decay = self._schedule()
        if not training:
            decay = decay * (1 - self.alone)
        return decay

    def _start(self):
        view = self.view
        if self.initializer == "svd":
            scale = abs(self.initial_scale())
            sign = math.copysign(1.0, self.alpha)
            return self.from_triplets(
                self.rank,
                lambda u, s, v: u * ops.sqrt(s / scale),
                lambda u, s, v: sign * ops.transpose(v * ops.sqrt(s / scale)),
            )
        a = lora_start(view, derived_seed(self.seed, "lora_a"))
        if self.initializer == "zeros":
            return a, "zeros"
        bound = math.sqrt(1 / self.rank)
        seed = derived_seed(self.seed, "lora_b")
        return a, keras.initializers.RandomUniform(-bound, bound, seed)


def _exponential(share, low):
    return ops.power(max(low, _SMALLEST), share)


_SCHEDULES = {
    "linear": lambda share, low: 1 - (1 - low) * share,
    "cosine": lambda share, low: (
        low + (1 - low) * (1 + ops.cos(math.pi * share)) / 2
    ),
    "exponential": _exponential,
}


def _check_steps(start, end):
    for name, value in (("start_step", start), ("end_step", end)):
        check_whole(value, name, 0, _MOST_STEPS)
    if end <= start:
        raise ValueError(
            f"Received start_step={start}, end_step={end}. Expected an end "
            "after the start; to keep the original, use LoRADense."
        )
