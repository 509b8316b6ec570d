"""Where a picture is drawn, and what layers are called in it."""


def new_axes(ax, size):
    """The figure and axes given, or new ones; matplotlib is needed here."""
    if ax is not None:
        if not hasattr(ax, "figure") or not hasattr(ax, "plot"):
            raise ValueError(
                f"Received ax={ax!r}. Expected matplotlib axes, or None."
            )
        return ax.figure, ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install keras-spectral[plots]."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def short_paths(paths):
    """Paths without the start that all share."""
    parts = [path.split("/") for path in paths]
    same = 0
    while all(len(p) > same + 1 and p[same] == parts[0][same] for p in parts):
        same += 1
    return ["/".join(p[same:]) for p in parts]
