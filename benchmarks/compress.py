"""Compression of CIFAR ResNets and of MiniLM: accuracy, size, speed.

Usage: python benchmarks/compress.py accuracy --data DIR --depth 20
       python benchmarks/compress.py recover --data DIR --depth 20
       python benchmarks/compress.py times --data DIR --depth 20
       python benchmarks/compress.py speed
"alds" takes slices where they are fast, as by default, "alds-any" any number.
Each prints a table on stderr and JSON lines on stdout. Choose the backend by
KERAS_BACKEND.
"""

import argparse
import json
import statistics
import time

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_spectral as ks
from keras_spectral.course.resnet import data_folder
from keras_spectral.course.resnet import load_resnet
from keras_spectral.course.resnet import read_images

METHODS = ("uniform", "energy", "global", "alds", "alds-any", "sensitivity-any")
MOST_SLICES = 64
QUIET = Console(quiet=True)
SHOW = Console(stderr=True)


def emit(**result) -> None:
    """One JSON line."""
    head = {"benchmark": "compress", "backend": keras.backend.backend()}
    print(json.dumps({**head, **result}), flush=True)


def compile_for(model: keras.Model, rate: float | None = None) -> None:
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=1e-4) if rate else None,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def accuracy_of(model: keras.Model, test: tuple) -> float:
    compile_for(model)
    return float(model.evaluate(*test, batch_size=500, verbose=0)[1])


def compressed(model: keras.Model, ratio: float, method: str, **options):
    name, _, every = method.partition("-")  # any slices
    if every:
        options["max_slices"] = MOST_SLICES
    return ks.compress_model(model, ratio, method=name, **options)


def accuracy(args) -> None:
    """Test accuracy after compression alone."""
    folder = data_folder(args.data)
    test = read_images(folder, "test", np.arange(args.test_examples))
    model = load_resnet(args.depth, folder)
    whole = accuracy_of(model, test)
    emit(depth=args.depth, method="none", ratio=0.0, accuracy=whole)
    table = Table(title=f"ResNet{args.depth}, whole: {100 * whole:.2f} %")
    table.add_column("removed")
    data = None
    if args.calibration:
        rows = np.arange(args.calibration)
        data = read_images(folder, "train", rows)[0]
    for method in args.methods:
        table.add_column(method, justify="right")
    for ratio in track(args.ratios, "ratios", console=SHOW):
        cells = []
        for method in args.methods:
            start = time.perf_counter()
            small = compressed(model, ratio, method, calibration=data)
            seconds = time.perf_counter() - start
            report = ks.compression_report(small, QUIET)
            found = accuracy_of(small, test)
            before, after = report.weights
            flops = report.flops
            emit(
                depth=args.depth,
                method=method,
                ratio=ratio,
                calibration=args.calibration,
                accuracy=round(found, 4),
                weights=after,
                removed=round(1 - after / before, 4),
                flops=round(flops[1] / flops[0], 4),
                seconds=round(seconds, 2),
            )
            cells.append(f"{100 * found:.2f}")
        table.add_row(f"{100 * ratio:.0f} %", *cells)
    SHOW.print(table)


