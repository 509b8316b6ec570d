"""Pictures of adaptive ranks and of posteriors."""

from collections.abc import Mapping
from collections.abc import Sequence

import keras
import numpy as np

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import is_whole
from keras_spectral.optimizers.predict import ivon_of
from keras_spectral.plots.axes import new_axes
from keras_spectral.plots.axes import short_paths

_MOST_NAMED = 12


def plot_rank_history(ranks: Sequence[Mapping[str, int]], ax=None):
    """Draws the rank of each layer over epochs.

    Args:
        ranks: `ranks` of a `callbacks.RankBudget` after `fit`.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: It holds no ranks.
        ImportError: matplotlib is missing.
    """
    known = isinstance(ranks, Sequence) and all(map(_are_ranks, ranks))
    _check(known and ranks, ranks, "`budget.ranks`")
    figure, ax = new_axes(ax, (7, 3.5))
    epochs = range(1, len(ranks) + 1)
    for path, name in zip(ranks[0], short_paths(list(ranks[0]))):
        values = [epoch[path] for epoch in ranks]
        ax.plot(epochs, values, "o-", ms=2, lw=1, alpha=0.7, label=name)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("epoch")
    ax.set_ylabel("rank")
    if len(ranks[0]) <= _MOST_NAMED:
        ax.legend(
            frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1)
        )
    return figure


def plot_rank_map(ranks: Mapping[str, int], ax=None):
    """Draws final ranks as a heat map, layers x projections.

    A path's last name is its projection, what stands before its layer.

    Args:
        ranks: The last of `callbacks.RankBudget.ranks`, or what
            `compact_ranks` gives.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: It holds no ranks.
        ImportError: matplotlib is missing.
    """
    _check(_are_ranks(ranks), ranks, "`budget.ranks[-1]`")
    places = [path.rpartition("/")[::2] for path in ranks]
    layers = list(dict.fromkeys(layer for layer, _ in places))
    names = list(dict.fromkeys(name for _, name in places))
    table = np.full((len(layers), len(names)), np.nan)
    for (layer, name), rank in zip(places, ranks.values()):
        table[layers.index(layer), names.index(name)] = rank
    size = (3 + 0.6 * len(names), 1.5 + 0.3 * len(layers))
    figure, ax = new_axes(ax, size)
    image = ax.imshow(table, cmap="viridis", vmin=0, aspect="auto")
    low = 0.6 * np.nanmax(table)
    for (row, column), rank in np.ndenumerate(table):
        if not np.isnan(rank):
            color = "white" if rank < low else "black"
            text = f"{rank:.0f}"
            ax.text(
                column, row, text, ha="center", va="center", c=color, fontsize=8
            )
    ax.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    ax.set_yticks(range(len(layers)), short_paths(layers), fontsize=8)
    ax.figure.colorbar(image, ax=ax, label="rank")
    return figure


def plot_posterior(model: keras.Model, bins: int = 40, ax=None):
    """Draws how wide IVON's posterior is, one line for each variable.

    Args:
        model: A model that was trained with IVON.
        bins: Of the histograms of standard deviations.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: The model's optimizer is not IVON, or not built.
        ImportError: matplotlib is missing.
    """
    check_model(model)
    check_rank(bins, "bins")
    optimizer = ivon_of(model)
    variables = model.trainable_variables
    widths = [optimizer.posterior(v)[1].ravel() for v in variables]
    low, high = min(map(np.min, widths)), max(map(np.max, widths))
    edges = np.geomspace(low * 0.99, high * 1.01, bins + 1)
    figure, ax = new_axes(ax, (7, 3.5))
    for width, name in zip(widths, short_paths([v.path for v in variables])):
        counts, _ = np.histogram(width, edges)
        ax.stairs(counts / counts.sum(), edges, label=name, lw=1)
    ax.set_xscale("log")
    ax.set_xlabel("standard deviation of a weight")
    ax.set_ylabel("share of the variable's weights")
    if len(variables) <= _MOST_NAMED:
        ax.legend(frameon=False, fontsize=7)
    return figure


def _are_ranks(ranks):
    """Whether it is a dictionary of ranks by path, and not empty."""
    known = isinstance(ranks, Mapping) and len(ranks) > 0
    return known and all(map(is_whole, ranks.values()))


def _check(known, ranks, expected):
    if not known:
        raise ValueError(
            f"Received {ranks!r}. Expected {expected} of a RankBudget after "
            "`fit`."
        )
