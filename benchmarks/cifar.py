"""ResNet20 adapted from clean CIFAR-10 to JPEG images, method by method.

Usage: KERAS_BACKEND=jax python benchmarks/cifar.py --data DIR
Prints a table of trained parameters and test accuracy on stderr and a JSON
line for each method on stdout.
"""

import argparse
import json
import time
from collections.abc import Callable

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_spectral as ks
from keras_spectral.course.resnet import data_folder
from keras_spectral.course.resnet import load_resnet
from keras_spectral.course.resnet import read_images


def train_only(model: keras.Model, chosen: Callable) -> None:
    """Trains the layers that `chosen` picks and nothing else."""
    for layer in model.layers:
        layer.trainable = bool(chosen(layer))


def is_norm(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization)


def block(model: keras.Model, number: int) -> Callable:
    """Picks the layers of one residual block: surgical fine-tuning."""
    names = [x.name for x in model.layers if x.name.startswith("layer")]
    blocks = list(dict.fromkeys(name.rsplit("_", 1)[0] for name in names))
    return lambda layer: layer.name.startswith(f"{blocks[number]}_")


def wrap(method: str, **options) -> Callable[[keras.Model], None]:
    """Adapters on all convolutions; batch norms keep their statistics."""

    def adapt(model):
        ks.wrap_model(model, method, target="conv", **options)

    return adapt


# Name: what makes the model train it, and the learning rate.
METHODS: dict[str, tuple[Callable[[keras.Model], None], float]] = {
    "none": (lambda m: train_only(m, lambda x: False), 0.0),
    "full": (lambda m: train_only(m, lambda x: True), 1e-3),
    "first block": (lambda m: train_only(m, block(m, 0)), 1e-3),
    "last block": (lambda m: train_only(m, block(m, -1)), 1e-3),
    "batch norm": (lambda m: train_only(m, is_norm), 1e-3),
    "conv_lora channel r=4": (wrap("conv_lora", rank=4), 3e-3),
    "conv_lora loralib r=1": (
        wrap("conv_lora", rank=1, factorization="loralib"),
        3e-3,
    ),
    "spectral additive r=4": (wrap("spectral", rank=4), 3e-4),
    "spectral rotate r=8": (wrap("spectral", rank=8, mode="rotate"), 3e-3),
    "spectral values": (wrap("spectral", mode="values"), 3e-3),
    "gated_spectral k=16": (
        wrap("gated_spectral", directions=16, l1=1e-5),
        3e-3,
    ),
}


def run(name: str, data: tuple, test: tuple, args) -> dict:
    """Trains one method from the pretrained weights and scores it."""
    keras.utils.set_random_seed(args.seed)
    model = load_resnet(args.depth, data_folder(args.data))
    adapt, rate = METHODS[name]
    adapt(model)
    steps = args.epochs * -(-len(data[1]) // args.batch)
    schedule = keras.optimizers.schedules.CosineDecay(rate or 1e-3, steps)
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=1e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.time()
    if model.trainable_weights:
        images = augment(data[0], args.seed)
        model.fit(
            images,
            data[1],
            batch_size=args.batch,
            epochs=args.epochs,
            verbose=0,
        )
    seconds = time.time() - start
    _, accuracy = model.evaluate(*test, batch_size=500, verbose=0)
    return {
        "benchmark": "cifar",
        "method": name,
        "backend": keras.backend.backend(),
        "depth": args.depth,
        "trainable": sum(
            int(np.prod(w.shape)) for w in model.trainable_weights
        ),
        "accuracy": round(float(accuracy), 4),
        "seconds": round(seconds, 1),
        "examples": len(data[1]),
        "epochs": args.epochs,
        "lr": rate,
        "seed": args.seed,
    }


def augment(images: np.ndarray, seed: int) -> np.ndarray:
    """Mirrors half of the images and shifts each by up to 4 pixels."""
    rng = np.random.default_rng(seed)
    padded = np.pad(images, [(0, 0), (4, 4), (4, 4), (0, 0)])
    moved = np.empty_like(images)
    for i, (dy, dx) in enumerate(rng.integers(0, 9, (len(images), 2))):
        moved[i] = padded[i, dy : dy + 32, dx : dx + 32]
    mirrored = rng.random(len(images)) < 0.5
    moved[mirrored] = moved[mirrored, :, ::-1]
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="folder that holds vision/ and weights/")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--depth", type=int, choices=(20, 32, 56), default=20)
    add("--examples", type=int, default=50000, help="training images used")
    add("--test-examples", type=int, default=10000)
    add("--epochs", type=int, default=3)
    add("--batch", type=int, default=128)
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    show = Console(stderr=True)
    folder = data_folder(args.data)
    rows = np.random.default_rng(args.seed).permutation(50000)[: args.examples]
    data = read_images(folder, "train", rows)
    test = read_images(folder, "test", np.arange(args.test_examples))
    table = Table(title=f"ResNet{args.depth}, clean CIFAR-10 to JPEG")
    for column in ("method", "trained", "test accuracy", "seconds"):
        table.add_column(
            column, justify="left" if column == "method" else "right"
        )
    for name in track(args.methods, "methods", console=show):
        result = run(name, data, test, args)
        print(json.dumps(result), flush=True)
        table.add_row(
            name,
            f"{result['trainable']:,}",
            f"{100 * result['accuracy']:.2f} %",
            f"{result['seconds']:.0f}",
        )
    show.print(table)


if __name__ == "__main__":
    main()
