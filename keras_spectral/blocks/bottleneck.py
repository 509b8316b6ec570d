"""BottleneckAdapter: a small two-layer net inside of a transformer block."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_spectral._internal.checks import activation_function
from keras_spectral._internal.checks import activation_name
from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.twin import Detour
from keras_spectral.blocks.block_adapter import BlockAdapter
from keras_spectral.blocks.parts import dense
from keras_spectral.blocks.parts import dense_weights
from keras_spectral.blocks.parts import spread
from keras_spectral.layers.adapter import register_method

PLACEMENTS = ("pfeiffer", "houlsby", "parallel", "post")


@register_method("bottleneck")
class BottleneckAdapter(BlockAdapter):
    """A small trained net in each block: `z + strength * up(f(down(z)))`.

    `down` is a Dense width -> size, f the activation, `up` a Dense
    size -> width that starts at zero, so the block starts as the base.
    What z is says `placement`:

    - `"pfeiffer"`: with a the feed-forward net's residual input,
      `z = LN(ffn(a) + a)` by the block's own norm, and the block ends with
      `LN(ffn(a) + a + strength * up(f(down(z))))`; a pre-LN block has no
      norm there, neither in z nor at its end;
    - `"houlsby"`: the feed-forward net's output before the residual sum and,
      by a second net, the attention's output;
    - `"parallel"`: the feed-forward net's input, and the result joins its
      output: `ffn(z) + strength * up(f(down(z)))`;
    - `"post"`: the block's output.

    `channel_scale=True` multiplies by a trained number for each channel,
    ones at the start; with `placement="post"` and `activation="gelu"` that
    is Adapter+. A net trains `2 * width * size + size + width` numbers, and
    `width` more with `channel_scale`.

    Use it where LoRA on attention is not enough: it is not linear and so
    does more with as many weights, but it cannot be merged and costs time at
    inference.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv
    2005.00247; parallel: He et al. 2021, arXiv 2110.04366; Adapter+: Steitz
    and Roth 2024, arXiv 2406.06820.

    Args:
        layer: The block.
        size: Width of the bottleneck. Defaults to a 16th of the block's.
        placement: `"pfeiffer"`, `"houlsby"`, `"parallel"` or `"post"`.
        activation: f, the name of one of Keras's activations, or a function
            of `keras.activations`, or one that is registered with Keras.
        strength: What the net's output is multiplied by, not 0.
        channel_scale: Whether each channel has a trained strength besides.
        seed: Integer seed of the start of `down`.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the block takes; further arguments go to the block.

    Input shape: the block's. Output shape: the block's.

    Raises:
        ValueError: A bad option; a block of unknown kind; merging.

    Example:

    >>> block = keras.layers.MultiHeadAttention(2, 4, name="attention")
    >>> x = keras.ops.ones((1, 3, 32))
    >>> before = block(x, x)
    >>> layer = BottleneckAdapter(block, placement="post")
    >>> bool(keras.ops.all(layer(x, x) == before))
    True
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(32, 2), (2,), (2, 32), (32,)]
    """

    trains = "a small net in each block, down and up again"

    def __init__(
        self,
        layer: keras.layers.Layer,
        size: int | None = None,
        placement: str = "pfeiffer",
        activation: str | Callable[[Any], Any] = "relu",
        strength: float = 1.0,
        channel_scale: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        if size is not None:
            size = check_rank(size, "size")
        self.size = size
        self.placement = check_choice(placement, "placement", PLACEMENTS)
        self.activation = activation_name(activation)
        self.strength = check_alpha(strength, "strength")
        self.channel_scale = check_flag(channel_scale, "channel_scale")
        self.seed = check_seed(seed)

    def initial_scale(self):
        return self.strength

    def build_adapter(self):
        width = self.view.width
        size = self.size or max(1, width // 16)
        options = (size, self.activation, self.channel_scale, self.seed)
        self.net = Bottleneck(self, "adapter", *options)
        if self.placement == "houlsby":
            self.attention_net = Bottleneck(self, "attention", *options)
        if self.placement != "post":
            self.view.slot("last")  # raises where there is none

    def detours(self, run):
        def strength(z):
            return self.amount

        if self.placement == "post":
            return []
        if self.placement == "pfeiffer":
            return self.net.around_norm(self.view.norm, strength)
        first, last = self.view.slot("first"), self.view.slot("last")
        if self.placement == "parallel":
            return self.net.beside(first, last, strength)
        output = self.view.slot("output")
        found = self.net.after(last, strength)
        return found + self.attention_net.after(output, strength)

    def end(self, outputs, run):
        pre_norm = self.placement == "pfeiffer" and self.view.norm is None
        if self.placement != "post" and not pre_norm:
            return outputs
        return self.net.at_end(outputs, lambda z: self.amount)


class Bottleneck:
    """The net `up(f(down(z)))`; zero at the start."""

    def __init__(
        self, adapter, name, size, activation="relu", channels=False, seed=None
    ):
        width = adapter.view.width
        self.size = size
        self.activation = activation_function(activation)
        start = keras.initializers.GlorotUniform(
            derived_seed(seed, f"{name}_down_kernel")
        )
        self.down = dense_weights(adapter, f"{name}_down", width, size, start)
        self.up = dense_weights(adapter, f"{name}_up", size, width, "zeros")
        self.channels = None
        if channels:
            self.channels = adapter.add_weight(
                name=f"{name}_channels", shape=(width,), initializer="ones"
            )

    def __call__(self, z):
        outputs = dense(self.activation(dense(z, *self.down)), *self.up)
        if self.channels is not None:
            outputs = outputs * ops.cast(self.channels, outputs.dtype)
        return outputs

    def added(self, z, strength):
        """What joins an output: `strength * net(z)`, zero if that is 0."""
        strength = spread(strength, z)
        on = ops.not_equal(strength, 0)
        return ops.where(on, self(z) * strength, ops.zeros((), z.dtype))

    def after(self, slot, strength) -> list[Detour]:
        """Joins the output of a piece: `z + strength(z) * net(z)`."""

        def joined(original, *args, **kwargs):
            z = original(*args, **kwargs)
            return z + self.added(z, strength(z))

        return [(slot, joined)]

    def around_norm(self, slot, strength) -> list[Detour]:
        """Joins the sum before a norm, computed from the norm's output."""

        def joined(original, total, *args, **kwargs):
            z = original(total, *args, **kwargs)
            more = self.added(z, strength(z))
            return original(total + more, *args, **kwargs)

        return [] if slot is None else [(slot, joined)]

    def at_end(self, outputs, strength):
        """Joins a block's outputs, or the first of several."""
        several = isinstance(outputs, tuple)
        z, *rest = outputs if several else [outputs]
        z = z + self.added(z, strength(z))
        return (z, *rest) if several else z

    def beside(self, first, last, strength) -> list[Detour]:
        """Joins the output of `last`, computed from the input of `first`."""
        seen = []

        def see(original, z, *args, **kwargs):
            seen.append(z)
            return original(z, *args, **kwargs)

        def joined(original, *args, **kwargs):
            outputs, z = original(*args, **kwargs), seen.pop()
            return outputs + self.added(z, strength(z))

        return [(first, see), (last, joined)]
