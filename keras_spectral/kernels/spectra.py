"""Singular triplets of many kernels: together, with progress, cached."""

import hashlib
import importlib.util
import os
import pathlib
import time
import warnings
from collections.abc import Iterable
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import safetensors.numpy
from keras import ops
from rich.console import Console
from rich.progress import Progress

from keras_spectral._backend import without_gradients
from keras_spectral._internal.checks import check_path
from keras_spectral._internal.files import write_safetensors
from keras_spectral._internal.linalg import randomized_svd
from keras_spectral._internal.linalg import truncated_svd
from keras_spectral.kernels.view import KernelView

_SHOW_AFTER = 2.0  # seconds
_TOGETHER = 2**22  # numbers in one batch of kernels
_EXACT_BELOW = 128


class Triplets(NamedTuple):
    """The first singular triplets of a kernel, `K ~ U diag(S) V^T`."""

    u: Any
    s: Any
    v: Any


def factorize(
    requests: Iterable[tuple[KernelView, int]],
    svd_cache: str | os.PathLike | None = None,
) -> list[Triplets]:
    """The first singular triplets of each kernel.

    Kernels of one shape are factorised together as far as memory allows. A
    progress bar appears when the work takes over 2 seconds.

    Args:
        requests: Pairs of a kernel's view and how many triplets it needs.
        svd_cache: A folder that keeps the factors between runs, one
            safetensors file for each kernel, named by a hash of its numbers.
            It is made if it is not there; a damaged file is made again.

    Returns:
        The triplets, in float32, in the order of the requests.

    Raises:
        ValueError: A kernel holds NaN or infinities.
    """
    requests = list(requests)
    cache = _Cache(svd_cache) if svd_cache is not None else None
    found: dict[int, Triplets] = {}
    progress = LateProgress("factorising kernels", len(requests))
    with progress, without_gradients():
        for batch in _batches(requests):
            count = requests[batch[0]][1]
            kernels = {i: requests[i][0].finite_matrix() for i in batch}
            paths = {}
            if cache is not None:
                paths = {i: cache.path(kernels[i], count) for i in batch}
                known = {
                    i: cache.get(paths[i], kernels[i], count) for i in batch
                }
                found |= {i: t for i, t in known.items() if t is not None}
            missing = [i for i in batch if i not in found]
            if missing:
                stack = _stacked([kernels[i] for i in missing])
                factors = leading_triplets(stack, count)
                found |= {
                    i: Triplets(*(f[n] for f in factors))
                    for n, i in enumerate(missing)
                }
            if cache is not None:
                for i in missing:
                    cache.put(paths[i], found[i])
            progress.advance(len(batch))
    return [_float32(found[i]) for i in range(len(requests))]


def _stacked(kernels):
    """Kernels as one tensor; a single one is not copied."""
    if len(kernels) == 1:
        return ops.expand_dims(kernels[0], 0)
    return ops.stack(kernels)


def _float32(triplets):
    """Factors of a float64 kernel as adapters hold them."""
    return Triplets(
        *(f if _is_float32(f) else ops.cast(f, "float32") for f in triplets)
    )


def _is_float32(x):
    return keras.backend.standardize_dtype(x.dtype) == "float32"


def leading_triplets(matrix: Any, count: int) -> Triplets:
    """Exact for small matrices or many triplets, else randomized.

    Args:
        matrix: Tensor (..., n_in, n_out).
        count: How many triplets.
    """
    smaller = min(matrix.shape[-2:])
    if smaller < _EXACT_BELOW or 12 * (count + 4) > smaller:
        return Triplets(*truncated_svd(matrix, count))
    return Triplets(*randomized_svd(matrix, count)[:3])


def _batches(requests):
    """Numbers of requests of equal shape and count, in portions."""
    groups: dict[tuple, list[int]] = {}
    for i, (view, count) in enumerate(requests):
        groups.setdefault((view.n_in, view.n_out, count), []).append(i)
    for (n_in, n_out, _), group in groups.items():
        size = max(1, _TOGETHER // (n_in * n_out))
        for start in range(0, len(group), size):
            yield group[start : start + size]


class LateProgress:
    """A progress bar that shows only where work takes long."""

    def __init__(self, what, total):
        console = Console(stderr=True)
        self.bar = Progress(transient=True, console=console)
        # In notebooks rich draws by ipywidgets, and without them it warns.
        widgets = importlib.util.find_spec("ipywidgets") is not None
        self.can_show = widgets or not console.is_jupyter
        self.task = self.bar.add_task(what, total=total)
        self.start = time.monotonic()

    def __enter__(self):
        return self

    def advance(self, count):
        self.bar.advance(self.task, count)
        late = time.monotonic() - self.start > _SHOW_AFTER
        if late and self.can_show and not self.bar.live.is_started:
            self.bar.start()

    def __exit__(self, *error):
        if self.bar.live.is_started:
            self.bar.stop()


class _Cache:
    """Factors on disk; the name is a hash of the kernel and the count."""

    def __init__(self, folder):
        self.folder = pathlib.Path(check_path(folder, "svd_cache"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Received svd_cache={str(folder)!r}: {error.strerror}. "
                "Expected a folder, or where one can be made."
            ) from error

    def path(self, kernel, count):
        """The file of a kernel's factors, whether it is there or not."""
        numbers = np.ascontiguousarray(ops.convert_to_numpy(kernel))
        digest = hashlib.sha256(f"{numbers.shape} {count} 1".encode())
        digest.update(numbers.tobytes())
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def get(self, path, kernel, count):
        """The factors; None if there are none or the file is damaged."""
        n_in, n_out = kernel.shape
        shapes = {"u": (n_in, count), "s": (count,), "v": (n_out, count)}
        wide = keras.backend.standardize_dtype(kernel.dtype)
        kinds = {np.dtype("float32"), np.dtype(wide)}
        try:
            tensors = safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError, KeyError, TypeError):
            return None
        fits = tensors.keys() == shapes.keys() and all(
            tensor.shape == shapes[name]
            and tensor.dtype in kinds
            and np.all(np.isfinite(tensor))
            for name, tensor in tensors.items()
        )
        return Triplets(**tensors) if fits else None

    def put(self, path, triplets):
        """Keeps factors; where another user forbids it, it warns."""
        tensors = {
            name: np.ascontiguousarray(ops.convert_to_numpy(value))
            for name, value in triplets._asdict().items()
        }
        try:
            write_safetensors(tensors, path)
        except PermissionError as error:
            warnings.warn(
                f"Factors are not kept in svd_cache: {error}.", stacklevel=2
            )
