"""What is saved by a compression: weights, operations or time."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_spectral.compression.latency import Timer
from keras_spectral.compression.spectrum import Spectrum
from keras_spectral.kernels import KernelView
from keras_spectral.kernels.spectra import LateProgress

_FAST = 0.9  # of a layer's time
UNITS = {"weights": "weights", "flops": "FLOPs", "latency": "ms"}


def with_costs(
    spectra: Sequence[Spectrum],
    views: Sequence[KernelView],
    measure: str,
    timer: Timer,
) -> list[Spectrum]:
    """The spectra with what each rank costs.

    Args:
        spectra: What is known of the layers.
        views: Their views.
        measure: `"weights"`, `"flops"` or `"latency"`.
        timer: Times layers for `"latency"`.
    """
    if measure == "weights":
        return list(spectra)
    if measure == "flops":
        return [_operations(*pair) for pair in zip(spectra, views)]
    found = []
    with LateProgress("timing layers", len(views)) as progress:
        for spectrum, view in zip(spectra, views):
            found.append(_times(spectrum, view, timer))
            progress.advance(1)
    return found


def fast_slicings(
    view: KernelView, slicings: Sequence[int], timer: Timer
) -> dict[int, int | None]:
    """The slicings that are a tenth faster than the layer, and to which rank.

    A tenth, as times vary, and as what follows a layer may be fused with it.

    One slice is always there: to rank 0 where none is fast, without a limit
    (None) where sizes are not known. More are tried, fewer first, until some
    are slower at a fourth of the layer's weights.
    """
    if not timer.knows_sizes(view):
        return {1: None}
    found: dict[int, int | None] = {1: 0}
    for slices in slicings:
        limit = _fast_rank(view, slices, timer)
        if limit is not None:
            found[slices] = limit
        elif slices > 1:
            break
    return found


def _fast_rank(view, slices, timer):
    """The largest rank timed that is fast, and all below it; or None."""
    top, found = _largest(view, slices), None
    half = -(-top // 2)  # rounded up: at half of the layer's weights or above
    for rank in sorted({max(1, top // 4), half, top - top // 4, top}):
        if not timer.is_faster(view, _FAST, rank, slices):
            break
        found = rank
    return found


def _largest(view, slices=1):
    """The largest rank at which a pair has fewer weights than its layer."""
    per_rank = view.pair_weights(1, slices)
    return max(1, min(view.max_rank, (view.num_weights - 1) // per_rank))


def _operations(spectrum, view):
    shape = view.layer.get_build_config()["input_shape"]
    costs = {
        n: view.flops(shape, 1, n) * np.arange(1, values.shape[-1] + 1)
        for n, values in spectrum.values.items()
    }
    return dataclasses.replace(spectrum, costs=costs, whole=view.flops(shape))


def _times(spectrum, view, timer):
    """Times of a few ranks, and of those between by interpolation."""
    costs = {}
    for slices, values in spectrum.values.items():
        count = values.shape[-1]
        top = min(count, _largest(view, slices))
        ranks = sorted({1, max(1, top // 4), max(1, top // 2), top})
        times = [timer.pair(view, rank, slices) for rank in ranks]
        every = np.interp(np.arange(1, count + 1), ranks, times)
        # Beyond a pair that is as large as its layer nothing was timed.
        every[top:] = np.inf
        costs[slices] = np.maximum.accumulate(every)
    return dataclasses.replace(spectrum, costs=costs, whole=timer.whole(view))
