"""LoRA: a trained low-rank pair beside a frozen kernel."""

from typing import Any

import keras

from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter
from keras_spectral.layers.starts import LOADED


@register_method("lora")
class LoRADense(LowRankAdapter):
    """Low-rank adaptation of a linear layer: `y = base(x) + s * x A B`.

    A (n_in x rank) starts uniform in +-sqrt(1/n_in), B (rank x n_out) starts
    at zero, so the adapted layer starts as the base. It trains exactly
    `rank * (n_in + n_out)` numbers. `s` is `alpha / rank`, or
    `alpha / sqrt(rank)` with `scaling="rslora"`, which keeps the size of the
    update when the rank grows.

    With `initializer="pissa"` the pair starts as the kernel's own first
    singular triplets, A = U sqrt(S) and B = sqrt(S) V^T over `rank` of them,
    and `y = base(x) + s * x (A B - A0 B0)` with the start A0, B0 kept frozen.
    That is training inside a kernel `K - s A0 B0`, while the base's own
    kernel is never touched. It learns faster than a start from zero and
    costs a second thin pair. Its singular values are divided by s, so that
    what trains is the kernel's own first part.

    Further starts: `"olora"`, the first columns and rows of `K^T = Q R` in
    the place of singular vectors; `"orthogonal"`, both factors random with
    `A B = 0` (an even rank); `"mica"`, B frozen at the kernel's last right
    singular vectors while A starts at zero.

    Starts that look at data are given it by `wrap_model`. With
    `calibration=calibrate(model, dataset)`: `"eva"`, A's columns are the
    principal components of the layer's inputs, so that B begins where inputs
    vary (`overrides=calibration.ranks(8)` gives each layer its rank);
    `"corda"`, as PiSSA but with the first triplets of `C K`, C being the mean
    of x^T x, so that what trains is what these data use, and `"corda_kpm"`,
    with the last ones, so that it is kept. With `original=float_model` on a
    quantised model `"loftq"`: A B is the best pair of its rank for what
    quantisation took away, so the adapted layer starts nearer to the original
    than the base. With `gradients=kernel_gradients(model, dataset)`
    `"lora_ga"`: of the gradient's singular vectors A takes the left ones 1 to
    r and B the right ones r + 1 to 2 r, times `n_out^(1/4) / 4`, so that the
    first step of gradient descent moves the kernel along the gradient's best
    part of rank 2 r.

    Use it as the first thing to try: it is cheap, and it merges exactly.
    Works on Dense, EinsumDense, Conv (then A is a convolution and B a 1x1),
    SeparableConv, transposed convolutions and Embedding.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Hu et al. 2021, arXiv 2106.09685, equation 3; rsLoRA: Kalajdzievski
    2023, arXiv 2312.03732; PiSSA: Meng et al. 2024, arXiv 2404.02948; OLoRA:
    Buyukakyuz 2024, arXiv 2406.01775; EVA: Paischer et al. 2024, arXiv
    2410.07170; CorDA: Yang et al. 2024, arXiv 2406.05223; LoftQ: Li et al.
    2023, arXiv 2310.08659; LoRA-GA: Wang et al. 2024, arXiv 2407.05000;
    orthogonal and MiCA as in HF PEFT.

    Args:
        layer: The base layer.
        rank: Columns of A, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        dropout: Share of inputs dropped before A while training, 0 <= p < 1.
        scaling: `"standard"` (alpha/rank) or `"rslora"` (alpha/sqrt(rank)).
        initializer: `"kaiming"`, `"pissa"`, `"olora"`, `"orthogonal"`,
            `"mica"`, `"eva"`, `"corda"`, `"corda_kpm"`, `"loftq"` or
            `"lora_ga"`.
        seed: Integer seed of A's start and of dropout.
        start_data: What a start is given: `Moments`, or as a matrix
            (n_in x n_out) the float kernel or its gradient. `wrap_model` sees
            to it.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether dropout is active.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            dropout on an Embedding; a base that no view covers.

    Example:

    >>> layer = LoRADense(keras.layers.Dense(64, activation="relu"), rank=4)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> sum(w.shape[0] * w.shape[1] for w in layer.trainable_weights)
    384
    """

    trains = "the thin pair A, B"
    takes_data = True

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "standard",
        initializer: str = "kaiming",
        seed: int | None = None,
        start_data: Any = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_lora_options(rank, alpha, dropout, scaling, initializer, seed)
        self.set_start_data(start_data)

    def options(self):
        options = super().options()
        data = options.pop("start_data")
        return options if data is None else {**options, "start_data": LOADED}

    def build_adapter(self):
        self.pair = self.lora_pair()

    def factors(self):
        return self.pair.factors()
