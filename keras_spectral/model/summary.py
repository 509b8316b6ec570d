"""A table of what is adapted and what trains."""

import dataclasses

import keras
import rich.box
import rich.console
import rich.table

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.layer_tools import all_layers
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral._internal.tables import grouped
from keras_spectral._internal.tables import show
from keras_spectral.layers import AdapterLayer
from keras_spectral.model.counting import count_variables
from keras_spectral.model.counting import count_weights
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One layer: counts are numbers of weights, the base's included.

    A quantised kernel counts as its numbers, not as packed bytes, and scales
    of a quantisation do not count.
    """

    path: str
    kind: str
    method: str | None
    rank: int | None
    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `adapter_summary` printed, as data.

    Attributes:
        rows: Adapters and other layers that train.
        raw: Layers with kernels of their own that no adapter fits.
        trainable: Trainable weights of the whole model.
        total: All weights of the whole model.
    """

    rows: tuple[SummaryRow, ...]
    raw: tuple[SummaryRow, ...]
    trainable: int
    total: int

    def __repr__(self) -> str:
        adapters = sum(row.method is not None for row in self.rows)
        return (
            f"Summary({adapters} adapters, {self.trainable:,} of "
            f"{self.total:,} weights trainable)"
        )


def adapter_summary(
    model: keras.Model, console: rich.console.Console | None = None
) -> Summary:
    """Prints a table of adapters and other trained layers, with counts.

    Layers of one name, method, rank and size share a line, `12 x .../query`,
    with their counts added up; the rows that are returned are of single
    layers. Other layers that train beside the adapters are marked "trained".
    Below stand layers with a raw kernel, which is no Dense, Conv or Embedding
    (experts' tables, position embeddings), so that no adapter reaches it.

    Args:
        model: A Keras model, wrapped or not.
        console: Where to print; a new rich console by default.

    Returns:
        The same as data.

    Raises:
        ValueError: `model` is no Keras model.

    Example:

    >>> import keras_spectral as ks
    >>> layer = ks.LoRADense(keras.layers.Dense(8, name="hidden"), rank=2)
    >>> model = keras.Sequential([keras.Input((16,)), layer])
    >>> adapter_summary(model, rich.console.Console(quiet=True))
    Summary(1 adapters, 48 of 185 weights trainable)
    """
    check_model(model)
    found = [_row(place) for place in places(model)] + _shared_rows(model)
    rows = tuple(r for r in found if r.method is not None or r.trainable)
    raw = tuple(
        _row(place) for place in places(model) if _holds_raw_kernel(place.layer)
    )
    summary = Summary(
        rows, raw, count_weights(model, trainable=True), count_weights(model)
    )
    show(console, _table(model, summary))
    return summary


def _row(place):
    layer = place.layer
    if isinstance(layer, AdapterLayer):
        kind = type(layer.layer).__name__
        method, rank = layer.method, getattr(layer, "rank", None)
        weights = [*own_variables(layer), *layer.layer.weights]
        owners = [layer, *all_layers(layer.layer)]
    else:
        kind, method, rank = type(subject(layer)).__name__, None, None
        weights, owners = own_variables(layer), [layer]
    trains = [w for w in weights if w.trainable]
    trainable = count_variables(trains, owners)
    frozen = count_variables(weights, owners) - trainable
    return SummaryRow(place.path, kind, method, rank, trainable, frozen)


def _shared_rows(model):
    """A row for each layer that several adapters share."""
    rows = {}
    for place in places(model):
        if isinstance(place.layer, AdapterLayer) and place.layer.shared:
            shared = place.layer.shared
            trainable = count_weights(shared, trainable=True)
            frozen = count_weights(shared) - trainable
            rows[id(shared)] = SummaryRow(
                shared.name,
                type(shared).__name__,
                None,
                None,
                trainable,
                frozen,
            )
    return list(rows.values())


def _holds_raw_kernel(layer):
    known = (
        keras.layers.Dense,
        keras.layers.EinsumDense,
        keras.layers.Embedding,
        *(getattr(keras.layers, f"Conv{n}D") for n in (1, 2, 3)),
        *(getattr(keras.layers, f"Conv{n}DTranspose") for n in (1, 2, 3)),
        keras.layers.SeparableConv1D,
        keras.layers.SeparableConv2D,
    )
    if isinstance(layer, AdapterLayer) or isinstance(subject(layer), known):
        return False
    return any(
        sum(size > 1 for size in weight.shape) > 1
        for weight in own_variables(layer)
    )


def _table(model, summary):
    table = rich.table.Table(
        title=f"Adapters of {model.name}",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("layer", overflow="fold", ratio=1)
    table.add_column("method", no_wrap=True)
    for name in ("rank", "trainable", "frozen", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for rows, note in ((summary.rows, "trained"), (summary.raw, "raw kernel")):
        for label, group in grouped(rows, _size):
            row = group[0]
            rank = "" if row.rank is None else str(row.rank)
            counts = (row.trainable, row.frozen, row.total)
            table.add_row(
                label,
                row.method or note,
                rank,
                *(f"{len(group) * n:,}" for n in counts),
            )
        table.add_section()
    frozen = summary.total - summary.trainable
    share = 100 * summary.trainable / max(summary.total, 1)
    counts = (summary.trainable, frozen, summary.total)
    table.add_row(
        f"whole model, {share:.3g} %",
        "",
        "",
        *(f"{n:,}" for n in counts),
    )
    return table


def _size(row):
    return row.kind, row.method, row.rank, row.trainable, row.frozen
