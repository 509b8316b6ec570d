"""Where a picture is drawn."""


def new_axes(ax, size):
    """The figure and axes given, or new ones; matplotlib is needed here."""
    if ax is not None:
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install keras-spectral[plots]."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()
