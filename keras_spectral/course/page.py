"""Steps that every tutorial takes: train, measure, draw."""

import logging
import os
import pathlib
import runpy
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import rich.console
import rich.table

# Fewer epochs and examples, so that a tutorial ends in under a minute.
FAST = os.environ.get("FAST", "0") == "1"


def quiet() -> None:
    """Silences two warnings that say nothing about a tutorial's code.

    TensorFlow asks why so many models are traced: each adapted model is a new
    one. KerasHub asks for data in random order: here it is shuffled already.
    """
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`shuffle=True` was passed")


def train(
    model: keras.Model,
    x: Any,
    y: np.ndarray,
    learning_rate: float = 1e-3,
    epochs: int = 10,
    batch_size: int = 50,
    **options,
) -> dict[str, list[float]]:
    """Compiles with Adam for integer labels, fits, returns the history.

    Args:
        model: A model whose outputs are logits (batch, classes).
        x: What `fit` takes.
        y: Integer labels (n,).
        learning_rate: Of Adam.
        epochs: How often it sees the data.
        batch_size: Examples a step.
        **options: More arguments of `fit`.
    """
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    options = {"batch_size": batch_size, "epochs": epochs, **options}
    return keras.Model.fit(model, x, y, verbose=0, **options).history


def accuracy(model: keras.Model, x: Any, y: np.ndarray) -> float:
    """Share of right answers of a model whose outputs are logits."""
    logits = model.predict(x, batch_size=500, verbose=0)
    return float(np.mean(logits.argmax(axis=-1) == y))


def count(weights: Iterable[keras.Variable]) -> int:
    """The number of scalars in some weights."""
    return sum(int(np.prod(weight.shape)) for weight in weights)


def table(
    title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]
) -> None:
    """Prints rows under headings; the first column is on the left."""
    found = rich.table.Table(title=title)
    for place, heading in enumerate(headings):
        found.add_column(heading, justify="right" if place else "left")
    for row in rows:
        found.add_row(*row)
    rich.console.Console(width=96).print(found)


def draw_study(axes: Any) -> list[dict]:
    """Draws what `benchmarks/study.py` found: accuracy over weights.

    Returns:
        A row a method, see `summarise` there.
    """
    folder = pathlib.Path(__file__).parents[2] / "benchmarks"
    study = runpy.run_path(str(folder / "study.py"))
    rows = study["summarise"](study["read_lines"](folder / "study.jsonl"))
    study["draw"](rows, axes)
    return rows


def show(figure, name: str) -> None:
    """Saves a figure as `name.png` where KERAS_SPECTRAL_OUT says, or `out`."""
    folder = pathlib.Path(os.environ.get("KERAS_SPECTRAL_OUT", "out"))
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
