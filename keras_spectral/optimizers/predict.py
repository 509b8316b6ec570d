"""Predictions that are averaged over a posterior."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.optimizers import innermost
from keras_spectral.optimizers.ivon import IVON


def ivon_of(model: keras.Model) -> IVON:
    """A model's IVON, also where another optimizer scales its loss.

    Raises:
        ValueError: The model is not compiled with IVON.
    """
    optimizer = getattr(model, "optimizer", None)
    inner = innermost(optimizer)
    if not isinstance(inner, IVON):
        raise ValueError(
            f"Model '{model.name}' is compiled with "
            f"{type(optimizer).__name__}. Expected IVON."
        )
    return inner


def predict_mean(
    model: keras.Model, x: Any, samples: int = 8, activation: Any = None
) -> np.ndarray:
    """Averages predictions over samples of an IVON posterior.

    Args:
        model: A model that was trained with IVON.
        x: What `model.predict` takes.
        samples: How many, at least 1.
        activation: What makes probabilities of the model's output before it
            is averaged, as `"softmax"` for logits; `None`, nothing.

    Returns:
        The mean prediction. The model's weights are as before.

    Raises:
        ValueError: The model has no IVON optimizer that has trained its
            weights as they are now, alone or inside of a LossScaleOptimizer;
            `samples` is no whole number above 0; an activation that Keras
            does not know.

    Example:

    >>> from keras_spectral.optimizers import IVON
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(IVON(0.1, ess=100), "mse")
    >>> data = keras.ops.ones((4, 2)), keras.ops.ones((4, 1))
    >>> history = model.fit(*data, verbose=0)
    >>> predict_mean(model, data[0], samples=3).shape
    (4, 1)
    """
    optimizer = ivon_of(model)
    # JAX builds optimizers also where nothing is trained.
    if not optimizer.built or not number_in(optimizer.iterations):
        raise ValueError(
            f"The IVON of model '{model.name}' has trained none of its weights "
            "yet (layers that are exchanged, as by `compact_ranks`, begin "
            "again). Expected a model after `fit`."
        )
    samples = check_whole(samples, "samples", 1)
    activate = keras.activations.get(activation)
    total = 0.0
    with optimizer.mean():
        for _ in range(samples):
            optimizer.sample()
            output = ops.convert_to_tensor(model.predict(x, verbose=0))
            total = total + ops.convert_to_numpy(activate(output))
    return total / samples
