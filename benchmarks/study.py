"""Learning rates and accuracy of every method on one small real task.

Usage:
    python benchmarks/study.py run --out study.jsonl --data DIR
    python benchmarks/study.py table --out study.jsonl
    python benchmarks/study.py plot --out study.jsonl --picture study.png

MiniLM-L6 on 1,000 sentences of SST-2, two epochs in batches of 16, float32.
Each method is trained with seed 0 at five rates, from the lowest up to one
that breaks the training, and scored on 500 other training sentences; the best
of them then trains with seeds 1 and 2 as well and is scored on the test split.
A run is a line of the file: what is there is not run again, so the script can
be stopped at any time and started with other methods in a second process.
"""

import argparse
import gc
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

EXAMPLES, HELD_OUT, EPOCHS, BATCH, LENGTH = 1000, 500, 2, 16, 96
SEEDS = (0, 1, 2)
LOW = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
MIDDLE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
HIGH = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
QUERY_VALUE: dict[str, Any] = {"target": "attention", "rank": 8}
# Name in the table: method, options, rates. Query and value layers and rank 8
# where a method has a rank; otherwise the method's own defaults.
METHODS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "lora": ("lora", QUERY_VALUE | {"alpha": 16}, MIDDLE),
    "full": ("full", {}, LOW),
    "head": ("head", {}, HIGH),
    "dora": ("dora", QUERY_VALUE | {"alpha": 16}, MIDDLE),
    "ia3": ("ia3", {}, HIGH),
    "vera": ("vera", QUERY_VALUE | {"rank": 256}, HIGH),
    "spectral": ("spectral", QUERY_VALUE, MIDDLE),
    "oft": ("oft", {"target": "attention"}, MIDDLE),
    "bottleneck": ("bottleneck", {}, MIDDLE),
    "bitfit": ("bitfit", {}, HIGH),
    "prefix": ("prefix", {}, HIGH),
    "ssf": ("ssf", {"target": "all-linear"}, HIGH),
    "lokr": ("lokr", QUERY_VALUE, MIDDLE),
    "gated_spectral": ("gated_spectral", {"target": "all-linear"}, HIGH),
    "unipelt": ("unipelt", {}, MIDDLE),
    "boft": ("boft", {"target": "attention"}, MIDDLE),
    "loha": ("loha", QUERY_VALUE, MIDDLE),
    "red": ("red", {}, HIGH),
    "lora_fa": ("lora_fa", QUERY_VALUE | {"alpha": 16}, MIDDLE),
    "spectral_values": (
        "spectral",
        {"target": "attention", "mode": "values"},
        HIGH,
    ),
    "pissa": ("lora", QUERY_VALUE | {"initializer": "pissa"}, MIDDLE),
    "tuned_norm": ("tuned_norm", {}, HIGH),
    "glora": ("glora", {"target": "attention"}, MIDDLE),
    "lidb": ("lidb", {"target": "attention"}, HIGH),
    "spectral_rotate": (
        "spectral",
        QUERY_VALUE | {"mode": "rotate"},
        HIGH,
    ),
    "orthogonal_adaptation": ("orthogonal_adaptation", QUERY_VALUE, MIDDLE),
    "adalora": ("adalora", QUERY_VALUE | {"alpha": 32}, MIDDLE),
    "dylora": ("dylora", QUERY_VALUE, MIDDLE),
    "deep_lora": ("deep_lora", QUERY_VALUE, MIDDLE),
    "conditional_spectral": (
        "conditional_spectral",
        {"target": "all-linear"},
        HIGH,
    ),
    "soft_prompt": ("soft_prompt", {}, HIGH),
}
# A rate this far below a lower one's accuracy ends the search upwards.
TOO_HIGH = 0.1
# Beyond the classifier's layer of 770 weights, which trains in every method.
HEAD_WEIGHTS = 770


class Case:
    """The examples of the study, tokenised once."""

    def __init__(self, folder: str | None):
        import keras_hub
        import numpy as np
        from _glue import encode
        from _glue import read
        from _minilm import preset_folder

        tokenizer = keras_hub.models.BertTokenizer.from_preset(
            preset_folder(), strip_accents=True
        )
        rows = np.random.default_rng(0).permutation(6920)
        first, second, labels = read(folder, "sst2", "train")
        whole = encode(tokenizer, first, second, LENGTH), labels
        self.train = take(*whole, rows[:EXAMPLES])
        self.held_out = take(*whole, rows[EXAMPLES : EXAMPLES + HELD_OUT])
        first, second, labels = read(folder, "sst2", "test")
        self.test = encode(tokenizer, first, second, LENGTH), labels


