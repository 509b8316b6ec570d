"""How much of each kernel can be pruned: a scan without training."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_number
from keras_spectral._internal.evaluate import metric_of
from keras_spectral.compression.choice import kernel_places
from keras_spectral.compression.own_numbers import assign_numbers
from keras_spectral.compression.own_numbers import own_numbers
from keras_spectral.compression.sparsity import largest_mask
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.select import Target

_SHARES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)


def sensitivity_scan(
    model: keras.Model,
    dataset: Any,
    shares: Iterable[float] = _SHARES,
    metric: str = "accuracy",
    *,
    target: Target | None = None,
    exclude: Target | None = None,
) -> dict[str, dict[float, float]]:
    """Prunes one layer at a time, by magnitude, and evaluates.

    Nothing is trained, and the model is as it was afterwards. Layers whose
    metric stays where it is can take a larger share in `prune_model`;
    `plots.plot_sensitivity` draws the curves.

    Args:
        model: A compiled model.
        dataset: What `model.evaluate` takes as first argument, or a tuple
            `(x, y)` or `(x, y, sample_weight)`.
        shares: Shares of a kernel's weights to set to zero, from 0 to 1.
        metric: The name of a result of `model.evaluate`.
        target: Which layers, as for `wrap_model`. Defaults to all kernels but
            embeddings; halves of a `LowRank` layer count by themselves.
        exclude: Which layers not; the same forms.

    Returns:
        `{path: {share: metric}}`.

    Raises:
        ValueError: No such metric; no data; a share below 0 or above 1; what
            `prune_model` refuses.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(1, name="hidden")]
    ... )
    >>> model.compile("sgd", "mse")
    >>> data = keras.ops.ones((4, 4)), keras.ops.zeros((4, 1))
    >>> found = ks.sensitivity_scan(model, data, [0, 1], "loss")
    >>> found["hidden"][1.0]
    0.0
    """
    shares = _checked_shares(shares)
    chosen = kernel_places(model, target, exclude)
    found: dict[str, dict[float, float]] = {}
    with LateProgress("pruning layers", len(chosen)) as progress:
        for place in chosen:
            view = kernel_view(place.layer)
            before, kernel = ops.copy(view.variable()), own_numbers(view)
            try:
                found[place.path] = {}
                for share in shares:
                    mask = largest_mask(kernel, share)
                    assign_numbers(view, np.where(mask, kernel, 0))
                    value = metric_of(model, dataset, metric)
                    found[place.path][share] = value
            finally:
                view.variable().assign(before)
            progress.advance(1)
    return found


def _checked_shares(shares):
    given = list(shares) if isinstance(shares, Iterable) else []
    found = [check_number(share, "share", 0) for share in given]
    if not found or max(found) > 1:
        raise ValueError(
            f"Received shares={shares!r}. Expected numbers from 0 to 1, such "
            "as [0.5, 0.9]."
        )
    return [float(share) for share in found]
