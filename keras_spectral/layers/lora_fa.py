"""LoRA-FA: a LoRA whose first factor is frozen."""

import keras
from keras import ops

from keras_spectral._backend import solve_positive
from keras_spectral._internal.checks import check_flag
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter
from keras_spectral.layers.low_rank_pair import LowRankPair

_RIDGE = 1e-8


@register_method("lora_fa")
class LoRAFADense(LowRankAdapter):
    """LoRA with a frozen A: `y = base(x) + s * x A B`, B alone trains.

    A (n_in x rank) is drawn as LoRA's and stays, B (rank x n_out) starts at
    zero: `rank * n_out` weights, and of each input only the codes x A are
    kept for the backward pass, not x itself. As A B moves in a subspace, B's
    gradient g becomes `(s^2 (A^T A + 1e-8 I))^-1 g`, with which a step moves
    A B as near as it can to a step of the whole kernel; the optimizer sees
    that gradient.

    Use it where memory for activations is short.

    Start with a learning rate of 0.01 (Adam; `benchmarks/study.py`).

    Source: Zhang et al. 2023, arXiv 2308.03303; the gradient: HF PEFT's
    optimizer for it, after Wang et al. 2024, arXiv 2407.18242.

    Args:
        layer: The base layer; any kind that LoRADense takes.
        rank: Columns of A, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        project: Whether B's gradient is corrected; with False it is LoRA's.
        dropout: Share of inputs dropped before A while training, 0 <= p < 1.
        seed: Integer seed of A and of dropout.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether dropout is active.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            dropout on an Embedding; a base that no view covers.

    Example:

    >>> layer = LoRAFADense(keras.layers.Dense(64), rank=4)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(4, 64)]
    """

    trains = "the second factor of a thin pair"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        project: bool = True,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        self.project = check_flag(project, "project")
        self.set_dropout(dropout, seed)

    def build_adapter(self):
        self.pair = LowRankPair(
            self, self.view, self.rank, seed=self.seed, trains="b"
        )

    def factors(self):
        return self.pair.factors()

    def factors_of_step(self, training):
        a, b = self.factors()
        if not self.project:
            return a, b
        gram = ops.matmul(ops.transpose(a), a) + _RIDGE * ops.eye(self.rank)
        gram = gram * ops.square(self.adapter_scale)
        # B to the last bit, with another gradient.
        still = ops.stop_gradient(ops.convert_to_tensor(b))
        return a, still + solve_positive(gram, b - still)
