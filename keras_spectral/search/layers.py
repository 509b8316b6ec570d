"""Which layers a task wants to change, by the gradients of its loss."""

import re
from typing import Any

import keras
import numpy as np

from keras_spectral._backend import to_numpy
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.compiling import check_compiled
from keras_spectral._internal.evaluate import batches
from keras_spectral._internal.evaluate import check_data
from keras_spectral._internal.layer_tools import learned_variables
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.gradients import loss_gradients
from keras_spectral.model.paths import places


def choose_layers(
    model: keras.Model,
    dataset: Any,
    by: str = "gradient_norm",
    *,
    groups: str | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Ranks layers by how much a loss asks of them, before any training.

    Surgical fine-tuning trains the layers where a shift of the data shows.
    With the gradients g of the loss by a layer's weights w, means over batches:

    - `"gradient_norm"`: `|g| / |w|`, the relative gradient norm (Auto-RGN);
    - `"fisher"`: the mean of `g^2` over the layer's weights; with
      `batch_size=1` that is the diagonal of the empirical Fisher matrix.

    Frozen weights count as well. The model is not changed; it runs as in
    inference.

    Source: Lee et al. 2022, arXiv 2210.11466, section 4.

    Args:
        model: A built and compiled model.
        dataset: What `model.fit` takes as first argument, or a tuple `(x, y)`
            or `(x, y, sample_weight)`: data of the new task.
        by: The score.
        groups: A regex searched for in the paths of layers. Layers in whose
            paths it finds the same text (or the same first group in brackets)
            share one score; where it finds nothing, a layer is left out. By
            default each layer has its own score.
        batch_size: For arrays.

    Returns:
        Scores by path or text, the highest first. `list(found)[:2]` are the
        two to train.

    Raises:
        ValueError: A bad option or regex, no data, a model without weights or
            that is not compiled.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden"),
    ...      keras.layers.Dense(2, name="head")]
    ... )
    >>> model.compile("adam", "mse")
    >>> data = keras.ops.ones((4, 16)), keras.ops.ones((4, 2))
    >>> sorted(choose_layers(model, data))
    ['head', 'hidden']
    """
    check_model(model)
    check_choice(by, "by", ("gradient_norm", "fisher"))
    check_data(dataset)
    check_compiled(model)
    members = _members(model, groups)
    variables = [v for group in members.values() for v in group]
    totals = dict.fromkeys(members, 0.0)
    count = 0
    gradients_on = loss_gradients(model, variables)
    with LateProgress("gradients", None) as progress:
        for batch in batches(dataset, batch_size):
            found = iter(gradients_on(batch))
            for name, group in members.items():
                squares = sum(_square(next(found)) for _ in group)
                totals[name] += (
                    squares if by == "fisher" else float(np.sqrt(squares))
                )
            count += 1
            progress.advance(1)
    scores = {
        name: total / count / _size(members[name], by)
        for name, total in totals.items()
    }
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def _members(model, groups):
    """The float weights of each group of layers."""
    try:
        pattern = re.compile(groups) if groups is not None else None
    except re.error as error:
        raise ValueError(
            f"Received groups={groups!r}, which is no regex: {error}."
        ) from error
    found: dict[str, list] = {}
    for place in places(model):
        name = place.path
        if pattern is not None:
            hit = pattern.search(name)
            if hit is None:
                continue
            name = (pattern.groups and hit.group(1)) or hit.group()
        own = [
            v
            for v in learned_variables(place.layer)
            if v.dtype.startswith(("float", "bfloat"))
        ]
        if own:
            found.setdefault(name, []).extend(own)
    if not found:
        raise ValueError(
            f"Model '{model.name}' has no layers with float weights"
            + (f" whose paths match {groups!r}" if groups else "")
            + ". Expected at least one."
        )
    return found


def _square(array):
    array = to_numpy(array)
    return float(np.square(array, dtype="float64").sum())


def _size(group, by):
    if by == "fisher":
        return sum(int(np.prod(v.shape)) for v in group)
    return max(float(np.sqrt(sum(_square(v) for v in group))), 1e-30)
