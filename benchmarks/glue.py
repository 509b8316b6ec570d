"""Accuracy of MiniLM-L6 with an adapter on a GLUE task.

Usage: python benchmarks/glue.py --task mrpc --method lora --data DIR
Prints a table of dev scores per epoch on stderr and, at the end, one JSON line
with every setting and result on stdout. Choose the backend by KERAS_BACKEND.
"""

import argparse
import ast
import csv
import json
import os
import pathlib
import time
from typing import Any

import keras
import keras_hub
import numpy as np
from _minilm import build_classifier
from _minilm import count
from _minilm import preset_folder
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

import keras_spectral as ks

MAX_LENGTH = {"mrpc": 96, "rte": 128, "cola": 96, "sst2": 96}
LENGTH_STEP = 16  # paddings of single batches, to compile few shapes
EVALUATION_SPLIT = {"mrpc": "dev", "rte": "dev", "cola": "dev", "sst2": "test"}
Rows = tuple[list[str], list[str], np.ndarray]  # first, second, labels
Inputs = dict[str, np.ndarray]


def read_tsv(folder: pathlib.Path, task: str, split: str) -> Rows:
    """Reads `task.split.tsv`: sentence1, sentence2 (may be empty), label."""
    with open(folder / f"{task}.{split}.tsv", encoding="utf8") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = list(reader)
    labels = np.array([int(row["label"]) for row in rows], "int32")
    first = [row["sentence1"] for row in rows]
    return first, [row["sentence2"] or "" for row in rows], labels


def read_tfds(task: str, split: str) -> Rows:
    """Reads the task from TensorFlow Datasets, which may download it."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "No GLUE data: pass --data DIR or set KERAS_SPECTRAL_DATA to a "
            f"directory whose folder text/ holds {task}.train.tsv and "
            f"{task}.{EVALUATION_SPLIT[task]}.tsv, or "
            "`pip install tensorflow-datasets` to download them."
        ) from error
    split = "train" if split == "train" else "validation"
    data = tfds.as_numpy(tfds.load(f"glue/{task}", split=split, batch_size=-1))
    labels = data["label"].astype("int32")
    if task == "rte":  # there 0 is entailment, in the TSV files 1 is
        labels = 1 - labels
    first = data["sentence1"] if "sentence1" in data else data["sentence"]
    second = data.get("sentence2", [b""] * len(first))
    return (
        [text.decode("utf8") for text in first],
        [text.decode("utf8") for text in second],
        labels,
    )


def read(given: str | None, task: str, split: str) -> Rows:
    """Reads one split from TSV files, or without any from the network."""
    root = os.environ.get("KERAS_SPECTRAL_DATA")
    if given:
        return read_tsv(pathlib.Path(given), task, split)
    if root:
        return read_tsv(pathlib.Path(root, "text"), task, split)
    return read_tfds(task, split)


def encode(
    tokenizer: keras_hub.models.BertTokenizer,
    first: list[str],
    second: list[str],
    length: int,
) -> Inputs:
    """Packs [CLS] first [SEP] or [CLS] first [SEP] second [SEP].

    Too long a pair loses tokens from its longer sentence first, which is what
    round robin comes to. Padding at the end is cut to the longest example,
    rounded up to 8.
    """
    packer = keras_hub.layers.MultiSegmentPacker(
        sequence_length=length,
        start_value=tokenizer.cls_token_id,
        end_value=tokenizer.sep_token_id,
        pad_value=tokenizer.pad_token_id,
        truncate="round_robin",
    )
    segments = (first, second) if any(second) else (first,)
    token_ids, segment_ids = packer(tuple(tokenizer(s) for s in segments))
    token_ids = keras.ops.convert_to_numpy(token_ids)
    padding_mask = (token_ids != tokenizer.pad_token_id).astype("int32")
    longest = -(-padding_mask.sum(axis=1).max() // 8) * 8
    arrays = {
        "token_ids": token_ids,
        "segment_ids": keras.ops.convert_to_numpy(segment_ids),
        "padding_mask": padding_mask,
    }
    return {name: array[:, :longest] for name, array in arrays.items()}


class WarmupLinear(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly from 0 to `peak`, then falls linearly to 0."""

    def __init__(self, peak: float, warmup_steps: int, total_steps: int):
        self.peak = peak
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rise = step / max(1, self.warmup_steps)
        left = self.total_steps - step
        fall = left / max(1, self.total_steps - self.warmup_steps)
        return self.peak * keras.ops.maximum(0.0, keras.ops.minimum(rise, fall))

    def get_config(self):
        return {
            "peak": self.peak,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }


