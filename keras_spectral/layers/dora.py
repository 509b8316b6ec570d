"""DoRA: LoRA for the directions of a kernel's columns, and their norms."""

import keras
from keras import ops

from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter

_SHORTEST = 1e-6  # what a column's norm is at least taken to be


@register_method("dora")
class DoRADense(LowRankAdapter):
    """Weight-decomposed LoRA: `K' = V diag(m / |V|)`, `V = K + s * A B`.

    |V| holds the norm of each of V's n_out columns, the magnitude m (n_out)
    what it is to be. A (n_in x rank) and B (rank x n_out) start as those of
    LoRADense and m as |K|, so the adapted layer starts as the base. It trains
    `rank * (n_in + n_out) + n_out` numbers. The pair turns the columns, and m
    alone makes them longer or shorter. |V| counts as a constant in the
    backward pass.

    Runs as `base(x)` plus `(c - 1) (x K) + c s * x A B` with c = m / |V|.
    |V| comes from `A^T K` and `A^T A`: each call reads the kernel once more,
    at the cost of `rank` more rows of input, and of n_in rows where the base
    is quantised. Merge it before serving.

    Use it where LoRA of a small rank is not good enough. In a convolution a
    column is all that one output channel is computed from, in an Embedding
    one number of every token. A column of zeros counts as 1e-6 long.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Liu et al. 2024, arXiv 2402.09353, equation 5 and section 4.3
    (the constant). Dropout acts on the thin product alone; the authors' code
    drops inputs in `(c - 1) (x K)` as well, which costs a second run of the
    base.

    Args:
        layer: The base layer: any kind that LoRADense takes, but for
            transposed convolutions.
        rank: Columns of A, 1 to min(n_in, n_out).
        alpha: Strength of the pair, not 0. Defaults to `rank`, so `s = 1`.
        dropout: Share of inputs dropped before A while training, 0 <= p < 1.
        scaling: `"standard"` (alpha/rank) or `"rslora"` (alpha/sqrt(rank)).
        initializer: `"kaiming"` or `"pissa"`, see `LoRADense`.
        seed: Integer seed of A's start and of dropout.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether dropout is active.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            dropout on an Embedding; a base that no view covers, a transposed
            convolution or a ReversibleEmbedding.

    Example:

    >>> layer = DoRADense(keras.layers.Dense(64), rank=4)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(32, 4), (4, 64), (64,)]
    """

    trains = "a thin pair A, B and the norm of each column"
    one_direction = True
    scales_columns = True
    reads_kernel = True
    needs_outputs = True

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "standard",
        initializer: str = "kaiming",
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_lora_options(rank, alpha, dropout, scaling, initializer, seed)

    def build_adapter(self):
        self.pair = self.lora_pair()
        self.kernel_norms = self._add_norms("kernel_norms", self._norms, False)
        # A fresh tensor: two variables must not share one buffer.
        self.magnitude = self._add_norms(
            "magnitude", lambda *_, **__: ops.copy(self.kernel_norms), True
        )

    def _add_norms(self, name, start, trainable):
        return self.add_weight(
            name=name,
            shape=(self.view.n_out,),
            initializer=start,
            trainable=trainable,
        )

    def _norms(self, shape, dtype=None):
        # Read late: in a model that is built by its first `fit` the kernel
        # has no numbers yet.
        kernel = ops.cast(self.view.matrix(), dtype)
        norms = ops.sqrt(ops.sum(ops.square(kernel), axis=0))
        return ops.maximum(norms, _SHORTEST)

    def change(self, inputs, outputs, training=None, **kwargs):
        ratio = self._ratio()
        a, b = self.pair.factors()
        b = b * (self.adapter_scale * ratio)
        a, b = (ops.cast(x, self.compute_dtype) for x in (a, b))
        pair = self.view.apply(self.dropped(inputs, training), a, b)
        bias = self.view.bias(outputs)
        linear = outputs if bias is None else outputs - bias
        linear = linear * self.view.spread(ratio - 1, outputs)
        return linear + ops.cast(pair, outputs.dtype)

    def delta_matrix(self):
        a, b = self.pair.factors()
        kernel = self.view.matrix()
        ratio = ops.cast(self._ratio(), kernel.dtype)
        pair = ops.cast(ops.matmul(a, b * self.adapter_scale), kernel.dtype)
        return kernel * (ratio - 1) + pair * ratio

    def _ratio(self):
        """m / |V|, without a gradient through |V|.

        `|V_j|^2 = |K_j|^2 + B_j^T (2 s A^T K_j + s^2 A^T A B_j)`, relative to
        |K_j|^2: the start, where B is zero, is exact.
        """
        a, b = map(ops.stop_gradient, self.pair.factors())
        b = b * self.adapter_scale
        kernel = ops.cast(self.view.matrix(), "float32")
        # Groups of a convolution have rows of A, and columns of B, apart.
        groups, rank = self.view.groups, a.shape[-1]
        parts = ops.reshape(a, (groups, -1, rank))
        gram = ops.einsum("gik,gil->gkl", parts, parts)
        inner = ops.reshape(b, (rank, groups, -1))
        inner = ops.einsum("gkl,lgo->kgo", gram, inner)
        inner = ops.reshape(inner, (rank, -1))
        inner = inner + 2 * ops.matmul(ops.transpose(a), kernel)
        gained = ops.sum(b * inner, axis=0) / ops.square(self.kernel_norms)
        norms = self.kernel_norms * ops.sqrt(ops.maximum(1 + gained, 1e-12))
        return self.magnitude / norms
