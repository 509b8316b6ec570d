"""What `compress_model` knows about its layers' inputs."""

import warnings
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_spectral._internal.evaluate import check_data
from keras_spectral.compression.fit import Fit
from keras_spectral.compression.fit import compensable
from keras_spectral.kernels import KernelView
from keras_spectral.layers.moments import Moments
from keras_spectral.model.calibrate import Calibration
from keras_spectral.model.calibrate import moments_at
from keras_spectral.model.calibrate import moments_of
from keras_spectral.model.paths import Place


def check_calibration(calibration: Any, method: str, sequential: bool) -> None:
    """Raises a ValueError unless the data are what the options need."""
    option = "sequential=True" if sequential else None
    if method == "sensitivity":
        option = "method='sensitivity'"
    if calibration is None:
        if option is not None:
            raise ValueError(
                f"Received {option} without `calibration`. Expected data that "
                "the model is run on, such as a few hundred typical inputs."
            )
    elif not isinstance(calibration, Calibration):
        check_data(calibration, "calibration")
    elif option is not None:
        raise ValueError(
            f"Received {option} with {calibration!r}. Expected the data "
            "themselves as `calibration`, because the model is run on them "
            "again."
        )


def fits_of(
    model: keras.Model,
    chosen: Sequence[Place],
    views: Sequence[tuple[KernelView, KernelView]],
    calibration: Calibration | Iterable[tuple] | None,
    compensate_bias: bool,
) -> list[Fit]:
    """What the pair of each chosen layer is fitted to.

    Args:
        model: The model as it was.
        chosen: Places in it.
        views: Those of the layers there, and of their copies in a new model.
        calibration: Moments of inputs, or batches.
        compensate_bias: Whether biases make up for means.

    Raises:
        ValueError: Inputs that the model cannot run on, that are not finite
            or that are those of other layers.
    """
    if calibration is None:
        return [Fit(view, source=source) for source, view in views]
    seen = [
        p for p in chosen if not isinstance(p.layer, keras.layers.Embedding)
    ]
    if not isinstance(calibration, Calibration):
        calibration = _calibrated(model, seen, calibration)
    fits = []
    for place, (source, view) in zip(chosen, views):
        if place not in seen:
            fits.append(Fit(view, source=source))
            continue
        moments = moments_at(calibration, place.path)
        _check_moments(moments, place, view)
        centred = compensate_bias and compensable(view)
        fits.append(Fit(view, moments, centred=centred, source=source))
    _warn_of_few_rows([fit for fit in fits if fit.moments is not None])
    return fits


def _calibrated(model, seen, data):
    try:
        return moments_of(model, seen, data)
    except Exception as error:
        raise ValueError(
            f"Model '{model.name}' cannot be run on `calibration`: {error} "
            "Expected inputs as `model.predict` takes them, or a tuple "
            "(x, y), that use every layer."
        ) from error


def _check_moments(moments: Moments, place, view):
    if moments.mean.shape != (view.n_in,):
        raise ValueError(
            f"The calibration of layer '{place.path}' is of "
            f"{moments.mean.size} inputs, and its kernel takes {view.n_in}. "
            "Expected what `calibrate` gives for this very model."
        )
    if not (np.isfinite(moments.mean).all() and _finite(moments.second)):
        raise ValueError(
            f"What layer '{place.path}' is given on `calibration` holds NaN "
            "or infinities. Expected finite numbers: look for them in the "
            "data and in the layers before this one, or leave the layer out "
            "with `exclude`."
        )


def _finite(array):
    return bool(np.isfinite(array.sum(dtype="float64")))


def _warn_of_few_rows(fits):
    few = [fit for fit in fits if fit.moments.count < fit.view.n_in]
    if few:
        fit = max(few, key=lambda fit: fit.view.n_in / fit.moments.count)
        warnings.warn(
            f"{len(few)} of {len(fits)} layers have seen fewer rows of "
            f"`calibration` than they have inputs: layer "
            f"'{fit.view.layer.name}' {fit.moments.count} rows and "
            f"{fit.view.n_in} inputs. Damping fills the gap; more data would "
            "fit better.",
            stacklevel=4,
        )