def recover(args) -> None:
    """Accuracy after training on the same images as the whole model."""
    folder = data_folder(args.data)
    rng = np.random.default_rng(args.seed)
    rows = rng.permutation(50000)[: args.examples]
    images, labels = read_images(folder, "train", rows)
    test = read_images(folder, "test", np.arange(args.test_examples))
    steps = args.epochs * -(-len(labels) // args.batch)
    teachers = {"original": load_resnet(args.depth, folder)}
    for name in ("none", *args.methods):
        keras.utils.set_random_seed(args.seed)
        model = load_resnet(args.depth, folder)
        if name != "none":
            model = compressed(model, args.ratios[0], name)
        before = accuracy_of(model, test)
        schedule = keras.optimizers.schedules.CosineDecay(args.lr, steps)
        trained = model
        if name != "none" and args.teacher:
            trained = ks.compression.distiller(model, teachers[args.teacher])
        compile_for(trained, schedule)
        start = time.perf_counter()
        trained.fit(
            images,
            labels,
            batch_size=args.batch,
            epochs=args.epochs,
            verbose=0,
        )
        if name == "none":
            teachers["tuned"] = model
        emit(
            depth=args.depth,
            method=name,
            teacher=args.teacher if name != "none" else None,
            ratio=args.ratios[0] if name != "none" else 0.0,
            before=round(before, 4),
            accuracy=round(accuracy_of(model, test), 4),
            examples=len(labels),
            epochs=args.epochs,
            lr=args.lr,
            seconds=round(time.perf_counter() - start, 1),
        )


def times(args) -> None:
    """CPU time of 256 images and accuracy, whole and compressed, in turn."""
    folder = data_folder(args.data)
    test = read_images(folder, "test", np.arange(args.test_examples))
    images = test[0][:256]
    data = read_images(folder, "train", np.arange(512))[0]
    models = {"whole": load_resnet(args.depth, folder)}
    calibrated = ("sensitivity", "alds", "energy")
    options = {
        **{
            f"{name}, calibrated": {"method": name, "calibration": data}
            for name in calibrated
        },
        "sensitivity, any slices": {
            "method": "sensitivity-any",
            "calibration": data,
        },
        "a fifth of the time": {"method": "energy", "measure": "latency"},
        **{name: {"method": name} for name in args.methods},
    }
    for name, own in options.items():
        own = {"batch_size": len(images), **own}  # layers are timed so
        ratio = 0.2 if "measure" in own else args.ratios[0]
        try:
            models[name] = compressed(models["whole"], ratio, **own)
        except ValueError as error:  # no pair is so fast, or none was measured
            SHOW.print(f"{name}: {error}")
    rounds: dict[str, list] = {name: [] for name in models}
    for _ in track(range(args.repeats + 1), "rounds", console=SHOW):
        for name, model in models.items():
            start = time.process_time()
            model.predict_on_batch(images)
            rounds[name].append(time.process_time() - start)
    table = Table(title=f"ResNet{args.depth}, {args.ratios[0]:.0%} removed")
    for heading in ("method", "CPU ms", "to whole", "weights", "accuracy"):
        table.add_column(heading, justify="right")
    for name, model in models.items():
        pairs = list(zip(rounds[name], rounds["whole"]))[1:]
        row = {
            "ms": round(1e3 * statistics.median(a for a, _ in pairs), 1),
            "ratio": round(statistics.median(a / b for a, b in pairs), 3),
            "weights": model.count_params(),
            "accuracy": accuracy_of(model, test),
        }
        emit(depth=args.depth, removed=args.ratios[0], method=name, **row)
        table.add_row(name, *(f"{value:,.4g}" for value in row.values()))
    SHOW.print(table)


def speed(args) -> None:
    """Forward pass of MiniLM, whole and compressed, side by side."""
    from _minilm import build_classifier

    model = build_classifier()
    shape = (32, 128)
    inputs = {
        "token_ids": np.random.default_rng(0).integers(1000, 30000, shape),
        "segment_ids": np.zeros(shape, "int32"),
        "padding_mask": np.ones(shape, "int32"),
    }
    start = time.perf_counter()
    small = ks.compress_model(
        model, args.ratios[0], method="alds", target="all-linear"
    )
    seconds = time.perf_counter() - start
    times: dict[str, list] = {"whole": [], "small": []}
    pair = {"whole": model, "small": small}
    for _ in track(range(args.repeats + 1), "rounds", console=SHOW):
        for name, candidate in pair.items():
            start = time.perf_counter()
            candidate.predict_on_batch(inputs)
            times[name].append(time.perf_counter() - start)
    best = {name: min(values[1:]) for name, values in times.items()}
    middle = {n: statistics.median(v[1:]) for n, v in times.items()}
    emit(
        case="minilm forward 32 x 128",
        ratio=args.ratios[0],
        compress_seconds=round(seconds, 2),
        weights=[m.count_params() for m in (model, small)],
        milliseconds={n: round(1000 * v, 1) for n, v in middle.items()},
        minima={n: round(1000 * v, 1) for n, v in best.items()},
        speedup=round(middle["whole"] / middle["small"], 3),
        speedup_of_minima=round(best["whole"] / best["small"], 3),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=("accuracy", "recover", "times", "speed"))
    add("--data", help="folder that holds vision/ and weights/")
    add("--depth", type=int, choices=(20, 32, 56), default=20)
    add("--methods", nargs="+", choices=METHODS, default=METHODS[:-1])
    add("--ratios", nargs="+", type=float, help="shares to remove")
    add("--test-examples", type=int, default=10000)
    add("--calibration", type=int, default=0, help="images to look at")
    add("--examples", type=int, default=50000, help="for training")
    add("--epochs", type=int, default=3)
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=1e-3)
    add("--teacher", choices=("original", "tuned"), help="to recover from")
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=15)
    args = parser.parse_args()
    if args.ratios is None:
        args.ratios = [0.1, 0.25, 0.5, 0.75]
        if args.what != "accuracy":
            args.ratios = [0.5]
    runs = {"accuracy": accuracy, "recover": recover}
    {**runs, "times": times, "speed": speed}[args.what](args)


if __name__ == "__main__":
    main()
