"""The smallest rank that is good enough, by bisection on nested ranks."""

import math
from collections.abc import Callable
from typing import Any

import keras

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.evaluate import metric_of
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.layers import DyLoRADense
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import require_adapters

Metric = str | Callable[[keras.Model, Any], float]


def search_rank(
    model: keras.Model,
    dataset: Any,
    metric: Metric = "accuracy",
    drop: float = 0.01,
    per_layer: bool = False,
    mode: str = "max",
) -> dict[str, int]:
    """Truncates DyLoRADense adapters as far as a metric allows.

    Nothing is trained: ranks are nested, so each trial only evaluates. First
    the smallest common rank is found by bisection whose metric is at most
    `drop` worse than that of the ranks in use. With `per_layer`, one layer
    after the other is then cut further, the others as they are.

    Args:
        model: A model wrapped with "dylora", and compiled if `metric` is a
            name.
        dataset: What `model.evaluate` takes as first argument, or a tuple
            `(x, y)` or `(x, y, sample_weight)`.
        metric: The name of a result of `model.evaluate`, such as "accuracy"
            or "loss", or a function of model and dataset.
        drop: How much worse it may get, in the metric's own unit, at least 0.
        per_layer: Whether layers may get ranks of their own.
        mode: `"max"` if larger is better, `"min"` if smaller.

    Returns:
        The rank of each adapter, by path. The adapters are truncated to it.

    Raises:
        ValueError: The model has no DyLoRADense, no such metric or one that
            is NaN, no data, or a bad option. Ranks are then as they were.

    Example:

    >>> import keras_spectral as ks
    >>> layer = ks.DyLoRADense(keras.layers.Dense(4, name="hidden"), rank=3)
    >>> model = keras.Sequential([keras.Input((5,)), layer])
    >>> search_rank(model, None, lambda model, dataset: 1.0)
    {'hidden': 1}
    """
    check_number(drop, "drop", 0)
    check_choice(mode, "mode", ("max", "min"))
    check_flag(per_layer, "per_layer")
    if not isinstance(metric, str) and not callable(metric):
        raise ValueError(
            f"Received metric={metric!r}. Expected the name of a result of "
            "`model.evaluate`, or a function of model and dataset."
        )
    adapters = require_adapters(model, DyLoRADense)
    ranks = [adapter.active_rank() for adapter in adapters]
    sign = 1 if mode == "max" else -1
    steps = sum(rank.bit_length() for rank in ranks) if per_layer else 0
    steps += max(ranks).bit_length() + 1
    try:
        with LateProgress("trying ranks", steps) as progress:

            def score():
                value = sign * _value(model, dataset, metric)
                progress.advance(1)
                return value

            least = score() - drop

            def smallest(chosen, top):
                """The smallest good rank of some adapters, by bisection."""
                low, high = 1, top
                while low < high:
                    middle = (low + high) // 2
                    _truncate(chosen, ranks, middle)
                    if score() >= least:
                        high = middle
                    else:
                        low = middle + 1
                _truncate(chosen, ranks, low)

            everyone = range(len(adapters))
            smallest([(i, adapters[i]) for i in everyone], max(ranks))
            if per_layer:
                for i in everyone:
                    top = adapters[i].active_rank()
                    smallest([(i, adapters[i])], top)
    except BaseException:
        for adapter, rank in zip(adapters, ranks):
            adapter.truncate(rank)
        raise
    found = adapter_places(model, DyLoRADense)
    return {place.path: place.layer.active_rank() for place in found}


def _truncate(chosen, ranks, rank):
    """To a rank, or to the one in use before where that is smaller."""
    for i, adapter in chosen:
        adapter.truncate(min(rank, ranks[i]))


def _value(model, dataset, metric):
    if callable(metric):
        return _checked(float(metric(model, dataset)), metric)
    return _checked(metric_of(model, dataset, metric), metric)


def _checked(value, metric):
    if math.isnan(value):
        raise ValueError(
            f"metric={metric!r} gave NaN, so no rank is better than another. "
            "Expected a number: the training probably diverged."
        )
    return value
