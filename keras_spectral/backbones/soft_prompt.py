"""SoftPrompt: trained vectors among the embedded tokens of a backbone."""

import keras
from keras import ops

from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.layer_tools import all_layers
from keras_spectral._internal.layer_tools import take_signature
from keras_spectral._internal.twin import rerouted_layer
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.adapter import Stack
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.host import Host

_EMBEDDINGS = (keras.layers.Embedding, keras.layers.ReversibleEmbedding)
_STDDEV = 0.02


class PromptHost(Host):
    """Runs a backbone with the prompts of its members."""

    opens_base = True

    def __init__(self, layer, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        take_signature(self, layer)

    def call(self, inputs, **kwargs):
        on = [
            m for m in self.members() if not m.is_off and m.batch_rows is None
        ]
        mixed = [
            m
            for m in self.members()
            if m.batch_rows is not None and m.batch_rows.any()
        ]
        if mixed and _has_one_each(mixed):
            return _prompted(self.layer, mixed, inputs, kwargs)
        outputs = _prompted(self.layer, on, inputs, kwargs)
        for member in mixed:
            own = _prompted(self.layer, [member], inputs, kwargs)
            outputs = keras.tree.map_structure(
                member.where_chosen, own, outputs
            )
        return outputs

    def compute_output_spec(self, *args, **kwargs):
        spec = super().compute_output_spec(*args, **kwargs)
        kept = sum(m.length for m in self.members() if m.keep and not m.is_off)

        def longer(x):
            if not kept or len(x.shape) != 3 or x.shape[1] is None:
                return x
            shape = (x.shape[0], x.shape[1] + kept, x.shape[2])
            return keras.KerasTensor(shape, x.dtype)

        return keras.tree.map_structure(longer, spec)


@register_method("soft_prompt")
class SoftPrompt(AdapterLayer, PromptHost):
    """Trained vectors that stand among the embedded tokens of a backbone.

    `[e_1 .. e_p, P, e_p+1 .. e_n]` with the tokens' embeddings e (width) and
    a trained prompt P (length x width), the same for all examples, behind the
    first `position` tokens. The backbone runs on `length` tokens more, which
    no padding hides and which have positions like others; that many more have
    to fit into it. By default its outputs lose the prompt's positions again,
    so that heads, labels and masks fit as before.

    It is the only trained part: `length * width` weights for a whole model.
    It does not start as the base, and it cannot be merged. Tasks that
    generate run their backbone layer by layer and would not see the prompt:
    they are refused; use PrefixTuning there.

    Start with a learning rate of 0.03 (Adam; `benchmarks/study.py`, in whose
    two epochs it ends where the head alone does).

    Source: Lester et al. 2021, arXiv 2104.08691.

    Args:
        layer: A model with one token embedding: a KerasHub backbone with
            `token_ids`, or any model of ids (batch, tokens).
        length: How many vectors, at least 1.
        position: How many tokens stand before them. Defaults to 1 where the
            backbone pools a first token ([CLS]), else to 0.
        keep: Whether the outputs keep the prompt's positions.
        seed: Integer seed of the start.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the backbone takes.
        training: Boolean.

    Input shape: the backbone's. Output shape: the backbone's; with `keep`
    sequences are `length` longer.

    Raises:
        ValueError: A bad option; no token embedding, or an encoder and a
            decoder that share one; a task that generates; merging.

    Example:

    >>> backbone = keras.Sequential(
    ...     [keras.Input((None,), dtype="int32"), keras.layers.Embedding(9, 4),
    ...      keras.layers.Dense(3)]
    ... )
    >>> layer = SoftPrompt(backbone, length=5)
    >>> tuple(layer(keras.ops.ones((2, 6), "int32")).shape)
    (2, 6, 3)
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(5, 4)]
    """

    default_target = "backbone"
    merges = False
    trains = "vectors that stand among the embedded tokens"
    retraces = True

    def __init__(
        self,
        layer: keras.Model,
        length: int = 10,
        position: int | None = None,
        keep: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        if position is not None:
            position = check_whole(position, "position")
        self.length = check_rank(length, "length")
        self.position = position
        self.keep = check_flag(keep, "keep")
        self.seed = check_seed(seed)

    @classmethod
    def check_base(cls, layer):
        _token_embedding(layer)

    @classmethod
    def check_model(cls, model):
        if hasattr(model, "call_with_cache"):
            raise ValueError(
                f"Model '{model.name}' generates text layer by layer, past "
                "its backbone's call, and would not see a soft prompt there. "
                "Expected a model that does not generate; use 'prefix'."
            )

    @classmethod
    def view_of(cls, layer):
        return _View(_token_embedding(layer))

    def build_adapter(self):
        self.prompt = self.add_weight(
            name="prompt",
            shape=(self.length, self.view.embedding.output_dim),
            initializer=keras.initializers.RandomNormal(
                0.0, _STDDEV, self.seed
            ),
        )

    def start(self) -> int:
        """How many tokens stand before the prompt."""
        if self.position is not None:
            return self.position
        return int(hasattr(self.layer, "cls_token_index"))

    def check_mergeable(self):
        raise ValueError(
            f"Layer '{self.name}' is a SoftPrompt and cannot be merged: its "
            "vectors do not change a kernel. Keep the adapter; "
            "`unwrap_model` drops it."
        )


@keras.saving.register_keras_serializable("keras_spectral")
class PromptStack(Stack, PromptHost):
    """Several soft prompts around one backbone, one behind the other."""

    def __init__(self, layer, members, **kwargs):
        super().__init__(layer, members, **kwargs)
        if len({(m.start(), m.keep) for m in self.members()}) > 1:
            raise ValueError(
                f"The soft prompts of '{layer.name}' differ in `position` or "
                "`keep`. Expected the same for all of one backbone."
            )


SoftPrompt.stack = PromptStack


def _has_one_each(mixed):
    """Whether each example of a mixed batch has one prompt of equal length."""
    covered = (sum(m.batch_rows for m in mixed) == 1).all()
    return covered and len({m.length for m in mixed}) == 1


def _prompted(backbone, prompts, inputs, kwargs):
    """A backbone's outputs with prompts among its embedded tokens.

    In a mixed batch all are of one length, and an example has its own.
    """
    if not prompts:
        return backbone(inputs, **kwargs)
    mixed = prompts[0].batch_rows is not None
    lengths = [p.length for p in prompts]
    start, length = prompts[0].start(), lengths[0] if mixed else sum(lengths)
    stop, keep = start + length, prompts[0].keep

    def embed(original, ids, **kwargs):
        outputs = original(ids, **kwargs)
        batch = ops.shape(outputs)[0]
        found = [
            ops.broadcast_to(
                p.prompt * p.adapter_strength, (batch, *p.prompt.shape)
            )
            for p in prompts
        ]
        if mixed:
            prompt = sum(p.in_rows(x) for p, x in zip(prompts, found))
        else:
            prompt = ops.concatenate(found, axis=1)
        prompt = ops.cast(prompt, outputs.dtype)
        pieces = [outputs[:, :start], prompt, outputs[:, stop:]]
        return ops.concatenate(pieces, axis=1)

    def longer(name, ids):
        """Room for the prompt: ids of 1, which no mask hides."""
        fill = ops.zeros_like if "segment" in str(name) else ops.ones_like
        room = ops.repeat(fill(ids[:, :1]), length, axis=1)
        return ops.concatenate([ids[:, :start], room, ids[:, start:]], 1)

    def shorter(x):
        if keep or len(x.shape) != 3:
            return x
        return ops.concatenate([x[:, :start], x[:, stop:]], axis=1)

    if isinstance(inputs, dict):
        inputs = {name: longer(name, x) for name, x in inputs.items()}
    else:
        inputs = longer("token_ids", inputs)
    backbone = rerouted_layer(backbone, prompts[0].view.embedding, embed)
    outputs = backbone(inputs, **kwargs)
    return keras.tree.map_structure(shorter, outputs)


class _View:
    """A backbone as its token embedding."""

    kernel_name = None

    def __init__(self, embedding):
        self.embedding = embedding


def _token_embedding(backbone):
    """The layer that embeds a backbone's tokens; a ValueError without one."""
    if not isinstance(backbone, keras.Model):
        raise ValueError(
            f"'{backbone.name}' is a {type(backbone).__name__}. Expected a "
            "whole backbone, a model of token ids."
        )
    inputs = getattr(backbone, "inputs", None) or []
    shapes = [tuple(tensor.shape) for tensor in inputs]
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            f"'{backbone.name}' has inputs of shapes {shapes}. Expected token "
            "ids (batch, tokens)."
        )
    if any("encoder" in tensor.name for tensor in inputs):
        raise ValueError(
            f"'{backbone.name}' has an encoder and a decoder, which share "
            "their embedding. Expected one sequence of tokens; use 'prefix'."
        )
    found = getattr(backbone, "token_embedding", None)
    if not isinstance(found, keras.layers.Layer):
        layers = all_layers(backbone)
        embeddings = [x for x in layers if isinstance(x, _EMBEDDINGS)]
        if len(embeddings) != 1:
            raise ValueError(
                f"'{backbone.name}' has {len(embeddings)} embeddings and none "
                "named `token_embedding`. Expected one."
            )
        (found,) = embeddings
    return found
