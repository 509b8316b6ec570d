"""How long layers and their pairs take on this machine and backend."""

import json
import time

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import inference_of
from keras_spectral.compression.pairs import low_rank_layer
from keras_spectral.kernels import KernelView

_SECONDS, _FEWEST_RUNS, _MOST_RUNS = 0.05, 5, 20
# What says nothing about the time that a layer takes.
_IDLE = ("name", "trainable", "_initializer", "_regularizer", "_constraint")


class Timer:
    """Times each kind of layer once, in inference, on one batch.

    Args:
        batch_size: Examples of the batch.
        unknown_size: How large sizes are that a model leaves open, as those
            of sequences; with None such layers are refused.
        latencies: Milliseconds that are known, which new ones are added to.
    """

    def __init__(
        self,
        batch_size: int = 32,
        unknown_size: int | None = None,
        latencies: dict[str, float] | None = None,
    ):
        self.batch_size = batch_size
        self.unknown_size = unknown_size
        self.latencies = {} if latencies is None else dict(latencies)

    def whole(self, view: KernelView) -> float:
        """Milliseconds of the layer itself."""
        return self._timed(view, lambda: view.layer)

    def pair(self, view: KernelView, rank: int, slices: int = 1) -> float:
        """Milliseconds of a pair of layers in its place."""

        def make():
            parts, rows, columns = view.parts(view.matrix(), slices).shape
            zeros = (
                np.zeros((parts, rows, rank)),
                np.zeros((parts, rank, columns)),
            )
            return low_rank_layer(view, *(np.float32(x) for x in zeros))

        return self._timed(view, make, rank, slices)

    def is_faster(
        self, view: KernelView, share: float, rank: int, slices: int = 1
    ) -> bool:
        """Whether a pair takes at most a share of the layer's own time.

        The layer is timed before a new pair and after it, and its shortest
        time counts: the same machine is slower at one moment than at another.
        """
        whole, count = self.whole(view), len(self.latencies)
        pair = self.pair(view, rank, slices)
        if len(self.latencies) > count:
            shape = self._sizes(view)
            whole = min(whole, milliseconds(view.layer, shape))
            self.latencies[_key(view, shape)] = whole
        return pair <= share * whole

    def knows_sizes(self, view: KernelView) -> bool:
        """Whether it can time a layer."""
        return self.unknown_size is not None or None not in _shape(view)[1:]

    def _timed(self, view, make, *pair):
        shape = self._sizes(view)
        key = _key(view, shape, *pair)
        if key not in self.latencies:
            self.latencies[key] = milliseconds(make(), shape)
        return self.latencies[key]

    def _sizes(self, view):
        if not self.knows_sizes(view):
            raise ValueError(
                f"Layer {view.label} takes inputs of shape {_shape(view)}, so "
                "that its time is not known. Expected a model of fixed sizes, "
                "or `unknown_size`, the size that open ones are taken to have "
                "(such as the length of sequences)."
            )
        _, *rest = _shape(view)
        return self.batch_size, *(size or self.unknown_size for size in rest)


def milliseconds(layer: keras.layers.Layer, shape: tuple[int, ...]) -> float:
    """The shortest of several runs of a layer on inputs of a shape."""
    integer = isinstance(getattr(layer, "down", layer), keras.layers.Embedding)
    run = inference_of(
        layer, ops.ones(shape, "int32" if integer else layer.compute_dtype)
    )
    run()  # compiles
    times: list[float] = []
    while len(times) < _FEWEST_RUNS or (
        sum(times) < _SECONDS and len(times) < _MOST_RUNS
    ):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def _shape(view):
    shape = tuple(view.layer.get_build_config()["input_shape"])
    # Some layers are built by hand for their last dimension alone.
    return (None, *shape) if len(shape) == 1 and shape[0] else shape


def _key(view, shape, *pair):
    layer = view.layer
    config = {
        name: value
        for name, value in layer.get_config().items()
        if not name.endswith(_IDLE)
    }
    kind = [keras.backend.backend(), type(layer).__name__, list(shape)]
    return json.dumps([*kind, *pair, config], sort_keys=True, default=str)
