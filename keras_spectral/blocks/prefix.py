"""PrefixTuning: trained keys and values before those of the tokens."""

import inspect

import keras
from keras import ops

from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.twin import Detour
from keras_spectral._internal.twin import rerouted_base
from keras_spectral.blocks.block_adapter import BlockAdapter
from keras_spectral.blocks.parts import dense
from keras_spectral.blocks.parts import dense_weights
from keras_spectral.layers.adapter import register_method

_STDDEV = 0.02


@register_method("prefix")
class PrefixTuning(BlockAdapter):
    """Trained tokens that each block's self-attention sees besides its own.

    `attention(Q, [P_k; K], [P_v; V])` with trained keys P_k (length x n_key)
    and values P_v (length x n_value), the same for all examples. Every query
    sees all of them, whatever masks the tokens have; positions (rotary,
    relative) do not touch them. They are no part of a cache, so `generate`
    needs nothing special.

    With `hidden`, P_k and P_v are computed from a trained prompt P
    (length x width) by a net: `[P_k, P_v] = Dense(tanh(Dense(P)))` with
    `hidden` units inside. That trains more steadily and trains far more
    weights.

    The adapted model does not start as the base, because even small keys
    take attention from the tokens.

    Use it where many tasks share one model: it leaves the weights alone and
    costs little time. It cannot be merged.

    Start with a learning rate of 0.1 (Adam; `benchmarks/study.py` tried no
    higher one).

    Source: Li and Liang 2021, arXiv 2101.00190, equations 3 and 5.

    Args:
        layer: The block.
        length: How many trained positions, at least 1.
        hidden: Units of the net; None trains keys and values themselves.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the block takes; further arguments go to the block.

    Input shape: the block's. Output shape: the block's.

    Raises:
        ValueError: A bad option; a block of unknown kind; merging.

    Example:

    >>> block = keras.layers.MultiHeadAttention(2, 4, name="attention")
    >>> x = keras.ops.ones((1, 3, 8))
    >>> outputs = block(x, x)
    >>> layer = PrefixTuning(block, length=5)
    >>> tuple(layer(x, x).shape)
    (1, 3, 8)
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(5, 16)]
    """

    trains = "keys and values that stand before those of the tokens"

    def __init__(
        self,
        layer: keras.layers.Layer,
        length: int = 10,
        hidden: int | None = None,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        if hidden is not None:
            hidden = check_rank(hidden, "hidden")
        self.length = check_rank(length, "length")
        self.hidden = hidden
        self.seed = check_seed(seed)

    def build_adapter(self):
        self.prefix = Prefix(
            self, "prefix", self.length, self.hidden, self.seed
        )

    def detours(self, run):
        strength = self.adapter_strength
        return self.prefix.detours(
            self.view, lambda: strength, lambda: strength
        )


class Prefix:
    """The weights of a prefix, and its way into a block's attention.

    Args:
        adapter: Gets the weights; its view is a `BlockView`.
        name: Start of their names.
        length: Positions.
        hidden: Units of the net that computes them, or None.
        seed: Integer seed of the starts.
    """

    def __init__(self, adapter, name, length, hidden=None, seed=None):
        view = adapter.view
        self.length = length
        self.sizes = [view.linear(x).n_out for x in ("key", "value")]
        self.hidden = hidden
        width = sum(self.sizes) if hidden is None else view.width
        self.rows = adapter.add_weight(
            name=f"{name}_rows",
            shape=(length, width),
            initializer=keras.initializers.RandomNormal(
                0.0, _STDDEV, derived_seed(seed, f"{name}_rows")
            ),
        )
        if hidden is not None:
            start = keras.initializers.GlorotUniform
            shapes = ((width, hidden), (hidden, sum(self.sizes)))
            self.down, self.up = (
                dense_weights(
                    adapter,
                    f"{name}_{x}",
                    *shape,
                    start(derived_seed(seed, f"{name}_{x}_kernel")),
                )
                for x, shape in zip(("down", "up"), shapes)
            )

    def keys_and_values(self):
        """Tensors (length, n_key) and (length, n_value), float32."""
        rows = ops.convert_to_tensor(self.rows)
        if self.hidden is not None:
            rows = dense(ops.tanh(dense(rows, *self.down)), *self.up)
        return rows[:, : self.sizes[0]], rows[:, self.sizes[0] :]

    def detours(self, view, strength, shown) -> list[Detour]:
        """Puts the prefix into the self-attention of a block.

        Args:
            view: The `BlockView`.
            strength: Gives what keys and values are multiplied by: a number
                or a tensor (batch,).
            shown: Gives whether the prefix is there at all: not zero, () or
                (batch,).
        """
        if view.attention_kind.attend is None:
            return _t5_detours(self, view, strength, shown)
        return _attention_detours(self, view, strength, shown)

    def before(self, key, value, strength, shown):
        """Keys and values (batch, tokens, heads, size) with the prefix."""
        pairs = zip(self.keys_and_values(), (key, value))
        return [_prepended(rows, x, strength, shown) for rows, x in pairs]


def _prepended(rows, x, strength, shown):
    """`[strength * rows; x]` along the tokens.

    Args:
        rows: (length, heads * size), with one or several of x's heads to each
            of these heads.
        x: (batch, tokens, heads, size).
        strength: A number or (batch,).
        shown: The same; where it is 0 the rows are zero, whatever they hold.
    """
    length, size = rows.shape[0], x.shape[-1]
    rows = ops.reshape(rows, (1, length, -1, size))
    rows = ops.repeat(rows, x.shape[2] // rows.shape[2], axis=2)
    strength, shown = (
        ops.reshape(ops.cast(v, "float32"), (-1, 1, 1, 1))
        for v in (strength, shown)
    )
    rows = ops.where(ops.not_equal(shown, 0), rows * strength, 0.0)
    rows = ops.cast(rows, x.dtype)
    batch = ops.shape(x)[0]
    rows = ops.broadcast_to(rows, (batch, *rows.shape[1:]))
    return ops.concatenate([rows, x], axis=1)


def _widened(mask, shown, length):
    """A mask (..., queries, keys) with columns for the prefix before it."""
    shown = ops.cast(ops.not_equal(shown, 0), mask.dtype)
    shown = ops.reshape(shown, (-1, *[1] * (len(mask.shape) - 1)))
    columns = ops.ones_like(mask[..., :1]) * shown
    columns = ops.repeat(columns, length, axis=-1)
    return ops.concatenate([columns, mask], axis=-1)


def _attention_detours(prefix, view, strength, shown):
    """For attention with a method on projected queries, keys and values."""
    owner, kind, length = view.attention, view.attention_kind, prefix.length

    def attend(original, *args, **kwargs):
        call = _signature(original).bind(*args, **kwargs)
        query, key, value = list(call.arguments.values())[:3]
        names = list(call.arguments)[:3]
        mask = call.arguments.get("attention_mask")
        if mask is None:
            sizes = [ops.shape(x)[1] for x in (query, key)]
            mask = ops.ones((ops.shape(query)[0], *sizes), "bool")
            if call.arguments.pop("use_causal_mask", False):
                mask = ops.tril(mask)
        pair = prefix.before(key, value, strength(), shown())
        call.arguments.update(zip(names[1:], pair))
        call.arguments["attention_mask"] = _widened(mask, shown(), length)
        return original(*call.args, **call.kwargs)

    def narrow(original, mask, *args, **kwargs):
        """A sliding window does not slide over the prefix."""
        tokens = original(mask[..., length:], *args, **kwargs)
        columns = ops.cast(mask[..., :length], tokens.dtype)
        columns = ops.broadcast_to(columns, (*ops.shape(tokens)[:-1], length))
        return ops.concatenate([columns, tokens], axis=-1)

    def score(original, *args, **kwargs):
        """Scores by position are none for the prefix."""
        call = _signature(original).bind(*args, **kwargs)
        call.arguments["key"] = call.arguments["key"][:, length:]
        scores = original(*call.args, **call.kwargs)
        zeros = ops.zeros((*ops.shape(scores)[:-1], length), scores.dtype)
        return ops.concatenate([zeros, scores], axis=-1)

    wanted = [
        (kind.attend, attend),
        (kind.window, narrow),
        (kind.scores, score),
    ]
    return [
        (view.slot(name), function)
        for name, function in wanted
        if name is not None and hasattr(owner, name)
    ]


def _signature(method):
    return inspect.signature(getattr(method, "original", method))


def _t5_detours(prefix, view, strength, shown):
    """For T5, whose attention is one method and adds up its biases.

    The prefix is a cache that stands before all tokens, or, in a call
    without a cache, a longer output of the projections.
    """
    owner, length = view.attention, prefix.length

    def attention(original, hidden, mask=None, **kwargs):
        cache, bias = kwargs.get("cache"), kwargs.get("position_bias")
        pieces = [("compute_bias", relative)]
        if cache is not None:
            pair = ops.unstack(cache, axis=1)
            kwargs["cache"] = ops.stack(
                prefix.before(*pair, strength(), shown()), axis=1
            )
            if kwargs.get("cache_update_index") is not None:
                kwargs["cache_update_index"] += length
        else:
            pieces += [
                (view.attention_kind.key, projected(0)),
                (view.attention_kind.value, projected(1)),
            ]
        if bias is not None:
            kwargs["position_bias"] = unmasked(bias)
        if mask is not None:
            mask = _widened(mask, shown(), length)
        layer = rerouted_base(original, pieces)
        outputs, bias, cache = layer(hidden, mask=mask, **kwargs)
        if cache is not None:
            cache = cache[:, :, length:]
        return outputs, bias[..., length:], cache

    def projected(index):
        def function(original, states):
            outputs = original(states)
            shape = (
                ops.shape(states)[0],
                -1,
                owner.num_heads,
                owner.key_value_dim,
            )
            split = ops.reshape(outputs, shape)
            rows = prefix.keys_and_values()[index]
            full = _prepended(rows, split, strength(), shown())
            return ops.reshape(full, (shape[0], -1, outputs.shape[-1]))

        return function

    def unmasked(bias):
        low = ops.where(ops.not_equal(shown(), 0), 0.0, -1e9)
        columns = ops.zeros_like(bias[..., :1]) + ops.cast(
            ops.reshape(low, (-1, 1, 1, 1)), bias.dtype
        )
        columns = ops.repeat(columns, length, axis=-1)
        return ops.concatenate([columns, bias], axis=-1)

    def relative(original, queries, keys, query_start_index=0):
        cached = ops.convert_to_tensor(query_start_index)
        start = ops.maximum(cached - length, 0)
        return unmasked(original(queries, keys - length, start))

    return [(view.slot("attention"), attention)]
