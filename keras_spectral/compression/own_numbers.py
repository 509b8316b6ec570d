"""A kernel's own numbers as one array, without the zeros between groups."""

import numpy as np
from keras import ops

from keras_spectral.kernels import KernelView


def own_numbers(view: KernelView) -> np.ndarray:
    """The kernel as a float64 array (rows, columns).

    Blocks of a grouped convolution stand one above the other.
    """
    blocks = ops.convert_to_numpy(view.blocks(view.finite_matrix()))
    return blocks.reshape(-1, blocks.shape[-1]).astype("float64")


def in_kernel_shape(view: KernelView, numbers: np.ndarray):
    """Such an array as a tensor in the kernel's own shape and dtype."""
    return view.kernel(_matrix(view, numbers))


def assign_numbers(view: KernelView, numbers: np.ndarray) -> None:
    """Writes such an array into the kernel."""
    view.assign(_matrix(view, numbers))


def _matrix(view, numbers):
    blocks = numbers.reshape(view.groups, -1, numbers.shape[-1])
    matrix = np.einsum("gnc,gh->gnhc", blocks, np.eye(view.groups))
    matrix = matrix.reshape(view.n_in, view.n_out)
    return ops.convert_to_tensor(matrix.astype("float32"))
