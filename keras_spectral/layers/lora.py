"""LoRA: a trained low-rank pair beside a frozen kernel."""

import math

import keras
from keras import ops

from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter


@register_method("lora")
class LoRADense(KernelAdapter):
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
    costs a second thin pair.

    Use it as the first thing to try: it is cheap, and it merges exactly.
    Works on Dense, EinsumDense, Conv (then A is a convolution and B a 1x1),
    SeparableConv, transposed convolutions and Embedding.

    Source: Hu et al. 2021, arXiv 2106.09685, equation 3; rsLoRA: Kalajdzievski
    2023, arXiv 2312.03732; PiSSA: Meng et al. 2024, arXiv 2404.02948.

    Args:
        layer: The base layer.
        rank: Columns of A, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        dropout: Share of inputs dropped before A while training, 0 <= p < 1.
        scaling: `"standard"` (alpha/rank) or `"rslora"` (alpha/sqrt(rank)).
        initializer: `"kaiming"` or `"pissa"`.
        seed: Integer seed of A's start and of dropout.
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

    def __init__(
        self,
        layer,
        rank=8,
        alpha=None,
        dropout=0.0,
        scaling="standard",
        initializer="kaiming",
        seed=None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        set_lora_options(self, rank, alpha, dropout, scaling, initializer, seed)

    def triplets_needed(self, view):
        return lora_triplets_needed(self)

    def build_adapter(self):
        add_lora_factors(self)

    def initial_scale(self):
        return lora_scale(self.rank, self.alpha, self.scaling)

    def factors(self):
        return lora_factors(self)


def set_lora_options(adapter, rank, alpha, dropout, scaling, initializer, seed):
    """Checks and keeps the options that LoRA and its relatives share."""
    check_choice(scaling, "scaling", ("standard", "rslora"))
    check_choice(initializer, "initializer", ("kaiming", "pissa"))
    set_rank_and_alpha(adapter, rank, alpha)
    adapter.scaling = scaling
    adapter.initializer = initializer
    adapter.set_dropout(dropout, seed)


def set_rank_and_alpha(adapter, rank, alpha):
    """Checks and keeps a rank and a strength, which defaults to it."""
    adapter.rank = check_rank(rank)
    adapter.alpha = adapter.rank if alpha is None else check_alpha(alpha)


def lora_scale(rank, alpha, scaling):
    return alpha / (math.sqrt(rank) if scaling == "rslora" else rank)


def check_max_rank(adapter):
    """Raises if the adapter's rank is too large for its kernel."""
    view, rank = adapter.view, adapter.rank
    if rank > view.max_rank:
        raise ValueError(
            f"Received rank={rank} for layer '{adapter.name}', whose kernel "
            f"is {view.n_in} x {view.n_out}. Expected at most "
            f"{view.max_rank}; give this layer its own rank with `overrides`, "
            "or exclude it."
        )


def add_lora_factors(adapter):
    """Gives the adapter `lora_a`, `lora_b` and, for PiSSA, their start."""
    check_max_rank(adapter)
    bound = math.sqrt(1 / adapter.view.fan_in)
    seed = derived_seed(adapter.seed, "lora_a")
    a_start = keras.initializers.RandomUniform(-bound, bound, seed)
    b_start = "zeros"
    if adapter.initializer == "pissa":
        a_start, b_start = _pissa_start(adapter)
        add_pair(adapter, "start_a", "start_b", a_start, b_start, False)
    add_pair(adapter, "lora_a", "lora_b", a_start, b_start, True)


def lora_factors(adapter):
    if adapter.initializer != "pissa":
        return adapter.lora_a, adapter.lora_b
    a = ops.concatenate([adapter.lora_a, adapter.start_a], axis=1)
    b = ops.concatenate([adapter.lora_b, -adapter.start_b], axis=0)
    return a, b


def add_pair(adapter, a_name, b_name, a_start, b_start, trainable):
    """Gives the adapter a pair A (n_in x rank), B (rank x n_out)."""
    rank, view = adapter.rank, adapter.view
    for name, shape, start in (
        (a_name, (view.n_in, rank), a_start),
        (b_name, (rank, view.n_out), b_start),
    ):
        variable = adapter.add_weight(
            name=name,
            shape=shape,
            initializer=start,
            trainable=trainable,
        )
        setattr(adapter, name, variable)


def lora_triplets_needed(adapter):
    return adapter.rank if adapter.initializer == "pissa" else 0


def _pissa_start(adapter):
    u, s, v = map(ops.convert_to_tensor, adapter.take_triplets(adapter.rank))
    root = ops.sqrt(s)

    # Fresh tensors each time: two variables must not share one buffer.
    return (
        lambda shape, dtype=None: u * root,
        lambda shape, dtype=None: ops.transpose(v * root),
    )
