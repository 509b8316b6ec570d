"""Where a transformer block keeps its parts: one table for all kinds."""

import dataclasses
import functools
import inspect

import keras
from keras import ops

from keras_spectral.kernels import KernelView
from keras_spectral.kernels import kernel_view
from keras_spectral.layers.host import Host


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """Where an attention layer keeps its parts.

    Attributes:
        query: Attribute with the query projection; `key`, `value` and
            `output` likewise.
        attend: Its method `(query, key, value, ..., attention_mask, ...)` on
            projected tensors (batch, tokens, heads, size), the mask's last
            axis being the keys. None: not of that form.
        window: Its method that narrows a mask (..., queries, keys) to a
            sliding window, if it has one.
        scores: Its method that makes additional scores (..., queries, keys)
            of `key`, if it has one.
    """

    query: str = "_query_dense"
    key: str = "_key_dense"
    value: str = "_value_dense"
    output: str = "_output_dense"
    attend: str | None = "_compute_attention"
    window: str | None = "_mask_sliding_window"
    scores: str | None = None


@dataclasses.dataclass(frozen=True)
class BlockKind:
    """Where a transformer block keeps its parts.

    Attributes:
        attention: Attribute with the self-attention layer, an attribute of
            an attribute written with a dot; `""` if the block is one itself.
        first: Attribute with the feed-forward net's first linear layer, which
            takes its input; None without a feed-forward net.
        last: Attribute with its last linear layer, which gives its output.
        norm: Attribute with the norm that follows the sum of the feed-forward
            net's input and output, where the block ends with one (post-LN).
            It does not count in a block whose `normalize_first` is true. None
            if the block ends with the sum.
        mask: Name of the call argument with the padding mask (batch, tokens),
            or None.
    """

    attention: str = "_self_attention_layer"
    first: str | None = "_feedforward_intermediate_dense"
    last: str | None = "_feedforward_output_dense"
    mask: str | None = "padding_mask"
    norm: str | None = None


_PUBLIC = AttentionKind(
    "query_dense", "key_dense", "value_dense", "output_dense"
)
_ATTENTIONS: dict[str | type, AttentionKind] = {
    "MultiHeadAttention": AttentionKind(),
    "LlamaAttention": AttentionKind(),
    "CachedMistralAttention": AttentionKind(),
    "QwenAttention": AttentionKind(),
    "Qwen3Attention": AttentionKind(),
    "Phi3Attention": _PUBLIC,
    "CachedGemmaAttention": _PUBLIC,
    "CachedGemma3Attention": _PUBLIC,
    "SmolLM3Attention": AttentionKind("q_proj", "k_proj", "v_proj", "o_proj"),
    "DisentangledSelfAttention": AttentionKind(
        scores="_compute_disentangled_attention"
    ),
    "T5MultiHeadAttention": AttentionKind(
        "query_projector",
        "key_projector",
        "value_projector",
        "output_projector",
        attend=None,
    ),
}
_NORM = "_feedforward_layer_norm"
_DECODER = BlockKind(mask="decoder_padding_mask")
_GEMMA = BlockKind("attention", "gating_ffw", "ffw_linear")
_BLOCKS: dict[str | type, BlockKind] = {
    "TransformerEncoder": BlockKind(norm=_NORM),
    "TransformerDecoder": BlockKind(mask="decoder_padding_mask", norm=_NORM),
    "DisentangledAttentionEncoder": BlockKind(norm=_NORM),
    "LlamaTransformerDecoder": _DECODER,
    "MistralTransformerDecoder": _DECODER,
    "QwenTransformerDecoder": _DECODER,
    "Qwen3TransformerDecoder": _DECODER,
    "Phi3Decoder": BlockKind(
        "attention",
        "feedforward_intermediate_dense",
        "feedforward_output_dense",
        "decoder_padding_mask",
    ),
    "SmolLM3DecoderLayer": BlockKind(
        "self_attn", "mlp.up_proj", "mlp.down_proj", "decoder_padding_mask"
    ),
    "GemmaDecoderBlock": _GEMMA,
    "Gemma3DecoderBlock": _GEMMA,
    "T5TransformerLayer": BlockKind(
        "self_attention",
        "input_projector",
        "output_projector",
        "attention_mask",
    ),
    "ViTEncoderBlock": BlockKind("mha", "mlp.dense_1", "mlp.dense_2", None),
    "CLIPEncoderLayer": BlockKind("attention", "dense_1", "dense_2", None),
    # An attention layer that stands in no block of a known kind.
    **{name: BlockKind("", None, None, None) for name in _ATTENTIONS},
}


