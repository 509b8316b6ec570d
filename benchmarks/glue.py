"""Accuracy of MiniLM-L6 with an adapter on a GLUE task.

Usage: python benchmarks/glue.py --task mrpc --method lora --data DIR
Prints a table of dev scores per epoch on stderr and, at the end, one JSON line
with every setting and result on stdout. Choose the backend by KERAS_BACKEND.
"""

import argparse
import ast
import json
import os
import time
from typing import Any

import keras
import keras_hub
import numpy as np
from _glue import EVALUATION_SPLIT
from _glue import MAX_LENGTH
from _glue import Batches
from _glue import Inputs
from _glue import encode
from _glue import grouped_batches
from _glue import plain_batches
from _glue import read
from _glue import scores
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


def evaluate(
    model: keras.Model, inputs: Inputs, labels: np.ndarray
) -> dict[str, float]:
    """Scores the model on the evaluation split."""
    logits = model.predict(inputs, batch_size=64, verbose=0)
    return scores(logits.astype("float64"), labels)


def evaluate_samples(
    model: keras.Model, inputs: Inputs, labels: np.ndarray, samples: int
) -> dict[str, float]:
    """Scores the average of predictions over samples of IVON's posterior."""
    mean = ks.optimizers.predict_mean(model, inputs, samples, "softmax")
    return scores(np.log(mean.astype("float64")), labels)


class ShowProgress(keras.callbacks.Callback):
    """Moves a rich progress bar on; scores and prints every `every` epochs."""

    def __init__(
        self, epochs: int, total_steps: int, dev, every: int, show: Console
    ):
        super().__init__()
        self.epochs, self.dev, self.every = epochs, dev, every
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
        if (epoch + 1) % self.every and epoch + 1 < self.epochs:
            return
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
    """AdamW or IVON, with the same warmup and decay.

    AdamW clips the gradients' norm, IVON its own steps: each weight moves by at
    most `lr * clip_radius`, where most of them do as long as h is small.
    """
    rate = WarmupLinear(args.lr, int(0.06 * steps), steps)
    if args.optimizer == "ivon":
        return ks.optimizers.IVON(
            rate,
            ess=args.ess,
            hess_init=args.hess_init,
            beta_2=args.beta_2,
            weight_decay=args.ivon_decay,
            clip_radius=args.clip_radius,
            rescale_lr=False,
            seed=args.seed,
        )
    return keras.optimizers.AdamW(
        rate, weight_decay=0.01, epsilon=1e-8, global_clipnorm=1.0
    )


def draw(
    labels: np.ndarray, args: argparse.Namespace
) -> tuple[np.random.Generator, np.ndarray]:
    """The seeded generator and the rows of the examples to train on."""
    rng = np.random.default_rng(args.seed)
    return rng, rng.permutation(len(labels))[: args.examples]


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
    rng, pool = draw(labels, args)
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
    progress = ShowProgress(
        args.epochs, total_steps, dev, args.score_every, show
    )
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
    options = method_options(args)
    ks.wrap_model(model, args.method, target=args.target, **options)
    ks.adapter_summary(model, show)


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command says about the method's own options."""
    numbers = {
        "rank": args.rank,
        "alpha": args.alpha,
        "dropout": args.dropout,
    }
    given = {name: value for name, value in numbers.items() if value}
    return {**given, **dict(args.option)}


