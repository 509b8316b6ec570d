"""RED: the outputs of blocks scaled and shifted."""

import keras
from keras import ops

from keras_spectral.blocks.block_adapter import BlockAdapter
from keras_spectral.layers.adapter import register_method


@register_method("red")
class RED(BlockAdapter):
    """Edits what a block gives: `y = block(x) * g + h`.

    Each channel has a factor g, which starts at one, and a shift h, which
    starts at zero: 2 width numbers a block, and the block starts as the base.
    It is `SSF` at the end of a block, where it cannot be merged.

    Use it where even a LoRA of rank 1 is too much.

    Start with a learning rate of 0.01 (Adam; `benchmarks/study.py`).

    Source: Wu et al. 2024, arXiv 2402.15179, equation 2.

    Args:
        layer: The block.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the block takes; further arguments go to the block.

    Input shape: the block's. Output shape: the block's.

    Raises:
        ValueError: A block of unknown kind; merging.

    Example:

    >>> block = keras.layers.MultiHeadAttention(2, 4, name="attention")
    >>> x = keras.ops.ones((1, 3, 32))
    >>> before = block(x, x)
    >>> layer = RED(block)
    >>> bool(keras.ops.all(layer(x, x) == before))
    True
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(32,), (32,)]
    """

    trains = "a factor and a shift for each channel of a block's output"

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        super().__init__(layer, **kwargs)

    def build_adapter(self):
        shape = (self.view.width,)
        self.gains = self.add_weight(
            name="gains", shape=shape, initializer="ones"
        )
        self.shifts = self.add_weight(
            name="shifts", shape=shape, initializer="zeros"
        )

    def detours(self, run):
        return []

    def end(self, outputs, run):
        several = isinstance(outputs, tuple)
        z, *rest = outputs if several else [outputs]
        gains, shifts = (
            ops.cast(x, z.dtype) for x in (self.gains - 1, self.shifts)
        )
        amount = ops.cast(self.amount, z.dtype)
        on = ops.not_equal(amount, 0)
        change = ops.where(on, amount * (z * gains + shifts), 0)
        z = z + ops.cast(change, z.dtype)
        return (z, *rest) if several else z
