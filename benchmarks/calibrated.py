"""Compression that looks at data, on MiniLM and on a small language model.

Usage: python benchmarks/calibrated.py run --case minilm --data DIR
       python benchmarks/calibrated.py run --case tuned --data DIR
       python benchmarks/calibrated.py run --case smollm --data DIR --gguf FILE
       python benchmarks/calibrated.py table
DIR holds mrpc.train.tsv, mrpc.test.tsv and the files of sst2. A run is a line
of --out: what is there is not run again.

minilm: cosine of sentence vectors with the whole model's, all 36 kernels.
tuned: MiniLM fine-tuned on SST-2, test accuracy after compression alone, and
the share of the logits' variance that is lost.
smollm: perplexity of SmolLM2-135M on packed sentences, all 210 kernels, then
--steps of distillation into LoRAs on the factors.
"""

import argparse
import json
import os
import pathlib
import time
import warnings
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_spectral as ks

QUIET = Console(quiet=True)
SEQUENTIAL = {"sequential": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, alds": {"method": "alds"},
    "plain, energy": {"method": "energy"},
    "outputs": {"compensate_bias": False},
    "outputs, bias": {},
    "outputs, bias, alds": {"method": "alds"},
    "outputs, bias, energy": {"method": "energy"},
    "sequential": SEQUENTIAL | {"compensate_bias": False},
    "sequential, bias": SEQUENTIAL,
    "sequential, bias, energy": SEQUENTIAL | {"method": "energy"},
    "sequential, bias, global": SEQUENTIAL | {"method": "global"},
    "outputs, bias, sensitivity": {"method": "sensitivity"},
    "sequential, bias, sensitivity": SEQUENTIAL | {"method": "sensitivity"},
}


