"""How much a model's outputs change if one layer alone is truncated."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import to_numpy
from keras_spectral._backend import without_gradients
from keras_spectral.compression.fit import Fit
from keras_spectral.compression.fit import joined
from keras_spectral.compression.ranks import Spectrum
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.calibrate import padding_of

_SHARES = (0.25, 0.5, 0.75)  # of the rank from which on a layer would grow


def with_losses(
    model: keras.Model,
    fits: Sequence[Fit],
    spectra: Sequence[Spectrum],
    batch: Any,
) -> list[Spectrum]:
    """Spectra that know what truncating their layer costs the whole model.

    The loss is `|y - y'|^2 / |y|^2` of the model's outputs y, a mean over
    several of them, without masked tokens. For each layer it is measured at
    three ranks, with a run on the batch each.

    Args:
        model: A copy of the model, whose kernels are changed and put back.
        fits: What pairs are fitted to, on views of its layers.
        spectra: Theirs.
        batch: Inputs of the model.
    """
    found = []
    with LateProgress("measuring losses", len(fits)) as progress:
        with without_gradients():
            wanted = _outputs(model, batch)
            for fit, spectrum in zip(fits, spectra):
                losses = _losses(model, fit, spectrum, batch, wanted)
                found.append(dataclasses.replace(spectrum, losses=losses))
                progress.advance(1)
    return found


def _losses(model, fit, spectrum, batch, wanted):
    view, bias = fit.view, fit.view.bias_of()
    # PyTorch's arrays are the variables themselves.
    kernel = ops.convert_to_numpy(view.matrix()).copy()
    before = None if bias is None else ops.convert_to_numpy(bias).copy()
    ranks = _ranks(spectrum)
    a, b = fit.pair(ranks[-1])
    losses = {}
    for rank in ranks:
        matrix = joined(view, a[..., :rank], b[..., :rank, :])
        if fit.centred:
            bias.assign(fit.bias(matrix))
        view.assign(ops.convert_to_tensor(matrix))
        losses[rank] = _distance(wanted, _outputs(model, batch))
        view.assign(ops.convert_to_tensor(kernel))
        if fit.centred:
            bias.assign(before)
    return losses


def _ranks(spectrum):
    most = (spectrum.weights - 1) // spectrum.per_rank[1]
    most = min(most, spectrum.values[1].shape[1])
    return sorted({max(1, round(share * most)) for share in _SHARES})


def _outputs(model, batch):
    """The outputs as numpy arrays (examples, ...), masked tokens being 0."""
    mask = padding_of(batch)
    found = []
    for output in keras.tree.flatten(model(batch, training=False)):
        output = np.float64(to_numpy(output))
        if mask is not None and output.shape[:2] == tuple(mask.shape):
            kept = np.float64(ops.convert_to_numpy(mask))
            output *= kept.reshape(*kept.shape, *[1] * (output.ndim - 2))
        found.append(output)
    return found


def _distance(wanted, got):
    shares = [
        ((y - z) ** 2).sum() / max((y**2).sum(), 1e-60)
        for y, z in zip(wanted, got)
    ]
    return float(np.mean(shares))
