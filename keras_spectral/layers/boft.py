"""BOFT: rotations in butterfly order, and a factor for each output."""

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.linalg import cayley
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.oft import check_divides
from keras_spectral.layers.rotations import turned


@register_method("boft")
class BOFTDense(KernelAdapter):
    """Butterfly orthogonal fine-tuning: `K' = (R_m .. R_1) K diag(g)`.

    Each `R_i = P_i blockdiag(..) P_i^T` turns blocks of b inputs, which P_i
    has brought together: it cuts inputs into runs of b 2^(i-1), each run into
    groups of b / 2, and takes the even groups of a run before the odd ones. A
    block is `(I - Q) (I + Q)^-1` with `Q = (D - D^T) / 2`. D (m x n_in/b x b
    x b) starts at zero and g (n_out) at one, so the adapted layer starts as
    the base.

    Two factors mix 2 b inputs where one mixes b. In this order, which is that
    of the authors' code and of HF PEFT, further factors join the same groups
    once more and mix no others.

    Each step builds the turned kernel, which costs the gradient of a whole
    kernel. Rows are taken channel by channel, as in OFTDense. A quantised
    base is read dequantised at each step.

    Start with a learning rate of 0.03 (Adam; `benchmarks/study.py` tried no
    higher one).

    Source: Liu et al. 2023, arXiv 2311.06243, section 4.

    Args:
        layer: The base: any layer with a kernel of its own, in which each
            column makes one output, that runs in one direction.
        block_size: b, an even number; n_in / b is even too if `factors` is 2
            or more.
        factors: m; b 2^(m-1) divides n_in.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; sizes that do not fit n_in; a base that no
            view covers, a transposed convolution, a LowRank pair or a
            ReversibleEmbedding.

    Example:

    >>> layer = BOFTDense(keras.layers.Dense(6), block_size=4, factors=2)
    >>> outputs = layer(keras.ops.ones((2, 16)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(2, 4, 4, 4), (6,)]
    """

    trains = "rotations in butterfly order, a factor for each output"
    one_direction = True
    scales_columns = True
    reads_kernel = True
    forms_kernel = True

    def __init__(
        self,
        layer: keras.layers.Layer,
        block_size: int = 4,
        factors: int = 1,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.block_size = check_rank(block_size, "block_size")
        if self.block_size % 2:
            raise ValueError(
                f"Received block_size={block_size}. Expected an even number."
            )
        self.factors_count = check_rank(factors, "factors")

    def options(self):
        return {"block_size": self.block_size, "factors": self.factors_count}

    def build_adapter(self):
        size, count = self.block_size, self.factors_count
        n_in = self.view.n_in
        check_divides(self, size)
        if count > 1 and n_in % (size * 2 ** (count - 1)):
            raise ValueError(
                f"Received block_size={size}, factors={count} for layer "
                f"'{self.name}', whose kernel has {n_in} rows. Expected "
                f"block_size * 2^(factors - 1) = {size * 2 ** (count - 1)} to "
                "divide them: take fewer factors or smaller blocks."
            )
        self.orders = [butterfly(n_in, size, i) for i in range(count)]
        self.boft_d = self.add_weight(
            name="boft_d",
            shape=(count, n_in // size, size, size),
            initializer="zeros",
        )
        self.gains = self.add_weight(
            name="gains", shape=(self.view.n_out,), initializer="ones"
        )

    def delta_matrix(self):
        kernel = self.view.matrix()
        rows = start = self.view.by_channel(kernel)
        turns = ops.cast(cayley(self.unless_off(self.boft_d)), kernel.dtype)
        for i, order in enumerate(self.orders):
            # The first factor's order is that of the inputs.
            rows = ops.take(rows, order, axis=0) if i else rows
            rows = turned(rows, turns[i])
            rows = ops.take(rows, np.argsort(order), axis=0) if i else rows
        gains = ops.cast(self.gains, kernel.dtype)
        return self.view.by_offset(rows * gains - start)

    def kernel_change(self):
        return self.view.from_matrix(self.delta_matrix())


def butterfly(n_in: int, size: int, number: int) -> np.ndarray:
    """The order in which factor `number` (from 0) takes its inputs.

    Runs of `size 2^number` inputs are cut into groups of `size / 2`; of each
    run come the even groups first, then the odd ones.
    """
    run = size * 2**number
    groups = np.arange(n_in).reshape(n_in // run, -1, size // 2)
    order = np.concatenate([groups[:, ::2], groups[:, 1::2]], axis=1)
    return order.ravel().astype("int32")