class MiniLM:
    """Sentence vectors, the mean over tokens."""

    ratios = (0.6, 0.4, 0.2, 0.1)
    seeds = (0,)
    variants = tuple(VARIANTS)
    higher = "cosine"

    def __init__(self, args):
        import keras_hub
        from _glue import encode
        from _glue import read
        from _minilm import preset_folder

        folder = preset_folder()
        self.model = keras_hub.models.BertBackbone.from_preset(folder)
        tokenizer = keras_hub.models.BertTokenizer.from_preset(
            folder, strip_accents=True
        )
        count = args.rows + min(args.tests, 256)
        texts = read(args.data, "mrpc", "train")[0][:count]
        found = encode(tokenizer, texts, [""] * len(texts), args.length)
        self.calibration = {k: x[: args.rows] for k, x in found.items()}
        self.tests = {k: x[args.rows :] for k, x in found.items()}
        self.wanted = self.vectors(self.model)

    def vectors(self, model):
        out = model.predict(self.tests, verbose=0)["sequence_output"]
        mask = self.tests["padding_mask"][..., None]
        vectors = (out * mask).sum(axis=1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def measure(self, model):
        cosines = (self.vectors(model) * self.wanted).sum(axis=1)
        return {"cosine": float(cosines.mean()), **self.timed(model)}

    def timed(self, model):
        batch = {k: x[:32] for k, x in self.tests.items()}
        return {"cpu_ms": forward_time(lambda: model.predict_on_batch(batch))}


class Tuned:
    """The classifier, fine-tuned on SST-2; its weights are kept in a file."""

    ratios = (0.6, 0.4, 0.2)
    seeds = (0, 1)
    variants = (
        "plain",
        "outputs",
        "outputs, bias",
        "sequential, bias",
        "outputs, bias, sensitivity",
        "sequential, bias, sensitivity",
    )
    higher = "accuracy"

    def __init__(self, args):
        import keras_hub
        from _glue import encode
        from _glue import read
        from _minilm import build_classifier
        from _minilm import preset_folder

        tokenizer = keras_hub.models.BertTokenizer.from_preset(
            preset_folder(), strip_accents=True
        )

        def examples(split, count, seed):
            texts, other, labels = read(args.data, "sst2", split)
            rows = np.random.default_rng(seed).permutation(len(labels))[:count]
            texts = [texts[i] for i in rows]
            other = [""] * len(rows)
            return encode(tokenizer, texts, other, args.length), labels[rows]

        self.tests = examples("test", args.tests, 0)
        self.args, self.make, self.examples = args, build_classifier, examples
        self.seed = None

    def start(self, seed):
        if self.seed == seed:
            return
        self.seed, args = seed, self.args
        keras.utils.set_random_seed(seed)
        self.model = self.make()
        inputs, labels = self.examples("train", args.examples, seed)
        self.calibration = {k: x[: args.rows] for k, x in inputs.items()}
        path = args.out.with_suffix(f".tuned{seed}.weights.h5")
        if path.exists():
            self.model.load_weights(path)
            return
        steps = 2 * (args.examples // 16)
        rate = keras.optimizers.schedules.CosineDecay(5e-5, steps)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.AdamW(rate), loss)
        keras.Model.fit(
            self.model, inputs, labels, batch_size=16, epochs=2, verbose=0
        )
        self.model.save_weights(path)

    def measure(self, model):
        inputs, labels = self.tests
        logits = keras.Model.predict(model, inputs, verbose=0)
        right = (logits.argmax(axis=-1) == labels).mean()
        whole = keras.Model.predict(self.model, inputs, verbose=0)
        lost = ((logits - whole) ** 2).sum()
        spread = ((whole - whole.mean(axis=0)) ** 2).sum()
        batch = {k: x[:32] for k, x in inputs.items()}
        return {
            "accuracy": float(right),
            "lost": float(lost / spread),  # of the logits' variance
            "cpu_ms": forward_time(lambda: model.predict_on_batch(batch)),
        }


class SmolLM:
    """Perplexity, and tokens a second."""

    ratios = (0.1, 0.2, 0.05)
    seeds = (0,)
    variants = (
        "plain",
        "outputs",
        "sequential",
        "sequential, bias, energy",
        "outputs, bias, sensitivity",
        "sequential, bias, sensitivity",
    )
    higher = None

    def __init__(self, args):
        from _glue import read

        from keras_spectral.course.smollm import LanguageModel
        from keras_spectral.course.smollm import smollm

        self.args, self.language = args, LanguageModel
        writer = smollm(file=args.gguf)
        self.model = writer.backbone
        texts = [read(args.data, "mrpc", x)[0] for x in ("test", "train")]
        self.tests = writer.rows(texts[0], args.length, args.tests)
        ids = writer.rows(texts[1], args.length, args.rows)[:, :-1]
        self.calibration = {"token_ids": ids, "padding_mask": np.ones_like(ids)}

    def measure(self, model):
        language, batch = self.language(model), self.tests[:4, :-1]
        seconds = forward_time(lambda: language.predict_on_batch(batch)) / 1000
        return {
            "perplexity": language.perplexity(self.tests),
            "tokens_per_cpu_second": round(batch.size / seconds, 1),
        }

    def recover(self, model):
        """Distillation on the text of the calibration, LoRAs alone."""
        small, whole = self.language(model), self.language(self.model)
        rows = self.calibration["token_ids"]
        small(rows[:1]), whole(rows[:1])
        distiller = ks.distiller(small, whole, label_weight=0)
        distiller.compile(keras.optimizers.Adam(self.args.rate))
        count = self.args.steps * self.args.batch
        rows = np.tile(rows, (-(-count // len(rows)), 1))[:count]
        distiller.fit(rows, batch_size=self.args.batch, verbose=0)


CASES = {"minilm": MiniLM, "tuned": Tuned, "smollm": SmolLM}


def forward_time(call) -> float:
    """CPU milliseconds of the fastest of three calls."""
    found = []
    for _ in range(4):
        begin = time.process_time()
        call()
        found.append(1000 * (time.process_time() - begin))
    return round(min(found[1:]), 1)


def run(args, show) -> None:
    case = CASES[args.case](args)
    warnings.filterwarnings("ignore", ".*fewer rows")
    for seed in case.seeds:
        if hasattr(case, "start"):
            case.start(seed)
        todo = [(0.0, "whole")] + [
            (ratio, variant)
            for ratio in args.ratios or case.ratios
            for variant in args.variants or case.variants
        ]
        found = None
        for ratio, variant in todo:
            key = (args.case, seed, ratio, variant)
            if known(args.out, key):
                continue
            begin = time.process_time()
            model, options = case.model, None
            if ratio:
                options = {"method": "uniform", **VARIANTS[variant]}
                plain = variant.startswith("plain")
                if not plain:
                    options["calibration"] = case.calibration
                    options["batch_size"] = args.at_once
                whole = "sequential" in options or variant.endswith(
                    "sensitivity"
                )
                if not whole and not plain:
                    found = found or ks.calibrate(
                        case.model, case.calibration, "all-linear"
                    )
                    options["calibration"] = found
                model = ks.compress_model(
                    case.model, ratio, target="all-linear", **options
                )
            seconds = round(time.process_time() - begin, 1)
            line = {"compress_cpu_s": seconds, **case.measure(model)}
            note(args.out, key, line, show)
    if args.steps and hasattr(case, "recover"):
        recovered(args, case, show)


def recovered(args, case, show) -> None:
    ratio = (args.ratios or case.ratios)[0]
    variant = (args.variants or ("sequential",))[-1]
    key = (args.case, 0, ratio, f"{variant}, {args.steps} steps")
    if known(args.out, key):
        return
    options = {"method": "uniform", **VARIANTS[variant]}
    model = ks.compress_model(
        case.model,
        ratio,
        target="all-linear",
        calibration=case.calibration,
        batch_size=args.at_once,
        recover="lora",
        **options,
    )
    begin = time.process_time()
    case.recover(model)
    seconds = round(time.process_time() - begin, 1)
    note(args.out, key, {"train_cpu_s": seconds, **case.measure(model)}, show)


def lines_of(path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(x) for x in path.read_text().splitlines() if x]


def key_of(line) -> tuple:
    return tuple(line[name] for name in ("case", "seed", "ratio", "variant"))


def known(path, key) -> bool:
    return any(key_of(line) == key for line in lines_of(path))


def note(path, key, found, show) -> None:
    line = dict(zip(("case", "seed", "ratio", "variant"), key), **found)
    with open(path, "a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")
    show.print(line, highlight=False)


def table(args, show) -> None:
    """A row a variant, a column a ratio; the mean over seeds."""
    for case in CASES:
        lines = [x for x in lines_of(args.out) if x["case"] == case]
        if not lines:
            continue
        name = CASES[case].higher or "perplexity"
        ratios = sorted({x["ratio"] for x in lines})
        shown = Table("", *[f"{100 * x:.0f} %" for x in ratios], title=name)
        for variant in dict.fromkeys(x["variant"] for x in lines):
            cells = []
            for ratio in ratios:
                mine = [
                    x[name]
                    for x in lines
                    if (x["variant"], x["ratio"]) == (variant, ratio)
                ]
                cells.append(f"{np.mean(mine):.4g}" if mine else "")
            shown.add_row(variant, *cells)
        show.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=("run", "table"))
    add("--case", choices=CASES, default="minilm")
    add("--out", type=pathlib.Path, default="calibrated.jsonl")
    add("--data", type=pathlib.Path, help="folder of TSV files")
    add("--gguf", type=pathlib.Path)
    add("--ratios", nargs="+", type=float, help="shares to remove")
    add("--variants", nargs="+", choices=VARIANTS)
    add("--rows", type=int, default=384, help="examples of the calibration")
    add("--at-once", type=int, help="its batch size, all by default")
    add("--length", type=int, default=64)
    add("--examples", type=int, default=1500, help="to fine-tune on")
    add("--tests", type=int, default=2000, help="examples to test on, at most")
    add("--steps", type=int, default=0, help="of recovery")
    add("--rate", type=float, default=3e-4)
    add("--batch", type=int, default=2)
    args = parser.parse_args()
    args.at_once = args.at_once or args.rows
    show = Console(width=160)
    {"run": run, "table": table}[args.what](args, show)


if __name__ == "__main__":
    main()
