"""Weight transfer on Fashion-MNIST: a low-rank pair takes over an MLP.

Usage: python benchmarks/transfer.py --data DIR --start svd --rank 16
Trains an MLP of three Dense layers, then lets pairs take over while the
original fades, and turns them into factorised layers. Prints one JSON line
with the curves of every epoch. Choose the backend by KERAS_BACKEND.
"""

import argparse
import json

import keras
import numpy as np
from rich.console import Console
from rich.progress import track

import keras_spectral as ks
from keras_spectral.course.data import fashion
from keras_spectral.course.data import source


def read(folder: str | None) -> tuple[np.ndarray, ...]:
    """Images (n, 784) from 0 to 1 and labels, of training and test."""
    data = fashion(folder or source() or "tfds")
    flat = [x.reshape(len(x), -1) for x in (data.x, data.test_x)]
    return flat[0], data.y, flat[1], data.test_y


def build(width: int, inputs: int = 784) -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(width, "relu", name="first"),
            layers.Dense(width, "relu", name="second"),
            layers.Dense(10, name="logits"),
        ]
    )


def prepare(model: keras.Model, rate: float) -> None:
    """Compiles with Adam."""
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def falling_rate(first: int, epochs: int) -> keras.callbacks.Callback:
    """Lets the rate fall linearly from epoch `first`, to 0 after the last."""

    def rate(epoch: int, now: float) -> float:
        left = epochs - epoch
        return now * left / (left + 1) if epoch >= first else now

    return keras.callbacks.LearningRateScheduler(rate)


def run(seed: int, data: tuple, args) -> dict:
    """One original, taken over and finished."""
    keras.utils.set_random_seed(seed)
    x, y, test_x, test_y = data
    test = (test_x, test_y)
    model = build(args.width)
    steps = -(-len(x) // args.batch)
    prepare(model, 1e-3)
    options = {"batch_size": args.batch, "verbose": 0}
    epochs = args.original_epochs
    falling = falling_rate(0 if args.original_falls else epochs, epochs)
    model.fit(x, y, epochs=epochs, callbacks=[falling], **options)
    original = model.evaluate(*test, verbose=0, batch_size=1000)[1]
    ks.wrap_model(
        model,
        "decaying_lora",
        target=["first", "second", "logits"],
        rank=args.rank,
        initializer=args.start,
        residual=args.residual,
        start_step=args.decay_from * steps,
        end_step=args.decay_to * steps,
        overrides={"logits": {"rank": min(args.rank, 10)}},
    )
    prepare(model, args.lr)
    callbacks = [
        ks.callbacks.TransferMonitor(test),
        falling_rate(args.fall_from, args.epochs),
    ]
    history = model.fit(
        x, y, epochs=args.epochs, callbacks=callbacks, **options
    ).history
    ks.finalize_transfer(model)
    prepare(model, args.lr)
    finished = model.evaluate(*test, verbose=0, batch_size=1000)[1]
    names = ("val_accuracy", "val_adapter_accuracy", "decay")
    return {
        "seed": seed,
        "original": round(original, 4),
        "finished": round(finished, 4),
        "weights": model.count_params(),
        **{n: [round(float(v), 4) for v in history[n]] for n in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="folder that holds vision/fashion_mnist.npz")
    add("--start", choices=("svd", "fan_in", "zeros"), default="svd")
    add("--residual", choices=("truncated", "full"), default="truncated")
    add("--rank", type=int, default=64)
    add("--width", type=int, default=512)
    add("--original-epochs", type=int, default=10)
    add("--epochs", type=int, default=30)
    add("--decay-from", type=int, default=4, help="epoch")
    add("--decay-to", type=int, default=27, help="epoch")
    add("--batch", type=int, default=128)
    add("--lr", type=float, default=1e-3)
    add(
        "--fall-from",
        type=int,
        default=30,
        help="epoch from which the rate falls to 0; default: never",
    )
    add(
        "--original-falls",
        action="store_true",
        help="the original trains with a falling rate as well",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    data = read(args.data)
    show = Console(stderr=True)
    runs = [
        run(s, data, args) for s in track(args.seeds, "seeds", console=show)
    ]
    settings = {k: v for k, v in vars(args).items() if k != "data"}
    print(
        json.dumps(
            {
                "benchmark": "transfer",
                "backend": keras.backend.backend(),
                **settings,
                "original": float(np.mean([r["original"] for r in runs])),
                "finished": float(np.mean([r["finished"] for r in runs])),
                "runs": runs,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
