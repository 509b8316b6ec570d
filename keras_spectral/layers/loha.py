"""LoHa: the product, number by number, of two low-rank matrices."""

import math

import keras
from keras import ops

from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter
from keras_spectral.layers.low_rank_pair import LowRankPair

_CONV = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


@register_method("loha")
class LoHaDense(LowRankAdapter):
    """Low-rank Hadamard product: `K' = K + s * (A1 B1) o (A2 B2)`.

    `o` multiplies number by number: the change has a rank of up to rank^2
    for twice a LoRA's weights, `2 rank (n_in + n_out)`. A2 starts at zero, so
    the adapted layer starts as the base, the others uniform in
    +-sqrt(1/n_in) and +-sqrt(1/rank); `s = alpha / rank`.

    It has no thin form: each step builds the changed kernel and runs the
    layer with that, which costs the gradient of a whole kernel. Merged it
    costs nothing.

    With `cp=True` a convolution's offsets have a core T of their own: each
    factor is `sum over i, j of T[.., j, i] A[c, j] B[i, f]`, with A
    (channels x rank), B (rank x filters) and T (kernel sides x rank x rank),
    T2 being zero at the start. That is fewer weights where sides are large.

    Use it where a LoRA of the same size is not expressive enough, as for
    styles of image models.

    Start with a learning rate of 0.01 (Adam; `benchmarks/study.py`).

    Source: Hyeon-Woo et al. 2021, arXiv 2108.06098, propositions 1 and 3;
    as an adapter: the LyCORIS project.

    Args:
        layer: The base: any layer with a kernel of its own that runs in one
            direction.
        rank: Columns of A1 and A2, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        cp: Whether offsets have a core of their own: for convolutions.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            `cp=True` for what is no convolution; a base that no view covers,
            a LowRank pair or a ReversibleEmbedding.

    Example:

    >>> layer = LoHaDense(keras.layers.Dense(64), rank=4)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(32, 4), (4, 64), (32, 4), (4, 64)]
    """

    trains = "two thin pairs, whose products are multiplied"
    one_direction = True
    forms_kernel = True

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        cp: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        self.cp = check_flag(cp, "cp")
        if self.cp and not isinstance(layer, _CONV):
            raise ValueError(
                f"Received cp=True for layer '{layer.name}', a "
                f"{type(layer).__name__}. Expected False: only the kernel of a "
                "convolution has offsets."
            )
        self.seed = check_seed(seed)

    def build_adapter(self):
        if self.cp:
            self._add_cores()
            return
        for name, zero in (("first", False), ("second", True)):
            small = _uniform(self.rank, self.seed, f"{name}_b")
            LowRankPair(
                self,
                self.view,
                self.rank,
                "zeros" if zero else None,
                small,
                name=name,
                seed=self.seed,
            )

    def _add_cores(self):
        *sides, channels, filters = self.layer.kernel.shape
        rank = self.rank
        for name, zero in (("first", False), ("second", True)):
            for end, shape, size in (
                ("a", (channels, rank), channels),
                ("b", (rank, filters), rank),
                ("core", (*sides, rank, rank), math.prod(sides) * rank),
            ):
                own = f"{name}_{end}"
                start = _uniform(size, self.seed, own)
                if zero and end == "core":
                    start = "zeros"
                weight = self.add_weight(
                    name=own, shape=shape, initializer=start
                )
                setattr(self, own, weight)

    def kernel_change(self):
        if not self.cp:
            first = ops.matmul(self.first_a, self.first_b)
            second = ops.matmul(self.second_a, self.second_b)
            return self.view.from_matrix(first * second * self.adapter_scale)
        equation = "...ji,cj,if->...cf"
        first = ops.einsum(
            equation, self.first_core, self.first_a, self.first_b
        )
        second = ops.einsum(
            equation, self.second_core, self.second_a, self.second_b
        )
        return first * second * self.adapter_scale


def _uniform(size, seed, name):
    bound = math.sqrt(1 / size)
    seed = derived_seed(seed, name)
    return keras.initializers.RandomUniform(-bound, bound, seed)
