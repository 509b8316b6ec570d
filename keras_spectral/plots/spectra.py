"""Pictures of singular values and of gates."""

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.linalg import truncated_svd
from keras_spectral.layers import ConditionalSpectralDense
from keras_spectral.layers import GatedSpectralDense
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import require_adapters
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import match_paths
from keras_spectral.plots.axes import new_axes
from keras_spectral.plots.axes import short_paths

_BASE, _ADAPTED = "#777777", "#d1495b"
_MOST_SHOWN = 64


def plot_spectrum(model: keras.Model, path: str, ax=None):
    """Draws a layer's singular values before and after adaptation.

    The base's singular directions that a spectral adapter trains are shaded.

    Args:
        model: A wrapped model.
        path: Regex of the whole path of one adapted layer.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: The path matches no or several adapters, or one of a whole
            block, which has no kernel.
        ImportError: matplotlib is missing.
    """
    check_model(model)
    if not isinstance(path, str):
        raise ValueError(
            f"Received path={path!r}. Expected a regex that matches the whole "
            "path of one adapted layer."
        )
    found = adapter_places(model)
    matched = match_paths(found, path)
    if len(matched) != 1:
        raise ValueError(
            f"{path!r} matches {len(matched)} adapted layers of model "
            f"'{model.name}'. Expected one of {describe(found)}."
        )
    adapter = matched[0].layer
    matrix = adapter.view.finite_matrix()
    delta = ops.cast(adapter.delta_matrix(), matrix.dtype)
    before = _singular_values(matrix)
    after = _singular_values(matrix + delta)
    figure, ax = new_axes(ax, (7, 3.5))
    trained = getattr(adapter, "column_list", [])
    shown = min(len(before), max(_MOST_SHOWN, 2 * max(trained, default=0)))
    for i, column in enumerate(c for c in trained if c < shown):
        label = "trained direction" if i == 0 else None
        start, stop = column - 0.5, column + 0.5
        ax.axvspan(start, stop, color="#f3d9b1", lw=0, label=label)
    steps = np.arange(shown)
    ax.plot(steps, before[:shown], "o-", ms=3, c=_BASE, label="base")
    ax.plot(steps, after[:shown], "x-", ms=4, c=_ADAPTED, label="adapted")
    ax.set_xlim(-1, shown)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("singular value, largest first")
    ax.set_ylabel("size")
    ax.set_title(f"{matched[0].path} ({adapter.method})")
    ax.legend(frameon=False)
    return figure


def plot_gates(model: keras.Model, ax=None):
    """Draws a heat map of spectral gates, layers x directions.

    GatedSpectralDense shows its gates g, ConditionalSpectralDense the share
    of examples that opened each gate since its counts were reset.

    Args:
        model: A model wrapped with "gated_spectral" or
            "conditional_spectral".
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: The model has no gates.
        ImportError: matplotlib is missing.
    """
    kinds = (GatedSpectralDense, ConditionalSpectralDense)
    require_adapters(model, *kinds)
    gated = adapter_places(model, *kinds)
    rows = {place.path: _gate_values(place.layer) for place in gated}
    width = max(map(len, rows.values()))
    table = np.full((len(rows), width), np.nan)
    for i, values in enumerate(rows.values()):
        table[i, : len(values)] = values
    figure, ax = new_axes(ax, (3 + 0.3 * width, 1 + 0.22 * len(rows)))
    limit = max(np.nanmax(np.abs(table)), 1e-12)
    image = ax.imshow(
        table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto"
    )
    ax.set_yticks(range(len(rows)), short_paths(list(rows)), fontsize=7)
    ax.set_xticks(range(0, width, max(1, width // 8)))
    ax.set_xlabel("direction, largest singular value first")
    ax.figure.colorbar(image, ax=ax, label="gate")
    return figure


def _singular_values(matrix):
    _, s, _ = truncated_svd(matrix, min(matrix.shape))
    return ops.convert_to_numpy(s)


def _gate_values(adapter):
    if isinstance(adapter, GatedSpectralDense):
        return ops.convert_to_numpy(adapter.gates)
    return ops.convert_to_numpy(adapter.mean_gates())