def register_block(
    block: type[keras.layers.Layer],
    kind: BlockKind,
    attention: AttentionKind | None = None,
) -> None:
    """Makes a block class of one's own known to the block adapters.

    Args:
        block: The class of the block; its subclasses are known as well.
        kind: Where it keeps its parts.
        attention: Where its attention layer's parts are, if that is no
            `keras.layers.MultiHeadAttention` nor one of KerasHub's. Such a
            layer's `attend` must return what `keras.layers.MultiHeadAttention`
            does from `_compute_attention` or the attended values alone.

    Raises:
        ValueError: `block` is no layer class, `kind` no BlockKind or
            `attention` no AttentionKind.

    Example:

    >>> import keras_spectral as ks
    >>> class Block(keras.layers.Layer):
    ...     def __init__(self, **kwargs):
    ...         super().__init__(**kwargs)
    ...         self.attention = keras.layers.MultiHeadAttention(2, 4)
    ...         self.up = keras.layers.Dense(16, activation="relu")
    ...         self.down = keras.layers.Dense(8)
    ...     def call(self, x):
    ...         x = x + self.attention(x, x)
    ...         return x + self.down(self.up(x))
    >>> kind = ks.blocks.BlockKind("attention", "up", "down", mask=None)
    >>> ks.blocks.register_block(Block, kind)
    >>> model = keras.Sequential([keras.Input((5, 8)), Block(name="block")])
    >>> model = ks.wrap_model(model, "bottleneck", size=2)
    """
    if not (isinstance(block, type) and issubclass(block, keras.layers.Layer)):
        raise ValueError(f"Received block={block!r}. Expected a layer class.")
    if not isinstance(kind, BlockKind):
        raise ValueError(f"Received kind={kind!r}. Expected a BlockKind.")
    if not isinstance(attention, AttentionKind | None):
        raise ValueError(
            f"Received attention={attention!r}. Expected an AttentionKind or "
            "None."
        )
    if attention is not None:
        _ATTENTIONS[block] = attention
    _BLOCKS[block] = kind


def block_kind(layer: keras.layers.Layer) -> BlockKind | None:
    """The registered kind of a block's class, or None."""
    return _lookup(_BLOCKS, layer)


def require_kind(layer: keras.layers.Layer) -> BlockKind:
    """`block_kind`; a ValueError with the way out if there is none."""
    kind = block_kind(layer)
    if kind is None:
        raise ValueError(
            f"'{layer.name}' is a {type(layer).__name__}, which is no "
            "transformer block of a known kind. Expected one of "
            f"{sorted(k for k in _BLOCKS if isinstance(k, str))}; "
            "describe your own by `ks.blocks.register_block`."
        )
    return kind


class BlockView:
    """A transformer block as its parts.

    Attributes:
        block: The block.
        attention: Its self-attention layer.
        width: Size of the vectors that run through the block.
        kernel_name: None, because a block has no kernel of its own.

    Raises:
        ValueError: The block's kind is not known.
    """

    kernel_name = None

    def __init__(self, block: keras.layers.Layer):
        self.block = block
        self.kind = require_kind(block)
        self.attention = subject(_follow(block, self.kind.attention))
        self.attention_kind = _lookup(_ATTENTIONS, block) or _lookup(
            _ATTENTIONS, self.attention
        )
        if self.attention_kind is None:
            raise ValueError(
                f"The attention of '{block.name}' is a "
                f"{type(self.attention).__name__}, whose parts are not known. "
                "Describe it by `register_block(..., attention=...)`."
            )
        self.width = self.linear("output").n_out

    def slot(self, part: str) -> str:
        """The path of a part below the block.

        Args:
            part: "attention", "query", "key", "value", "output", "first",
                "last", or the name of an attribute of the attention layer.
        """
        if part == "attention":
            return self.kind.attention
        if part in ("first", "last"):
            path = getattr(self.kind, part)
            if path is None:
                raise ValueError(
                    f"'{self.block.name}' ({type(self.block).__name__}) has no "
                    "feed-forward net that is known. Describe the whole block "
                    "by `ks.blocks.register_block`, or leave this part out."
                )
            return path
        name = getattr(self.attention_kind, part, part)
        return ".".join(filter(None, (self.kind.attention, name)))

    @property
    def norm(self) -> str | None:
        """The path of the norm that ends the block, None without one."""
        first = getattr(self.block, "normalize_first", False)
        return None if first else self.kind.norm

    def linear(self, part: str) -> KernelView:
        """A part as a matrix, seen through an adapter of its own."""
        layer = _follow(self.block, self.slot(part))
        return kernel_view(subject(layer))

    def padding(self, args, kwargs):
        """The padding mask (batch, tokens) of a call, or None."""
        names = _argument_names(type(self.block))
        mask = {**dict(zip(names, args)), **kwargs}.get(self.kind.mask)
        inputs = (*args, *kwargs.values())[0]
        if mask is None:
            mask = getattr(inputs, "_keras_mask", None)
        if mask is not None and len(mask.shape) == 3:
            mask = mask[:, -1]  # T5: what the last token may see
        if mask is None or mask.shape[-1] != inputs.shape[1]:
            return None  # as in cached generation, whose mask is longer
        return ops.cast(mask, "float32")


def _lookup(table, layer):
    for cls in type(layer).__mro__:
        if cls in table:
            return table[cls]
        home = cls.__module__.partition(".")[0]
        if cls.__name__ in table and home in ("keras", "keras_hub"):
            return table[cls.__name__]
    return None


def subject(layer):
    """The layer itself, or what is inside of its hosts."""
    while isinstance(layer, Host):
        layer = layer.layer
    return layer


def _follow(layer, path):
    for name in filter(None, path.split(".")):
        layer = getattr(layer, name)
    return layer


@functools.cache
def _argument_names(cls):
    return [n for n in inspect.signature(cls.call).parameters if n != "self"]
