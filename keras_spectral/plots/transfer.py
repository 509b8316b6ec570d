"""Pictures of weight transfer."""

from collections.abc import Mapping
from collections.abc import Sequence

from keras_spectral._internal.checks import check_mapping
from keras_spectral.plots.axes import new_axes


def plot_transfer(
    history: Mapping[str, Sequence[float]], metric: str = "accuracy", ax=None
):
    """Draws how a low-rank pair takes over from the original.

    Three curves over epochs: original and pair together, the pair alone, and
    the original's factor.

    Args:
        history: `model.fit(...).history` of a training with
            `callbacks.TransferMonitor`.
        metric: Name of the metric, without `val_`.
        ax: matplotlib axes; a new figure by default.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: The history has no such metric of the pair alone.
        ImportError: matplotlib is missing.
    """
    expected = "`model.fit(...).history`"
    check_mapping(history, "history", expected)
    together, alone = f"val_{metric}", f"val_adapter_{metric}"
    missing = [n for n in (together, alone, "decay") if n not in history]
    if missing:
        raise ValueError(
            f"The history lacks {missing}; it has {sorted(history)}. Expected "
            "one of a fit with callbacks.TransferMonitor(validation_data)."
        )
    figure, ax = new_axes(ax, (7, 3.5))
    epochs = range(1, len(history["decay"]) + 1)
    for name, label, style, color in (
        (together, "original and pair", "-", "#30638e"),
        (alone, "pair alone", "-", "#d1495b"),
        ("decay", "factor of the original", ":", "#777777"),
    ):
        ax.plot(epochs, history[name], style, color=color, label=label)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("epoch")
    ax.set_ylabel(metric)
    ax.legend(frameon=False)
    return figure
