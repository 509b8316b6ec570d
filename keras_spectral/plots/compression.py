"""Pictures of pruning and of learned compressions."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_spectral._internal.checks import check_mapping
from keras_spectral.plots.axes import new_axes
from keras_spectral.plots.axes import short_paths

_MOST_NAMED = 12


def plot_sensitivity(
    scan: Mapping[str, Mapping[float, float]], metric: str = "accuracy", ax=None
):
    """Draws what pruning each layer alone does to a metric.

    Args:
        scan: What `sensitivity_scan` gives.
        metric: What the axis is called.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: It is no scan.
        ImportError: matplotlib is missing.
    """
    expected = "what `sensitivity_scan` gives"
    for curve in check_mapping(scan, "scan", expected).values():
        check_mapping(curve, "scan", expected)
    figure, ax = new_axes(ax, (7, 3.5))
    for curve, name in zip(scan.values(), short_paths(list(scan))):
        shares = 100 * np.array(list(curve))
        ax.plot(shares, list(curve.values()), "o-", ms=3, lw=1, label=name)
    ax.set_xlabel("weights set to zero in %")
    ax.set_ylabel(metric)
    if len(scan) <= _MOST_NAMED:
        ax.legend(
            frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1)
        )
    return figure


def plot_learning(history: Sequence[Mapping[str, Any]], ax=None):
    """Draws ranks and distortion over the rounds of `learn_compression`.

    Solid lines are the ranks of layers (left), dotted ones how far their
    kernels are from what they become, `|K - T| / |K|` (right).

    Args:
        history: The second thing that `learn_compression` returns.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: It holds no rounds.
        ImportError: matplotlib is missing.
    """
    known = isinstance(history, Sequence) and all(map(_is_round, history))
    if not known or not history:
        raise ValueError(
            f"Received history={history!r}. Expected the list that "
            "`learn_compression` returns."
        )
    figure, ax = new_axes(ax, (7, 3.5))
    right = ax.twinx()
    rounds = [record["round"] + 1 for record in history]
    paths = list(history[0]["distortion"])
    for i, (path, name) in enumerate(zip(paths, short_paths(paths))):
        color = f"C{i % 10}"
        if path in history[0]["ranks"]:
            ranks = [record["ranks"][path] for record in history]
            ax.plot(rounds, ranks, "o-", ms=2, c=color, lw=1)
        gaps = [record["distortion"][path] for record in history]
        ax.plot([], [], c=color, label=name)
        right.plot(rounds, gaps, ":", color=color, lw=1)
    ax.set_ylim(bottom=0)
    right.set_ylim(bottom=0)
    ax.set_xlabel("round")
    ax.set_ylabel("rank")
    right.set_ylabel("distortion (dotted)")
    if len(paths) <= _MOST_NAMED:
        ax.legend(frameon=False, fontsize=7)
    return figure


def _is_round(record):
    needed = {"round", "ranks", "distortion"}
    return isinstance(record, Mapping) and needed <= record.keys()
