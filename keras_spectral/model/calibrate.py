"""What the layers of a model are given: the moments of their inputs."""

import re
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import without_gradients
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.evaluate import batches
from keras_spectral._internal.evaluate import check_data
from keras_spectral._internal.intercept import intercepted
from keras_spectral.kernels import KernelView
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.moments import Moments
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.select import select


class Calibration(Mapping):
    """The `Moments` of layers' inputs by the layers' paths."""

    def __init__(self, moments: dict[str, Moments]):
        self._moments = moments

    def __getitem__(self, path: str) -> Moments:
        return self._moments[path]

    def __iter__(self):
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __repr__(self) -> str:
        count = max(m.count for m in self._moments.values())
        return f"Calibration({len(self)} layers, {count:,} rows)"

    def ranks(self, rank: int, rho: float = 2.0) -> dict[str, dict]:
        """Ranks by how much of the inputs' variance they explain, as in EVA.

        Of all layers' components those that explain the largest share of
        their layer's variance are kept: `rank` times the number of layers in
        sum, at most `rho * rank` in one.

        Args:
            rank: The mean rank.
            rho: How many times the mean one layer may have, at least 1.

        Returns:
            What `wrap_model` takes as `overrides`: a rank for each path, and
            the `alpha` that leaves the scale at 1. A layer that would get
            none has rank 1.
        """
        check_rank(rank)
        most = int(rho * rank)
        shares = []
        for path, moments in self.items():
            values, _ = moments.components()
            total = max(values.sum(), 1e-30)
            shares += [(value / total, path) for value in values[:most]]
        shares.sort(reverse=True)
        kept = [path for _, path in shares[: rank * len(self)]]
        found = {path: max(1, kept.count(path)) for path in self}
        return {
            re.escape(path): {"rank": number, "alpha": number}
            for path, number in found.items()
        }


def calibrate(
    model: keras.Model,
    dataset: Any,
    target: Any = "all-linear",
    *,
    exclude: Any = None,
    batch_size: int = 32,
    limit: int = 4096,
) -> Calibration:
    """The moments of what layers are given, in one pass over typical data.

    For each layer and with x being the rows that its kernel multiplies
    (tokens, or patches of a convolution) it gives their number, the mean of
    x and of x^T x (n_in x n_in) in float32. Rows of masked tokens do not
    count: those of Keras's masks, and of `padding_mask` among the inputs.
    The model is not changed.

    Starts of LoRA take it (`wrap_model(..., initializer="eva",
    calibration=...)`, and `"corda"`).

    Args:
        model: A built Keras model.
        dataset: What `model.predict` takes, or a tuple `(x, y)`: a few
            hundred typical examples.
        target: The layers, as `target` of `wrap_model`.
        exclude: Layers to leave out, in the same forms.
        batch_size: For arrays.
        limit: For layers with more inputs than this only the diagonal of
            x^T x is kept.

    Returns:
        A mapping from paths to `Moments`.

    Raises:
        ValueError: Nothing matches, no data, or no row reached a layer.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden"),
    ...      keras.layers.Dense(2, name="head")]
    ... )
    >>> found = calibrate(model, keras.ops.ones((4, 16)), "hidden")
    >>> found["hidden"].count, found["hidden"].second.shape
    (4, (16, 16))
    """
    check_model(model)
    check_data(dataset)
    check_rank(limit, "limit")
    chosen = select(model, places(model), target, exclude, KernelAdapter)
    return moments_of(model, chosen, batches(dataset, batch_size), limit)


def moments_of(
    model: keras.Model,
    chosen: Iterable[Place],
    data: Iterable[tuple],
    limit: int = 4096,
) -> Calibration:
    """The moments of chosen places, see `calibrate`, in one pass.

    Args:
        model: A built Keras model.
        chosen: The places of linear layers in it.
        data: Tuples that begin with a batch of inputs.
        limit: See `calibrate`.
    """
    found = {
        place.path: _Running(subject(place.layer), limit) for place in chosen
    }
    handlers = {running.layer: running.handle for running in found.values()}
    with intercepted(handlers), without_gradients():
        with LateProgress("calibrating", None) as progress:
            for batch, *_ in data:
                for running in found.values():
                    running.padding = padding_of(batch)
                model(batch, training=False)
                progress.advance(1)
    unseen = [path for path, running in found.items() if not running.count]
    if unseen:
        raise ValueError(
            f"No row of the dataset reached the layers {unseen[:4]}. Expected "
            "at least one batch of inputs that uses every layer."
        )
    return Calibration({p: running.moments() for p, running in found.items()})


class _Running:
    """The moments of one layer, updated batch by batch."""

    def __init__(self, layer, limit):
        self.layer = layer
        self.view = kernel_view(layer)
        self.whole = self.view.n_in <= limit
        self.count = 0
        self.mean = self.second = None
        self.padding = None

    def handle(self, call, inputs, *args, **kwargs):
        if not kwargs.get("reverse"):
            self.see(counted_rows(self.view, inputs, self.padding))
        return call(inputs, *args, **kwargs)

    def see(self, rows):
        count = int(rows.shape[0])
        if not count:
            return
        square = (
            ops.matmul(ops.transpose(rows), rows)
            if self.whole
            else ops.sum(ops.square(rows), axis=0)
        )
        self.mean = self._joined(self.mean, ops.mean(rows, axis=0), count)
        self.second = self._joined(self.second, square / count, count)
        self.count += count

    def _joined(self, old, new, count):
        if old is None:
            return new
        return old + (new - old) * (count / (self.count + count))

    def moments(self):
        mean, second = map(ops.convert_to_numpy, (self.mean, self.second))
        return Moments(self.count, mean, second)


def counted_rows(view: KernelView, inputs: Any, padding: Any = None) -> Any:
    """The rows (count, n_in) that a kernel multiplies, in float32.

    Rows of masked tokens are left out.

    Args:
        view: The layer's view.
        inputs: What the layer is called on.
        padding: The mask of the model's inputs, where Keras has none.
    """
    mask = getattr(inputs, "_keras_mask", None)
    mask = padding if mask is None else mask
    rows = view.input_rows(inputs)
    if mask is not None and len(mask.shape) < len(inputs.shape):
        kept = ops.convert_to_numpy(mask).ravel()
        if kept.size == rows.shape[0]:
            rows = ops.take(rows, np.flatnonzero(kept), axis=0)
    return ops.cast(rows, "float32")


def padding_of(batch: Any) -> Any:
    """The mask of tokens among a model's inputs, None without one."""
    return batch.get("padding_mask") if isinstance(batch, dict) else None


def moments_at(calibration: Any, path: str) -> Moments:
    """The moments of a layer; a ValueError if there are none."""
    if not isinstance(calibration, Calibration):
        raise ValueError(
            f"Received calibration={calibration!r}. Expected what "
            "`calibrate(model, dataset)` gives."
        )
    if path not in calibration:
        raise ValueError(
            f"The calibration has no layer '{path}'. Expected one of the same "
            "targets: `calibrate(model, dataset, target)`. It has "
            f"{sorted(calibration)[:4]}."
        )
    return calibration[path]
