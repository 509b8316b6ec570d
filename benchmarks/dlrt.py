"""Dynamical low-rank training on images, beside the whole network.

Usage:
    python benchmarks/dlrt.py --data DIR --theta 0.05 0.1 0.2
    python benchmarks/dlrt.py --digits --epochs 60 --batch 32 --fixed 14
On Fashion-MNIST, or on scikit-learn's digits (1,347 train, 450 test), which it
brings along. Three Dense layers (512, 512, 10), trained whole by SGD,
then from the same start as `U S V^T`; the last layer stays whole. Prints a
JSON line for each: test accuracy, ranks, weights and seconds of an epoch.
Choose the backend by KERAS_BACKEND.
"""

import argparse
import json
import time

import keras
import numpy as np
from transfer import build
from transfer import read

import keras_spectral as ks

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def digits() -> tuple[np.ndarray, ...]:
    """Images (n, 64) from 0 to 1 and labels, of training and test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = (found.data / 16).astype("float32")[order], found.target[order]
    return x[:1347], y[:1347], x[1347:], y[1347:]


def train(model: keras.Model, data: tuple, args, momentum: float) -> float:
    """Trains with a falling rate; returns the seconds of an epoch."""
    x, y, *_ = data
    steps = args.epochs * -(-len(x) // args.batch)
    rate = keras.optimizers.schedules.CosineDecay(args.rate, steps)
    sgd = keras.optimizers.SGD(rate, momentum)
    model.compile(sgd, LOSS, metrics=["accuracy"])
    start = time.monotonic()
    model.fit(x, y, args.batch, args.epochs, verbose=args.verbose)
    return (time.monotonic() - start) / args.epochs


def report(name: str, model: keras.Model, data: tuple, whole: int, **more):
    *_, x, y = data
    model.compile(loss=LOSS, metrics=["accuracy"])
    accuracy = model.evaluate(x, y, verbose=0, return_dict=True)["accuracy"]
    left = model.count_params()
    row = {"model": name, "accuracy": round(100 * accuracy, 2)}
    row |= {"weights": left, "removed": round(100 * (1 - left / whole), 1)}
    print(json.dumps({**row, **more}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--theta", type=float, nargs="*", default=[0.1])
    parser.add_argument("--fixed", type=int, nargs="*", default=[])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", type=int, default=0)
    args = parser.parse_args()
    data = digits() if args.digits else read(args.data)
    keras.utils.set_random_seed(args.seed)
    model = build(args.width, data[0].shape[1])
    start, whole = model.get_weights(), model.count_params()
    seconds = round(train(model, data, args, args.momentum), 1)
    report("whole", model, data, whole, seconds=seconds)
    model.set_weights(start)
    runs = [(f"theta {t}", args.rank, t) for t in args.theta]
    runs += [(f"rank {r}", r, None) for r in args.fixed]
    for name, rank, theta in runs:
        trainer = ks.dlrt(model, rank, theta, exclude="logits")
        seconds = round(train(trainer, data, args, 0.0), 1)
        more = {"ranks": trainer.ranks(), "seconds": seconds}
        small = ks.finalize_dlrt(trainer)
        report(name, small, data, whole, **more)


if __name__ == "__main__":
    main()
