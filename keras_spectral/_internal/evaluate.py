"""Data in every form, and one call of `model.evaluate` for all of them."""

from collections.abc import Iterator
from typing import Any

import keras
from keras.src.trainers.data_adapters import get_data_adapter


def evaluate(model: keras.Model, data: Any) -> dict[str, float]:
    """The loss and every metric, by name.

    Args:
        model: A compiled model.
        data: What `model.evaluate` takes as first argument, or a tuple
            `(x, y)` or `(x, y, sample_weight)`.

    Raises:
        ValueError: There are no data.
    """
    check_data(data)
    arrays = data if isinstance(data, tuple) else (data,)
    named = dict(zip(("x", "y", "sample_weight"), arrays))
    return model.evaluate(**named, verbose=0, return_dict=True)


def metric_of(model: keras.Model, data: Any, metric: str) -> float:
    """One of the results of `evaluate`.

    Raises:
        ValueError: There is none of that name.
    """
    results = evaluate(model, data)
    if metric not in results:
        raise ValueError(
            f"Received metric={metric!r}; `model.evaluate` gives "
            f"{sorted(results)}. Expected one of these."
        )
    return float(results[metric])


def batches(data: Any, batch_size: int = 32) -> Iterator[tuple]:
    """Batches `(x, y, sample_weight)` of data in any form, in their order.

    Args:
        data: What `model.fit` takes as first argument, or a tuple `(x, y)` or
            `(x, y, sample_weight)`.
        batch_size: For arrays.
    """
    arrays = data if isinstance(data, tuple) else (data,)
    named = dict(zip(("x", "y", "sample_weight"), arrays))
    whole = keras.tree.flatten(named["x"])
    if all(hasattr(part, "shape") for part in whole):
        named["batch_size"] = batch_size
    adapter = get_data_adapter(**named, shuffle=False)
    for batch in adapter.get_numpy_iterator():
        yield keras.utils.unpack_x_y_sample_weight(batch)


def check_data(data: Any, name: str = "dataset") -> Any:
    """Raises a ValueError if arrays or a dataset hold no example."""
    parts = keras.tree.flatten(data)
    given = [part for part in parts if part is not None]
    if not given or any(_size(part) == 0 for part in given):
        shapes = [tuple(p.shape) for p in given if hasattr(p, "shape")]
        raise ValueError(
            f"Received {name}"
            + (f" of shapes {shapes}" if shapes else f"={data!r}")
            + ". Expected at least one example, as arrays or a dataset."
        )
    return data


def _size(part):
    """How many examples, where that is known."""
    if hasattr(part, "shape"):
        return part.shape[0] if len(part.shape) else None
    if isinstance(part, keras.utils.PyDataset):
        return part.num_batches
    try:
        return len(part)
    except TypeError:
        return None
