"""OFT: rotations of a kernel's inputs, block by block."""

import math

import keras
from keras import ops

from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.linalg import cayley
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.rotations import cayley_series
from keras_spectral.layers.rotations import rotated
from keras_spectral.layers.rotations import skew
from keras_spectral.layers.rotations import turned


@register_method("oft")
class OFTDense(KernelAdapter):
    """Orthogonal fine-tuning: `K' = R K`, run as `base(x R)`.

    R is block-diagonal over the inputs: blocks of b x b, each the rotation
    `R_i = (I - Q_i) (I + Q_i)^-1` of a skew matrix Q_i. What trains is the
    upper triangles of the Q_i, n_in (b - 1) / 2 numbers, which start at zero,
    so the adapted layer starts as the base. The angles between the kernel's
    columns, and their lengths, stay as they are.

    On Dense and EinsumDense it turns inputs, which is cheap. Elsewhere each
    step builds the turned kernel, which costs the gradient of a whole kernel:
    rows are taken channel by channel, the offsets of one side by side.

    With `eps` the rotations stay near none (COFT): each Q_i is shrunk to a
    Frobenius norm of at most `eps / sqrt(blocks)`.

    Use it where a model must keep what it knows, as image models do when
    they learn one more subject.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Qiu et al. 2023, arXiv 2306.07280, section 4; the series:
    Qiu et al. 2025, arXiv 2506.19847.

    Args:
        layer: The base: any layer with a kernel of its own that runs in one
            direction, and Dense or EinsumDense pairs.
        block_size: b, which divides n_in.
        eps: Largest rotation, in sum, above 0; None for no limit.
        block_share: Whether all blocks of a layer are one.
        neumann_terms: 0 for the exact rotation. Else, 2 or more, as many
            terms of a series that is cheaper and only nearly orthogonal;
            HF PEFT takes 5 by default. It turns the other way.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a `block_size` that does not divide n_in; a
            base that no view covers, or a ReversibleEmbedding.

    Example:

    >>> layer = OFTDense(keras.layers.Dense(64), block_size=8)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(4, 28)]
    """

    trains = "rotations of blocks of inputs"
    one_direction = True
    reads_kernel = True

    def __init__(
        self,
        layer: keras.layers.Layer,
        block_size: int = 32,
        eps: float | None = None,
        block_share: bool = False,
        neumann_terms: int = 0,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.block_size = check_rank(block_size, "block_size")
        if self.block_size < 2:
            raise ValueError(
                f"Received block_size={block_size}. Expected at least 2: "
                "nothing would turn."
            )
        self.eps = None if eps is None else check_number(eps, "eps", 1e-12)
        self.block_share = check_flag(block_share, "block_share")
        self.neumann_terms = check_whole(neumann_terms, "neumann_terms", 0)
        if self.neumann_terms == 1:
            raise ValueError(
                "Received neumann_terms=1. Expected 0 for the exact rotation, "
                "or at least 2."
            )

    @property
    def changes_inputs(self):
        return self.view.pointwise

    @property
    def forms_kernel(self):
        return not self.view.pointwise

    def build_adapter(self):
        size = self.block_size
        check_divides(self, size)
        blocks = 1 if self.block_share else self.view.n_in // size
        self.oft_q = self.add_weight(
            name="oft_q",
            shape=(blocks, size * (size - 1) // 2),
            initializer="zeros",
        )

    def rotations(self):
        """The blocks of R (blocks, b, b)."""
        q = skew(self.unless_off(self.oft_q))
        if self.eps is not None:
            limit = self.eps / math.sqrt(q.shape[0])
            square = ops.sum(ops.square(q), axis=(1, 2), keepdims=True)
            # The root of 0 has no gradient.
            q = q * limit / ops.sqrt(ops.maximum(square, limit**2))
        if self.neumann_terms:
            return cayley_series(q, self.neumann_terms)
        return cayley(q)

    def input_change(self, inputs):
        rows = self.view.flat(inputs)
        turns = ops.cast(self.rotations(), inputs.dtype)
        return self.view.unflat(rotated(rows, turns) - rows, inputs)

    def delta_matrix(self):
        kernel = self.view.matrix()
        rows = self.view.by_channel(kernel)
        turns = ops.cast(self.rotations(), kernel.dtype)
        return self.view.by_offset(turned(rows, turns) - rows)

    def kernel_change(self):
        return self.view.from_matrix(self.delta_matrix())


def check_divides(adapter, size):
    """Raises a ValueError unless blocks of a size fill a kernel's rows."""
    n_in = adapter.view.n_in
    if n_in % size:
        near = [n for n in range(2, n_in + 1) if n_in % n == 0]
        best = sorted(near, key=lambda n: abs(n - size))[:2]
        raise ValueError(
            f"Received block_size={size} for layer '{adapter.name}', whose "
            f"kernel has {n_in} rows. Expected a divisor, such as "
            f"{' or '.join(map(str, sorted(best)))}; give this layer its own "
            "with `overrides`, or exclude it."
        )