class Batches(keras.utils.PyDataset):
    """The batches of every epoch, epoch after epoch.

    Args:
        inputs: All examples.
        labels: Their labels.
        plan: For each epoch the rows of each batch.
        cut: Whether a batch is padded to its own longest example only.
    """

    def __init__(
        self,
        inputs: Inputs,
        labels: np.ndarray,
        plan: list[list[np.ndarray]],
        cut: bool,
    ):
        super().__init__()
        self.inputs = inputs
        self.labels = labels
        self.plan = plan
        self.cut = cut
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.plan[0])

    def __getitem__(self, index):
        rows = self.plan[min(self.epoch, len(self.plan) - 1)][index]
        longest = self.inputs["padding_mask"].shape[1]
        if self.cut:
            longest = lengths(self.inputs)[rows].max()
            longest = -(-longest // LENGTH_STEP) * LENGTH_STEP
        cut = {k: array[rows, :longest] for k, array in self.inputs.items()}
        return cut, self.labels[rows]

    def on_epoch_end(self):
        self.epoch += 1


def lengths(inputs: Inputs) -> np.ndarray:
    """Tokens of each example, padding left out."""
    return inputs["padding_mask"].sum(axis=1)


def plain_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive rows."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def grouped_batches(
    rows: np.ndarray,
    inputs: Inputs,
    size: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Batches of similar length, drawn within pools of 16 batches."""
    found = []
    for pool in plain_batches(rows, 16 * size):
        order = pool[np.argsort(lengths(inputs)[pool], kind="stable")]
        found += plain_batches(order, size)
    return [found[i] for i in rng.permutation(len(found))]


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 of class 1, Matthews, and how calibrated logits are.

    `nll` is the mean negative log-likelihood, `ece` the expected calibration
    error over 15 bins of confidence.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    predicted, confidence = logits.argmax(axis=-1), np.exp(log_p.max(axis=-1))
    right = predicted == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(15)
    ]
    hits = ((predicted == 1) & (labels == 1)).sum()
    positives = (predicted == 1).sum() + (labels == 1).sum()
    matthews = np.corrcoef(predicted, labels)[0, 1] if predicted.std() else 0.0
    return {
        "accuracy": float(right.mean()),
        "f1": float(2 * hits / max(1, positives)),
        "matthews": float(matthews),
        "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
        "ece": float(sum(gaps) / len(labels)),
    }


def evaluate(
    model: keras.Model, inputs: Inputs, labels: np.ndarray
) -> dict[str, float]:
    """Scores the model on the evaluation split."""
    logits = model.predict(inputs, batch_size=64, verbose=0)
    return scores(logits.astype("float64"), labels)


class ShowProgress(keras.callbacks.Callback):
    """Moves a rich progress bar on; scores and prints after each epoch."""

    def __init__(self, epochs: int, total_steps: int, dev, show: Console):
        super().__init__()
        self.dev = dev
        self.history: list[dict[str, float]] = []
        self.start = time.time()
        self.bar = Progress(
            TextColumn(f"epoch {{task.fields[epoch]}}/{epochs}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=show,
        )
        self.task = self.bar.add_task(
            "train", total=total_steps, epoch=0, loss=float("nan")
        )

    def on_epoch_begin(self, epoch, logs=None):
        self.bar.update(self.task, epoch=epoch + 1)

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update(self.task, advance=1, loss=float(logs["loss"]))

    def on_epoch_end(self, epoch, logs=None):
        result = {
            "epoch": epoch + 1,
            "loss": float(logs["loss"]),
            **evaluate(self.model, *self.dev),
            "seconds": round(time.time() - self.start, 1),
        }
        self.history.append(result)
        values = (f"{name} {value:.4g}" for name, value in result.items())
        self.bar.console.print("  ".join(values), highlight=False)


def make_optimizer(
    args: argparse.Namespace, steps: int
) -> keras.optimizers.Optimizer:
    """AdamW or IVON, with the same warmup, decay and clipping."""
    rate = WarmupLinear(args.lr, int(0.06 * steps), steps)
    if args.optimizer == "ivon":
        return ks.optimizers.IVON(
            rate,
            ess=args.ess,
            hess_init=args.hess_init,
            weight_decay=args.ivon_decay,
            global_clipnorm=1.0,
            seed=args.seed,
        )
    return keras.optimizers.AdamW(
        rate, weight_decay=0.01, epsilon=1e-8, global_clipnorm=1.0
    )


def train(
    model: keras.Model,
    data: tuple[Inputs, np.ndarray],
    dev: tuple[Inputs, np.ndarray],
    args: argparse.Namespace,
    show: Console,
) -> list[dict[str, float]]:
    """Compiles, fits and scores after each epoch; returns the history.

    The order of the rows is drawn here, epoch by epoch, so that every backend
    and the peer see the same batches.
    """
    inputs, labels = data
    rng = np.random.default_rng(args.seed)
    pool = rng.permutation(len(labels))[: args.examples]
    total_steps = args.epochs * -(-len(pool) // args.batch)
    plan = []
    for _ in range(args.epochs):
        rows = rng.permutation(pool)
        if args.group_by_length:
            plan.append(grouped_batches(rows, inputs, args.batch, rng))
        else:
            plan.append(plain_batches(rows, args.batch))
    model.compile(
        make_optimizer(args, total_steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    progress = ShowProgress(args.epochs, total_steps, dev, show)
    callbacks = [progress]
    if args.optimizer == "ivon":
        callbacks.insert(0, ks.callbacks.MeanWeights())
    if args.method == "adalora":
        callbacks.insert(
            0,
            ks.callbacks.RankBudget(
                args.target_rank,
                args.criterion,
                total_steps=total_steps,
                interval=args.interval,
            ),
        )
    with progress.bar:
        # Not KerasHub's `fit`, which knows no PyDataset.
        keras.Model.fit(
            model,
            Batches(inputs, labels, plan, args.group_by_length),
            epochs=args.epochs,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
    return progress.history


def adapt(model: keras.Model, args: argparse.Namespace, show: Console) -> None:
    """Makes the model train what the method trains, in place."""
    if args.method == "full":
        return
    if args.method == "head":  # classifier and pooler, as the peer does
        for layer in model.backbone.layers:
            layer.trainable = layer is model.backbone.pooled_dense
        return
    numbers = {
        "rank": args.rank,
        "alpha": args.alpha,
        "dropout": args.dropout,
    }
    given = {name: value for name, value in numbers.items() if value}
    options = {**given, **dict(args.option)}
    ks.wrap_model(model, args.method, target=args.target, **options)
    ks.adapter_summary(model, show)


def gate_means(model: keras.Model, inputs: Inputs) -> dict[str, dict]:
    """Mean gates of each UniPELT block over the evaluation split."""
    blocks = {
        layer.name: layer
        for layer in model.backbone.layers
        if isinstance(layer, ks.UniPELTBlock)
    }
    for block in blocks.values():
        block.reset_gates()
    if blocks:
        model.predict(inputs, batch_size=64, verbose=0)
    return {
        name: {
            part: round(mean, 4)
            for part, (mean, _) in block.gate_statistics().items()
        }
        for name, block in blocks.items()
    }


def parse_option(text: str) -> tuple[str, Any]:
    """Reads `key=value`, the value as a Python literal if it is one."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected key=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", choices=MAX_LENGTH, default="mrpc")
    add("--method", default="lora", help="full, head or an adapter's name")
    add("--data", help="folder of TSV files")
    add("--target", help="preset word or regex; default: the method's own")
    add("--rank", type=int, default=8, help="0: leave it to the method")
    add("--alpha", type=float, help="default: 16 for LoRA, else the method's")
    add("--dropout", type=float, default=0.0)
    add(
        "--option",
        type=parse_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of the method, repeatable",
    )
    add("--lr", type=float, help="default: 1e-3, for full 5e-5")
    add("--optimizer", choices=("adamw", "ivon"), default="adamw")
    add("--ess", type=float, default=1e6, help="IVON")
    add("--hess-init", type=float, default=1e-3, help="IVON")
    add("--ivon-decay", type=float, default=1e-5, help="IVON's weight decay")
    add("--criterion", default="sensitivity", help="of AdaLoRA")
    add("--target-rank", type=float, default=2, help="of AdaLoRA, a layer")
    add("--interval", type=int, default=10, help="of AdaLoRA, steps")
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--examples", type=int, help="train on that many, drawn by the seed")
    add("--length", type=int, help="longest input in tokens")
    add(
        "--group-by-length",
        action="store_true",
        help="batches of similar length, each padded to its own longest",
    )
    args = parser.parse_args()
    args.lr = args.lr or (5e-5 if args.method == "full" else 1e-3)
    if args.alpha is None and args.method in ("lora", "conv_lora"):
        args.alpha = 16
    args.length = args.length or MAX_LENGTH[args.task]
    return args


def main() -> None:
    args = parse_args()
    show = Console(stderr=True)
    keras.utils.set_random_seed(args.seed)
    tokenizer = keras_hub.models.BertTokenizer.from_preset(
        preset_folder(), strip_accents=True
    )

    def load(split: str) -> tuple[Inputs, np.ndarray]:
        first, second, labels = read(args.data, args.task, split)
        return encode(tokenizer, first, second, args.length), labels

    data = load("train")
    dev = load(EVALUATION_SPLIT[args.task])
    model = build_classifier()
    adapt(model, args, show)
    trainable = {
        "backbone": count(model.backbone.trainable_variables),
        "head": count(model.output_dense.trainable_variables),
        "total": count(model.trainable_variables),
    }
    show.print("trainable parameters:", trainable)
    history = train(model, data, dev, args, show)
    gates = gate_means(model, dev[0])
    settings = {**vars(args), "option": dict(args.option)}
    del settings["data"]
    result = {
        "benchmark": "glue",
        "backend": keras.backend.backend(),
        **settings,
        "padded_length": data[0]["token_ids"].shape[1],
        "trainable": trainable,
        **{k: v for k, v in history[-1].items() if k != "epoch"},
        "history": history,
        **({"gates": gates} if gates else {}),
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