def search(
    model: keras.Model,
    data: tuple[Inputs, np.ndarray],
    args: argparse.Namespace,
    show: Console,
) -> dict[str, Any]:
    """Lets gumbel gates choose UniPELT's parts and goes on from those."""
    inputs, labels = data
    _, pool = draw(labels, args)
    batches = (
        {name: value[pool] for name, value in inputs.items()},
        labels[pool],
    )
    model.compile(
        keras.optimizers.AdamW(args.lr),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    start = time.time()
    parts = ks.search_parts(
        model,
        batches,
        args.search_epochs,
        args.keep,
        target=args.target,
        **method_options(args),
    )
    seconds = round(time.time() - start, 1)
    ks.adapter_summary(model, show)
    return {"parts": parts, "search_seconds": seconds}


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
    add("--lr", type=float, help="default: 1e-3, for full 5e-5, IVON 2")
    add("--optimizer", choices=("adamw", "ivon"), default="adamw")
    add("--ess", type=float, default=1e7, help="IVON")
    add("--hess-init", type=float, default=3e-4, help="IVON")
    add("--ivon-decay", type=float, default=1e-6, help="IVON's weight decay")
    add("--beta-2", type=float, default=0.99999, help="IVON")
    add("--clip-radius", type=float, default=1e-3, help="IVON")
    add("--samples", type=int, help="IVON: also average over that many")
    add("--criterion", default="sensitivity", help="of AdaLoRA")
    add("--target-rank", type=float, default=2, help="of AdaLoRA, a layer")
    add("--interval", type=int, default=10, help="of AdaLoRA, steps")
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=32)
    add("--score-every", type=int, default=1, help="epochs; and the last")
    add("--search-epochs", type=int, help="search UniPELT's parts first")
    add("--keep", type=float, help="share of weights that the search keeps")
    add("--seed", type=int, default=0)
    add("--examples", type=int, help="train on that many, drawn by the seed")
    add("--length", type=int, help="longest input in tokens")
    add("--dtype", default="float32", help="dtype policy: mixed_bfloat16")
    add(
        "--group-by-length",
        action="store_true",
        help="batches of similar length, each padded to its own longest",
    )
    args = parser.parse_args()
    if args.search_epochs and args.method != "unipelt":
        parser.error("--search-epochs is for --method unipelt")
    if args.keep and not args.search_epochs:
        parser.error("--keep needs --search-epochs")
    if args.samples and args.optimizer != "ivon":
        parser.error("--samples needs --optimizer ivon")
    if args.score_every < 1:
        parser.error(f"--score-every {args.score_every}: expected 1 or more")
    rate = 5e-5 if args.method == "full" else 1e-3
    args.lr = args.lr or (2.0 if args.optimizer == "ivon" else rate)
    if args.alpha is None and args.method in ("lora", "conv_lora"):
        args.alpha = 16
    args.length = args.length or MAX_LENGTH[args.task]
    return args


def main() -> None:
    args = parse_args()
    show = Console(stderr=True)
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy(args.dtype)
    tokenizer = keras_hub.models.BertTokenizer.from_preset(
        preset_folder(), strip_accents=True
    )

    def load(split: str) -> tuple[Inputs, np.ndarray]:
        first, second, labels = read(args.data, args.task, split)
        return encode(tokenizer, first, second, args.length), labels

    data = load("train")
    dev = load(EVALUATION_SPLIT[args.task])
    model = build_classifier()
    found = {}
    if args.search_epochs:
        found = search(model, data, args, show)
    else:
        adapt(model, args, show)
    trainable = {
        "backbone": count(model.backbone.trainable_variables),
        "head": count(model.output_dense.trainable_variables),
        "total": count(model.trainable_variables),
    }
    show.print("trainable parameters:", trainable)
    history = train(model, data, dev, args, show)
    gates = gate_means(model, dev[0])
    sampled = {}
    if args.samples:
        sampled = evaluate_samples(model, *dev, args.samples)
    settings = {**vars(args), "option": dict(args.option)}
    del settings["data"]
    result = {
        "benchmark": "glue",
        "backend": keras.backend.backend(),
        **settings,
        "padded_length": data[0]["token_ids"].shape[1],
        "trainable": trainable,
        **found,
        **{k: v for k, v in history[-1].items() if k != "epoch"},
        "history": history,
        **({"gates": gates} if gates else {}),
        **({"sampled": sampled} if sampled else {}),
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "cpus": os.cpu_count(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
