"""LoKr: a Kronecker product of two small matrices."""

import math

import keras
from keras import ops

from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.kernels import KernelView
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter


@register_method("lokr")
class LoKrDense(LowRankAdapter):
    """Low-rank Kronecker product: `K' = K + s * kron(W1, W2)`.

    The kernel's n_in = i1 i2 rows and n_out = o1 o2 columns are split in two
    factors each: W1 is i1 x o1, W2 is i2 x o2. The larger one, W2, is a pair
    of `rank` where that is smaller (rank < max(i2, o2) / 2), W1 likewise
    with `decompose_both`. W1, or its second factor, starts at zero, so the
    adapted layer starts as the base; all else is uniform in +-sqrt(1/size).
    `s = alpha / rank`. In a convolution the input's channels are split, and
    W2 has the offsets.

    On Dense and EinsumDense it runs as two small products, of inputs seen as
    (.., i1, i2). Elsewhere each step builds the changed kernel, which costs
    the gradient of a whole kernel.

    Use it where LoRA of rank 1 is still too large: the change has the rank of
    W1 times that of W2.

    Start with a learning rate of 0.01 (Adam; `benchmarks/study.py`).

    Source: Yeh et al. 2023, arXiv 2309.14859, section 3 (LyCORIS).

    Args:
        layer: The base: any layer with a kernel of its own that runs in one
            direction.
        rank: Rank of the pairs, at least 1.
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        factor: i1 and o1, where it divides; -1 for the two factors that are
            nearest to each other.
        decompose_both: Whether W1 is a pair as well.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a base that no view covers, a LowRank pair
            of convolutions or a ReversibleEmbedding.

    Example:

    >>> layer = LoKrDense(keras.layers.Dense(64), rank=2)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(4, 8), (8, 2), (2, 8)]
    """

    trains = "the small factors of a Kronecker product"
    one_direction = True

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        factor: int = -1,
        decompose_both: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        self.factor = factor if factor == -1 else check_rank(factor, "factor")
        self.decompose_both = check_flag(decompose_both, "decompose_both")
        self.seed = check_seed(seed)

    @property
    def forms_kernel(self):
        return not self.view.pointwise

    def build_adapter(self):
        shapes = weight_shapes(self.view, **self._split_options())
        # W1 starts at zero, by its second factor if it is a pair.
        zero = "w1" if "w1" in shapes else "w1_b"
        for own, shape in shapes.items():
            bound = math.sqrt(1 / shape[0])
            start = keras.initializers.RandomUniform(
                -bound, bound, derived_seed(self.seed, own)
            )
            weight = self.add_weight(
                name=own,
                shape=shape,
                initializer="zeros" if own == zero else start,
            )
            setattr(self, own, weight)

    def _split_options(self):
        names = ("rank", "factor", "decompose_both")
        return {name: getattr(self, name) for name in names}

    def _matrix(self, name):
        if name in vars(self):
            return ops.convert_to_tensor(getattr(self, name))
        return ops.matmul(
            getattr(self, f"{name}_a"), getattr(self, f"{name}_b")
        )

    def change(self, inputs, outputs, training=None, **kwargs):
        w1, w2 = self._matrix("w1"), self._matrix("w2") * self.adapter_scale
        w1, w2 = (ops.cast(w, self.compute_dtype) for w in (w1, w2))
        rows = self.view.flat(inputs)
        before = ops.shape(rows)[:-1]
        rows = ops.reshape(rows, (*before, w1.shape[0], w2.shape[0]))
        columns = ops.einsum("...io,ik->...ko", ops.matmul(rows, w2), w1)
        columns = ops.reshape(columns, (*before, self.view.n_out))
        return self.view.shaped(columns)

    def delta_matrix(self):
        w1, w2 = self._matrix("w1"), self._matrix("w2")
        matrix = ops.einsum("io,kp->ikop", w1, w2 * self.adapter_scale)
        matrix = ops.reshape(matrix, (self.view.n_in, self.view.n_out))
        return self.view.by_offset(matrix)

    def kernel_change(self):
        return self.view.from_matrix(self.delta_matrix())


def weight_shapes(
    view: KernelView, rank: int, factor: int, decompose_both: bool
) -> dict[str, tuple[int, int]]:
    """The shapes of W1 and W2, or of their pairs, by the weights' names.

    Args:
        view: The kernel that they change.
        rank: See LoKrDense; `factor` and `decompose_both` likewise.
        factor: As there.
        decompose_both: As there.
    """
    offsets = view.n_in // view.channels
    i1, i2 = split(view.channels, factor)
    o1, o2 = split(view.n_out, factor)
    shapes = {}
    for name, rows, columns, may_be_pair, each in (
        ("w1", i1, o1, decompose_both, 1),
        ("w2", i2, o2, True, offsets),
    ):
        if may_be_pair and rank < max(rows, columns) / 2:
            shapes[f"{name}_a"] = (rows * each, rank)
            shapes[f"{name}_b"] = (rank, columns)
        else:
            shapes[name] = (rows * each, columns)
    return shapes


def split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size.

    Args:
        size: What is split.
        factor: The first of the two if it divides the size. Else, as with
            -1, they are as near to each other as they can be, the smaller one
            first and not above `factor`.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = max(n for n in range(1, limit + 1) if size % n == 0)
    return small, size // small
