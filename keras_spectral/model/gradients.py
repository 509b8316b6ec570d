"""What a loss asks of the kernels of a model, before anything is trained."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import gradient_function
from keras_spectral._backend import to_numpy
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.compiling import check_compiled
from keras_spectral._internal.evaluate import batches
from keras_spectral._internal.evaluate import check_data
from keras_spectral.kernels import kernel_view
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.select import select


def kernel_gradients(
    model: keras.Model,
    dataset: Any,
    target: Any = "all-linear",
    *,
    exclude: Any = None,
    batch_size: int = 32,
) -> dict[str, np.ndarray]:
    """The gradients of the loss by whole kernels, on one batch.

    One backward pass, as in inference (no dropout). Frozen kernels have
    gradients as well; the model is not changed. Deep LoRA's compressed form
    starts from them: `wrap_model(model, "deep_lora", rank=8,
    gradients=kernel_gradients(model, dataset))`.

    Args:
        model: A compiled model.
        dataset: What `model.fit` takes as first argument, or a tuple `(x, y)`
            or `(x, y, sample_weight)`. Its first batch counts.
        target: The layers, as `target` of `wrap_model`.
        exclude: Layers to leave out, in the same forms.
        batch_size: For arrays: how many of the first examples.

    Returns:
        For each layer's path a matrix (n_in x n_out) in float32.

    Raises:
        ValueError: Nothing matches, no data, the model is not compiled, or a
            layer is quantised or has no kernel of its own.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden"),
    ...      keras.layers.Dense(2, name="head")]
    ... )
    >>> model.compile("adam", "mse")
    >>> data = keras.ops.ones((4, 16)), keras.ops.ones((4, 2))
    >>> kernel_gradients(model, data, "hidden")["hidden"].shape
    (16, 8)
    """
    check_model(model)
    check_data(dataset)
    check_compiled(model)
    chosen = select(model, places(model), target, exclude, KernelAdapter)
    views = {p.path: kernel_view(subject(p.layer)) for p in chosen}
    for path, view in views.items():
        if view.kernel_name is None or view.quantized:
            raise ValueError(
                f"Layer '{path}' is quantised, or its kernel is a product of "
                "two, so that it has no gradient. Expected layers with a float "
                "kernel: leave this one out with `exclude`."
            )
    batch = next(batches(dataset, batch_size))
    variables = [view.variable() for view in views.values()]
    found = loss_gradients(model, variables)(batch)
    return {
        path: to_numpy(view.to_matrix(g))
        for (path, view), g in zip(views.items(), found)
    }


def loss_gradients(model: keras.Model, variables: list[keras.Variable]):
    """A function from a batch to the gradients of a model's loss on it.

    The model runs as in inference.

    Args:
        model: A compiled model.
        variables: Whose gradients; they may be frozen.
    """

    def loss(x, y, sample_weight):
        outputs = model(x, training=False)
        return model.compute_loss(x, y, outputs, sample_weight, training=False)

    compute = gradient_function(loss, variables)

    def gradients_on(batch):
        parts = (
            None
            if part is None
            else keras.tree.map_structure(ops.convert_to_tensor, part)
            for part in batch
        )
        return compute(*parts)

    return gradients_on


def gradient_at(given: Any, path: str) -> np.ndarray:
    """The gradient of a layer's kernel; a ValueError if there is none."""
    if not isinstance(given, Mapping):
        raise ValueError(
            f"Received gradients={given!r}. Expected what "
            "`kernel_gradients(model, dataset)` gives."
        )
    if path not in given:
        raise ValueError(
            f"The gradients have no layer '{path}'. Expected those of the same "
            "targets: `kernel_gradients(model, dataset, target)`. They have "
            f"{sorted(given)[:4]}."
        )
    return given[path]