def take(inputs: dict, labels, rows) -> tuple[dict, Any]:
    return {k: array[rows] for k, array in inputs.items()}, labels[rows]


def build(name: str, seed: int, case: Case) -> Any:
    """The classifier with the method around it, drawn by the seed."""
    import keras
    from _minilm import build_classifier

    import keras_spectral as ks

    keras.utils.set_random_seed(seed)
    model = build_classifier()
    method, options, _ = METHODS[name]
    if method == "head":
        for layer in model.backbone.layers:
            layer.trainable = layer is model.backbone.pooled_dense
    elif method != "full":
        if method == "deep_lora":
            options = options | {"gradients": first_gradients(model, case)}
        ks.wrap_model(model, method, **options)
    return model


def first_gradients(model: Any, case: Case) -> dict:
    """The kernels' gradients on 64 training sentences."""
    import numpy as np

    import keras_spectral as ks

    data = take(*case.train, np.arange(64))
    return ks.kernel_gradients(model, data, "attention", batch_size=64)


def make_optimizer() -> Any:
    """Adam whose rate rises and falls; the peak is a variable.

    So all rates and seeds of a method run in one compiled step.
    """
    import keras
    from keras import ops

    steps = EPOCHS * -(-EXAMPLES // BATCH)
    rise = int(0.06 * steps)

    class Scheduled(keras.optimizers.Adam):
        def update_step(self, gradient, variable, learning_rate):
            step = ops.cast(self.iterations, "float32")
            share = ops.minimum(step / rise, (steps - step) / (steps - rise))
            super().update_step(gradient, variable, learning_rate * share)

    return Scheduled(1e-3, global_clipnorm=1.0)


class Trainer:
    """Trains one method again and again from its start."""

    def __init__(self, name: str, case: Case):
        import keras

        self.name, self.case, self.held = name, case, {}
        self.model = build(name, 0, case)
        self.seed = 0
        self.start = values_of(self.model)
        self.model.compile(
            make_optimizer(),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        self.clean: list | None = None

    def train(self, rate: float, seed: int) -> float:
        """Trains from the seed's start; returns CPU ms a step, epoch 2."""
        import keras
        import numpy as np
        from _glue import Batches
        from _glue import grouped_batches

        import keras_spectral as ks

        if seed != self.seed:
            self.start = values_of(build(self.name, seed, self.case))
            self.seed = seed
            gc.collect()
        for variable, value in zip(self.model.variables, self.start):
            variable.assign(value)
        optimizer = self.model.optimizer
        optimizer.build(self.model.trainable_variables)
        for variable in optimizer.variables:
            variable.assign(np.zeros(variable.shape, variable.dtype))
        optimizer.learning_rate = rate
        rng = np.random.default_rng(seed)
        inputs, labels = self.case.train
        plan = [
            grouped_batches(rng.permutation(EXAMPLES), inputs, BATCH, rng)
            for _ in range(EPOCHS)
        ]
        marks: list[float] = []
        clock = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: marks.append(time.process_time())
        )
        callbacks: list[Any] = [clock]
        if self.name == "adalora":
            steps = EPOCHS * len(plan[0])
            callbacks.append(ks.callbacks.RankBudget(4, total_steps=steps))
        keras.Model.fit(
            self.model,
            Batches(inputs, labels, plan, True),
            epochs=EPOCHS,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        return 1e3 * (time.process_time() - marks[-1]) / len(plan[-1])

    def accuracy(self, split: str) -> float:
        """Share of right answers, batches sorted by length."""
        logits, labels = self.logits(*getattr(self.case, split))
        return float((logits.argmax(-1) == labels).mean())

    def logits(self, inputs: dict, labels) -> tuple[Any, Any]:
        import keras
        import numpy as np
        from _glue import Batches
        from _glue import lengths
        from _glue import plain_batches

        order = np.argsort(lengths(inputs), kind="stable")
        # Whole batches, so that one shape a length is compiled.
        extra = -len(order) % BATCH
        order = np.concatenate([order, order[-1:].repeat(extra)])
        plan = [plain_batches(order, BATCH)]
        batches = Batches(inputs, labels, plan, True)
        logits = keras.Model.predict(self.model, batches, verbose=0)
        count = len(labels)
        return logits[:count], labels[order[:count]]

    def merge_error(self) -> float | None:
        """Largest difference of logits of the merged model, relative."""
        import numpy as np

        import keras_spectral as ks

        inputs, labels = take(*self.case.held_out, np.arange(64))
        before, _ = self.logits(inputs, labels)
        try:
            self.model = ks.merge_model(self.model)
        except (TypeError, ValueError):
            return None
        after, _ = self.logits(inputs, labels)
        return float(np.abs(after - before).max() / np.abs(before).max())


def values_of(model: Any) -> list:
    import keras

    return [keras.ops.convert_to_numpy(v).copy() for v in model.variables]


def read_lines(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def run(args: argparse.Namespace, show: Console) -> None:
    """A process a method, so that its peak memory is its own."""
    for name in args.methods or METHODS:
        if next_run(name, read_lines(args.out)) is None:
            continue
        show.print(name)
        command = [sys.executable, __file__, "one", "--out", str(args.out)]
        command += ["--methods", name]
        command += ["--data", args.data] if args.data else []
        done = subprocess.run(command)
        if done.returncode:
            show.print(f"{name} ended with {done.returncode}")


def next_run(name: str, lines: list[dict]) -> tuple[float, int] | None:
    """The rate and seed to run next, None where the method is done."""
    mine = [line for line in lines if line["method"] == name]
    done = {(line["rate"], line["seed"]) for line in mine}
    scores = {x["rate"]: x["held_out"] for x in mine if x["seed"] == 0}
    for rate in METHODS[name][2]:
        if rate not in scores:
            return rate, 0
        if scores[rate] < max(scores.values()) - TOO_HIGH and rate > best_rate(
            name, mine
        ):
            break
    best = best_rate(name, mine)
    for seed in SEEDS[1:]:
        if (best, seed) not in done:
            return best, seed
    return None


def best_rate(name: str, lines: list[dict]) -> float:
    """The rate whose held-out accuracy with seed 0 is highest."""
    mine = [x for x in lines if x["method"] == name and x["seed"] == 0]
    return max(mine, key=lambda line: line["held_out"])["rate"]


def one(args: argparse.Namespace, show: Console) -> None:
    """All runs of one method that are not in the file."""
    import keras
    from _minilm import count

    case = Case(args.data)
    (name,) = args.methods
    trainer = Trainer(name, case)
    weights = count(trainer.model.trainable_variables) - HEAD_WEIGHTS
    while (todo := next_run(name, read_lines(args.out))) is not None:
        rate, seed = todo
        began = time.time()
        step = trainer.train(rate, seed)
        held_out = trainer.accuracy("held_out")
        scores = (
            x["held_out"] for x in read_lines(args.out) if x["method"] == name
        )
        best = seed > 0 or held_out > max(scores, default=0.0)
        line = {
            "method": name,
            "rate": rate,
            "seed": seed,
            "held_out": held_out,
            # What is not the best so far is never asked for its test score.
            "test": trainer.accuracy("test") if best else None,
            "weights": weights,
            "step_ms": round(step, 1),
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            // 1024,
            "backend": keras.backend.backend(),
        }
        if next_run(name, [*read_lines(args.out), line]) is None:
            line["merge_error"] = trainer.merge_error()
        line["seconds"] = round(time.time() - began, 1)
        with open(args.out, "a", encoding="utf8") as file:
            file.write(json.dumps(line) + "\n")
        show.print(line, highlight=False)


def summarise(lines: list[dict]) -> list[dict]:
    """A row a method, best accuracy first; the rates' scores by rate."""
    rows = []
    for name in METHODS:
        mine = [line for line in lines if line["method"] == name]
        if next_run(name, mine) is not None:
            continue
        best = best_rate(name, mine)
        chosen = [line for line in mine if line["rate"] == best]
        tests = [line["test"] for line in chosen]
        errors = [line.get("merge_error") for line in chosen]
        rates = METHODS[name][2]
        rows.append(
            {
                "method": name,
                "rate": best,
                "edge": best in (rates[0], rates[-1]),
                "accuracy": statistics.mean(tests),
                "low": min(tests),
                "high": max(tests),
                "weights": chosen[0]["weights"],
                "step_ms": statistics.median(x["step_ms"] for x in mine),
                "memory_mb": max(line["memory_mb"] for line in mine),
                "merge_error": next((x for x in errors if x is not None), None),
                "held_out": {
                    line["rate"]: line["held_out"]
                    for line in mine
                    if line["seed"] == 0
                },
            }
        )
    return sorted(rows, key=lambda row: -row["accuracy"])


def table(args: argparse.Namespace, show: Console) -> None:
    lines = read_lines(args.out)
    found = Table(
        "method",
        "start with",
        "test accuracy %",
        "seeds",
        "weights",
        "CPU ms a step",
        "peak MB",
        "merge error",
        "held-out % by rate",
        title=f"{len(lines)} runs",
    )
    for row in summarise(lines):
        error = row["merge_error"]
        rates = sorted(row["held_out"].items())
        found.add_row(
            row["method"],
            f"{row['rate']:g}" + (" (edge)" if row["edge"] else ""),
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['weights']:,}",
            f"{row['step_ms']:.0f}",
            f"{row['memory_mb']:,}",
            "does not" if error is None else f"{error:.0e}",
            ", ".join(f"{rate:g}: {100 * x:.1f}" for rate, x in rates),
        )
    show.print(found)


def draw(rows: list[dict], axes: Any) -> None:
    """Test accuracy over trained weights, a point a method.

    Args:
        rows: What `summarise` gives.
        axes: Matplotlib's.
    """
    colors = []
    for row in rows:
        mean = 100 * row["accuracy"]
        spread = [[mean - 100 * row["low"]], [100 * row["high"] - mean]]
        point = axes.errorbar(row["weights"], mean, spread, fmt="o", capsize=3)
        colors.append(point[0].get_color())
    axes.set_xscale("log")
    axes.set_xlabel("trained weights beside the head's 770")
    axes.set_ylabel("test accuracy, %, of 3 seeds")
    axes.margins(x=0.15, y=0.1)
    axes.grid(alpha=0.25)
    label(rows, colors, axes)


def label(rows: list[dict], colors: list[str], axes: Any) -> None:
    """Names beside the points, each at the nearest place that is free."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    points = [(row["weights"], 100 * row["accuracy"]) for row in rows]
    taken = [
        Bbox.from_bounds(x - 4, y - 4, 8, 8)
        for x, y in axes.transData.transform(points)
    ]
    # Right and left of the point, then around it, with a line to it.
    offsets = [(7, 0), (-7, 0)]
    for radius in (16, 28, 40, 55, 70, 90, 110):
        for degrees in (20, 160, -20, 200, 50, 130, -50, 230, 0, 180):
            angle = math.radians(degrees)
            offsets.append((radius * math.cos(angle), radius * math.sin(angle)))
    scale = axes.figure.dpi / 72
    for row, color, point in zip(rows, colors, points):
        text = axes.annotate(
            row["method"],
            point,
            (0, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=color,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "lw": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
            },
        )
        size = Text.get_window_extent(text)
        x, y = axes.transData.transform(point)
        for right, up in offsets:
            left = x + scale * right - (right < 0) * size.width
            bottom = y + scale * up - size.height / 2
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        text.set(position=(right, up), ha="left" if right > 0 else "right")
        taken.append(box)


def plot(args: argparse.Namespace, show: Console) -> None:
    """`draw` as a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    draw(summarise(read_lines(args.out)), axes)
    figure.savefig(args.picture, dpi=150)
    show.print(args.picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "one", "table", "plot"))
    parser.add_argument("--out", type=pathlib.Path, default="study.jsonl")
    parser.add_argument("--picture", default="study.png")
    parser.add_argument("--data", help="folder of TSV files")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    show = Console(stderr=True, width=None if sys.stderr.isatty() else 180)
    {"run": run, "one": one, "table": table, "plot": plot}[args.what](
        args, show
    )


if __name__ == "__main__":
    main()
