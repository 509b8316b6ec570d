"""Pictures of the gates of UniPELT blocks."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_spectral._internal.checks import check_mapping
from keras_spectral._internal.checks import check_rank
from keras_spectral.plots.axes import new_axes
from keras_spectral.plots.axes import short_paths

_COLORS = ("#30638e", "#d1495b", "#edae49", "#66a182")
_EXPECTED = "what `collect_gates` gives"
Gates = Mapping[str, Mapping[str, np.ndarray]]


def plot_gate_bars(gates: Gates, ax=None):
    """Draws mean and deviation of each part's gate, block by block.

    Args:
        gates: What `collect_gates` gives.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: There are no gates.
        ImportError: matplotlib is missing.
    """
    names, table = _table(gates, np.mean)
    _, spread = _table(gates, np.std)
    figure, ax = new_axes(ax, (2.5 + 0.7 * len(gates), 3.5))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        places = np.arange(len(gates)) + (i - (len(names) - 1) / 2) * width
        ax.bar(
            places,
            table[:, i],
            width,
            yerr=spread[:, i],
            color=_COLORS[i % len(_COLORS)],
            error_kw={"lw": 0.8},
            label=name,
        )
    paths = short_paths(list(gates))
    ax.set_xticks(range(len(gates)), paths, rotation=30, ha="right", fontsize=8)
    ax.set_ylabel("gate")
    ax.set_ylim(bottom=0)
    ax.margins(y=0.25)
    ax.legend(frameon=False, ncols=len(names), loc="upper left", fontsize=8)
    return figure


def plot_gate_map(gates: Gates, ax=None):
    """Draws a heat map of mean gates, blocks x parts.

    Args:
        gates: What `collect_gates` gives.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: There are no gates.
        ImportError: matplotlib is missing.
    """
    names, table = _table(gates, np.mean)
    size = (2.5 + 0.9 * len(names), 1.2 + 0.35 * len(gates))
    figure, ax = new_axes(ax, size)
    image = ax.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        color = "white" if value < 0.6 else "black"
        text = "" if np.isnan(value) else f"{value:.2f}"
        ax.text(
            column, row, text, ha="center", va="center", c=color, fontsize=8
        )
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.set_yticks(range(len(gates)), short_paths(list(gates)), fontsize=8)
    ax.figure.colorbar(image, ax=ax, label="mean gate")
    return figure


def plot_gate_histogram(gates: Gates, bins: int = 20, ax=None):
    """Draws how often gates have which value, over examples and blocks.

    Args:
        gates: What `collect_gates` gives.
        bins: How many bars from 0 to 1.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: There are no gates.
        ImportError: matplotlib is missing.
    """
    check_rank(bins, "bins")
    names, _ = _table(gates, np.mean)
    figure, ax = new_axes(ax, (6, 3.5))
    for i, name in enumerate(names):
        values = np.concatenate(
            [parts[name] for parts in gates.values() if name in parts]
        )
        color = _COLORS[i % len(_COLORS)]
        ax.hist(
            values,
            bins,
            range=(0, 1),
            histtype="step",
            lw=1.5,
            color=color,
            label=name,
        )
    ax.set_xlim(0, 1)
    ax.set_xlabel("gate")
    ax.set_ylabel("examples x blocks")
    ax.legend(frameon=False)
    return figure


def plot_gate_history(records: Sequence[Mapping[str, Any]], ax=None):
    """Draws each part's mean gate over training steps.

    Thin lines are single blocks, the thick one is their mean.

    Args:
        records: Those of `callbacks.GateRecorder`, or its JSON file's.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: There are no records.
        ImportError: matplotlib is missing.
    """
    known = isinstance(records, Sequence) and all(map(_is_record, records))
    if not known or not records:
        raise ValueError(
            f"Received records={records!r}. Expected those of a GateRecorder "
            "after `fit`."
        )
    steps = [record["step"] for record in records]
    curves: dict[str, dict[str, list[float]]] = {}
    for record in records:
        for path, parts in record["gates"].items():
            for name, (mean, _) in parts.items():
                lines = curves.setdefault(name, {})
                lines.setdefault(path, []).append(mean)
    figure, ax = new_axes(ax, (7, 3.5))
    for i, (name, lines) in enumerate(curves.items()):
        color = _COLORS[i % len(_COLORS)]
        for values in lines.values():
            ax.plot(steps, values, color=color, lw=0.6, alpha=0.5)
        mean = np.mean(list(lines.values()), axis=0)
        ax.plot(steps, mean, "o-", ms=3, color=color, lw=2, label=name)
    ax.set_xlabel("training step")
    ax.set_ylabel("mean gate")
    ax.legend(frameon=False)
    return figure


def _table(gates, statistic):
    """The names of all gates, and a table blocks x gates."""
    for parts in check_mapping(gates, "gates", _EXPECTED).values():
        check_mapping(parts, "gates", _EXPECTED)
    names = list(dict.fromkeys(n for parts in gates.values() for n in parts))
    table = np.full((len(gates), len(names)), np.nan)
    for row, parts in enumerate(gates.values()):
        for name, values in parts.items():
            table[row, names.index(name)] = statistic(values)
    return names, table


def _is_record(record):
    return isinstance(record, Mapping) and {"step", "gates"} <= record.keys()
