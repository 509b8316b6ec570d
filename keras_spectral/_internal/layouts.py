"""How the weights of adapters are spread over devices (JAX)."""

from collections.abc import Iterable

import keras
from keras.distribution import LayoutMap
from keras.distribution import TensorLayout


class AdapterLayoutMap(LayoutMap):
    """A layout map that `adapter_layout` has completed."""

    def __init__(self, device_mesh):
        super().__init__(device_mesh)
        self._known = {}  # layouts of adapters' weights, by their paths

    def __getitem__(self, key):
        return self._known.get(key) or super().__getitem__(key)

    def know(self, path: str, layout: TensorLayout) -> None:
        """Gives the weight of a path a layout, whatever the rules say."""
        self._known[path] = layout


def adapter_layout(layout_map: LayoutMap) -> LayoutMap:
    """Completes a layout map for the adapters of a model.

    Under `keras.distribution.ModelParallel` with the map returned, weights of
    adapters that have a row for each row of the kernel K (n_in x n_out), as
    LoRA's A, are split as the kernel's inputs are; those that have a column
    for each of its columns, as B, as its outputs; all others are replicated.
    For a Dense kernel with `(x, y)`:

    - A (n_in x r) has `(x, None)`, and B (r x n_out) has `(None, y)`.

    Of a kernel with more than two axes those count that come first among its
    rows or its columns, such as the heads of an attention. What the devices
    of an axis do not divide is replicated. Copies of heads and norms, which
    train beside adapters, are split as their originals; the kernels of
    `LowRank` layers are replicated.

    Without this function adapters are what the rules of the map say, which
    may have been written for other shapes, and replicated where none fits.

    Args:
        layout_map: A `keras.distribution.LayoutMap`. A rule of it counts for
            an adapter's weight if it fits the weight's path and no path of
            the weights of its base: a rule that is meant for a kernel never
            gets hold of the adapter beside it.

    Returns:
        A new map with the same rules, for
        `keras.distribution.ModelParallel(layout_map=...)`. The distribution
        has to be set when the model is made and when it is wrapped.

    Raises:
        ValueError: It is no layout map.

    Example:

    >>> axes = "batch", "model"
    >>> mesh = keras.distribution.DeviceMesh((1, 1), axes, ["cpu:0"])
    >>> rules = keras.distribution.LayoutMap(mesh)
    >>> rules[".*dense.*kernel"] = (None, "model")
    >>> rules = adapter_layout(rules)
    >>> rules["dense/kernel"].axes
    (None, 'model')
    """
    if not isinstance(layout_map, LayoutMap):
        raise ValueError(
            f"Received {layout_map!r}. Expected a "
            "`keras.distribution.LayoutMap`."
        )
    completed = AdapterLayoutMap(layout_map.device_mesh)
    for pattern, layout in layout_map.items():
        completed[pattern] = layout
    return completed


def lay_out(
    path: str, shape: tuple[int, ...], view, base: keras.layers.Layer
) -> None:
    """Says how an adapter's weight is to be split, before it is made.

    Args:
        path: The weight's path.
        shape: Its shape.
        view: How the adapter sees its base.
        base: The layer that it changes.
    """
    rules = _rules()
    if rules is None:
        return
    asked = _rule(rules, path, [weight.path for weight in base.weights])
    axes = [None] * len(shape)
    if hasattr(view, "row_axes") and len(shape) == 2:
        rows, columns = split_axes(view, rules.device_mesh)
        if shape[0] == view.n_in:
            axes[0] = rows
        if shape[1] == view.n_out and columns != axes[0]:
            axes[1] = columns
    rules.know(path, asked or TensorLayout(tuple(axes), rules.device_mesh))


def lay_out_like(path: str, original: keras.Variable) -> None:
    """Says that a weight is to be split as another one of its shape."""
    rules, layout = _rules(), getattr(original, "_layout", None)
    if rules is not None and isinstance(layout, TensorLayout):
        rules.know(path, layout)


def replicate(path: str, num_axes: int) -> None:
    """Says that each device is to hold the whole of a weight."""
    rules = _rules()
    if rules is not None:
        rules.know(path, TensorLayout((None,) * num_axes, rules.device_mesh))


def _rules():
    """The map of the distribution in use, if `adapter_layout` made it."""
    distribution = keras.distribution.distribution()
    rules = getattr(distribution, "_layout_map", None)
    return rules if isinstance(rules, AdapterLayoutMap) else None


def _rule(
    rules: LayoutMap, path: str, others: Iterable[str]
) -> TensorLayout | None:
    """The layout of the rule that fits a path and none of the others."""
    fitting = LayoutMap(rules.device_mesh)
    for pattern, layout in rules.items():
        one = LayoutMap(rules.device_mesh)
        one[pattern] = layout
        if one[path] and not any(one[other] for other in others):
            fitting[pattern] = layout
    return fitting[path]


def split_axes(view, mesh):
    """The mesh axes that split the kernel's rows and its columns, or None."""
    if view.kernel_name is None:
        return None, None
    layout = getattr(view.variable(), "_layout", None)
    axes = getattr(layout, "axes", None)
    if axes is None:
        return None, None
    sizes = dict(zip(mesh.axis_names, mesh.shape))
    found = []
    rows = [i % len(axes) for i in view.row_axes]
    columns = [i for i in range(len(axes)) if i not in rows]
    for numbers, size in (rows, view.n_in), (columns, view.n_out):
        names = [axes[i] for i in numbers]
        # What splits the first axis splits the rows into equal stretches.
        alone = names and not any(names[1:]) and names[0] is not None
        fits = alone and size % sizes[names[0]] == 0
        found.append(names[0] if fits else None)
    return found
