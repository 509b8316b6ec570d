"""Zeros that stay zeros while a model trains on."""

import base64
import zlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral.compression.choice import kernel_places
from keras_spectral.kernels import KernelView
from keras_spectral.kernels import kernel_view
from keras_spectral.model import surgery
from keras_spectral.model.select import Target


@keras.saving.register_keras_serializable("keras_spectral")
class KeepZeros(keras.constraints.Constraint):
    """A kernel constraint that multiplies by a mask of zeros and ones.

    Keras applies it after each step of the optimizer, on every backend. Its
    configuration holds the mask, a bit for each weight, so that it is saved
    with layers that save their constraints.

    Args:
        mask: Array of booleans in the kernel's shape, or what `get_config`
            gave for it.
        constraint: Another constraint, which comes first.

    Example:

    >>> keep = KeepZeros([[True, False]])
    >>> keras.ops.convert_to_numpy(keep(keras.ops.ones((1, 2)))).tolist()
    [[1.0, 0.0]]
    """

    def __init__(
        self, mask: Any, constraint: keras.constraints.Constraint | None = None
    ):
        if isinstance(mask, dict):
            bits = zlib.decompress(base64.b64decode(mask["bits"]))
            bits = np.frombuffer(bits, "uint8")
            count = int(np.prod(mask["shape"]))
            mask = np.unpackbits(bits, count=count).reshape(mask["shape"])
        self.mask = np.asarray(mask, bool)
        self.constraint = keras.constraints.get(constraint)
        # A variable, so that it lies where the kernel does.
        self._factors = keras.Variable(self.mask, trainable=False, dtype="bool")

    def __call__(self, w):
        if self.constraint is not None:
            w = self.constraint(w)
        w = ops.convert_to_tensor(w)
        kept = ops.convert_to_tensor(self._factors)
        return ops.where(kept, w, ops.zeros_like(w))

    def get_config(self):
        bits = zlib.compress(np.packbits(self.mask).tobytes())
        mask = {"shape": list(self.mask.shape)}
        mask["bits"] = base64.b64encode(bits).decode()
        inner = keras.constraints.serialize(self.constraint)
        return {"mask": mask, "constraint": inner}


def mask_of(view: KernelView) -> np.ndarray | None:
    """The mask that a kernel is held by, None without one."""
    constraint = view.variable().constraint
    return constraint.mask if isinstance(constraint, KeepZeros) else None


def hold(view: KernelView, mask: np.ndarray) -> None:
    """Sets a kernel's weights outside of a mask to zero, for good.

    Args:
        view: That of the kernel.
        mask: Booleans in the kernel's own shape.
    """
    variable = view.variable()
    other = variable.constraint
    if isinstance(other, KeepZeros):
        other = other.constraint
    constraint = KeepZeros(mask, other)
    variable.constraint = constraint
    name = f"{view.kernel_name}_constraint".replace("_kernel_", "_")
    if hasattr(view.layer, name):
        setattr(view.layer, name, constraint)
    kernel = ops.convert_to_tensor(variable)
    variable.assign(ops.where(mask, kernel, ops.zeros_like(kernel)))


def keep_zeros(
    model: keras.Model,
    target: Target | None = None,
    exclude: Target | None = None,
) -> keras.Model:
    """Lets the zeros of a model's kernels stay zeros in later training.

    `prune_model` does so itself. Call this where masks were lost or filled:
    after `load_weights`, after loading a model whose inner layers do not save
    constraints (as KerasHub's), or after `merge_model`, which adds what an
    adapter has learned. A kernel that has a mask gets its zeros back; in
    others the weights that are zero now are held.

    Args:
        model: A plain model; it is changed in place.
        target: Which layers, as for `wrap_model`. Defaults to all kernels but
            embeddings.
        exclude: Which layers not; the same forms.

    Returns:
        The model.

    Raises:
        ValueError: Nothing matches; adapters or quantised kernels in it; a
            kernel that something else holds as well.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((2,)), keras.layers.Dense(1, name="hidden")]
    ... )
    >>> _ = model.get_layer("hidden").kernel.assign([[0.0], [3.0]])
    >>> model = ks.keep_zeros(model)
    >>> model.compile("sgd", "mse")
    >>> data = keras.ops.ones((4, 2)), keras.ops.ones((4, 1))
    >>> history = model.fit(*data, verbose=0)
    >>> int(keras.ops.sum(model.get_layer("hidden").kernel != 0))
    1
    """
    for place in kernel_places(model, target, exclude):
        view = kernel_view(place.layer)
        mask = mask_of(view)
        if mask is None:
            mask = ops.convert_to_numpy(view.variable() != 0)
        if not mask.all():
            hold(view, mask)
    surgery.forget_compiled([model])
    return model
