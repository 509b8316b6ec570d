"""What several adapters on one model cost: switching, and those that are off.

Usage: KERAS_BACKEND=jax python benchmarks/several.py
Prints CPU milliseconds (medians) to switch 224 adapters in 112 layers, and
those of a step and of a prediction with one adapter on and 0 to 3 others off,
timed in turn; ratios are medians of the ratios within a round.
"""

import argparse
import statistics
import time

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_spectral as ks


def model_with(
    names: list[str], width: int, depth: int, rank: int
) -> keras.Model:
    """A stack of Dense layers with LoRAs, compiled, the first one active."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((width,))]
    for i in range(depth):
        layers.append(keras.layers.Dense(width, "relu", name=f"dense_{i}"))
    model = keras.Sequential(layers)
    for name in names:
        ks.wrap_model(model, "lora", "dense_.*", rank=rank, adapter=name)
    ks.set_adapters(model, names[0])
    model.compile("adam", "mse")
    return model


def milliseconds(function, *args, **kwargs) -> float:
    start = time.process_time()
    function(*args, **kwargs)
    return 1000 * (time.process_time() - start)


def switching(rounds: int) -> dict[str, float]:
    """Milliseconds to switch, with and without another optimizer."""
    names = ["a", "b"]
    model, found = model_with(names, 16, 112, 2), {}
    inputs = np.zeros((2, 16), "float32")
    for name in names:
        ks.set_adapters(model, name)
        model.fit(inputs, inputs, verbose=0)
    for label, options in (
        ("what is active trains", {}),
        ("nothing trains", {"train": []}),
    ):
        times = [
            milliseconds(ks.set_adapters, model, name, **options)
            for _ in range(rounds)
            for name in names
        ]
        found[label] = statistics.median(times)
    return found


def beside_others(width: int, batch: int, rounds: int) -> dict:
    """For each number of adapters the milliseconds of each round."""
    counts = [1, 2, 4]
    models = {
        count: model_with([f"a{i}" for i in range(count)], width, 4, 8)
        for count in counts
    }
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(batch, width)).astype("float32")

    def step(model):
        for _ in range(4):
            model.train_on_batch(inputs, inputs)

    def predict(model):
        for _ in range(4):
            model.predict_on_batch(inputs)

    found = {}
    for way in (step, predict):
        times = {count: [] for count in counts}
        for round_number in range(rounds + 1):
            for count, model in models.items():
                taken = milliseconds(way, model) / 4
                if round_number:  # the first one compiles
                    times[count].append(taken)
        found[way.__name__] = times
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    console, backend = Console(), keras.backend.backend()
    for label, taken in switching(args.rounds).items():
        console.print(
            f"{backend}: switching 224 adapters {taken:.1f} ms ({label})"
        )
    table = Table(
        title=f"{backend}: one LoRA on, others off, {args.width} wide, "
        f"batch {args.batch}"
    )
    for column in ("", "adapters", "ms", "beside one alone"):
        table.add_column(column)
    found = beside_others(args.width, args.batch, args.rounds)
    for way, times in found.items():
        for count, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times[1])]
            table.add_row(
                way,
                str(count),
                f"{statistics.median(taken):.1f}",
                f"{statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
            )
    console.print(table)


if __name__ == "__main__":
    main()
