"""One call of `model.evaluate` for every form of data."""

from typing import Any

import keras


def evaluate(model: keras.Model, data: Any) -> dict[str, float]:
    """The loss and every metric, by name.

    Args:
        model: A compiled model.
        data: What `model.evaluate` takes as first argument, or a tuple
            `(x, y)` or `(x, y, sample_weight)`.
    """
    arrays = data if isinstance(data, tuple) else (data,)
    named = dict(zip(("x", "y", "sample_weight"), arrays))
    return model.evaluate(**named, verbose=0, return_dict=True)
