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
from keras_spectral.layers.host import Host
from keras_spectral.layers.member import own_weights
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model.counting import count_variables
from keras_spectral.model.counting import count_weights
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One layer: counts are numbers of weights, the base's included.

    A quantised kernel counts as its numbers, not as packed bytes, and scales
    of a quantisation do not count.

    Attributes:
        errors: With LoftQ how far the layer is from the float kernel without
            the adapter and at its start with it, relative to the kernel by
            the Frobenius norm; else None.
    """

    path: str
    kind: str
    method: str | None
    rank: int | None
    trainable: int
    frozen: int
    adapter: str | None = None
    strength: float | None = None
    errors: tuple[float, float] | None = None

    @property
    def total(self) -> int:
        return self.trainable + self.frozen


@dataclasses.dataclass(frozen=True)
class Summary:
    """The table of `adapter_summary` as data.

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

    With several adapters it also says of each row whose it is, and at what
    strength. Layers of one name, method, rank and size share a line,
    `12 x .../query`, with their counts added up; the rows that are returned
    are of single layers. Other layers that train beside the adapters are
    marked "trained".
    Below stand layers with a raw kernel, which is no Dense, Conv or Embedding
    (experts' tables, position embeddings), so that no adapter reaches it.

    Args:
        model: A Keras model, wrapped or not.
        console: Where to print; a new rich console by default.

    Returns:
        The table as data.

    Raises:
        ValueError: `model` is no Keras model.

    Example:

    >>> import keras_spectral as ks
    >>> layer = ks.LoRADense(keras.layers.Dense(8, name="hidden"), rank=2)
    >>> model = keras.Sequential([keras.Input((16,)), layer])
    >>> adapter_summary(model, rich.console.Console(quiet=True))
    Summary(1 adapters, 48 of 186 weights trainable)
    """
    check_model(model)
    found = [row for place in places(model) for row in _rows(place)]
    rows = tuple(r for r in found if r.adapter is not None or r.trainable)
    rows += tuple(_shared_rows(model))
    raw = tuple(
        row
        for place in places(model)
        if _holds_raw_kernel(place.layer)
        for row in _rows(place)
    )
    summary = Summary(
        rows, raw, count_weights(model, trainable=True), count_weights(model)
    )
    show(console, _table(model, summary))
    return summary


def _rows(place):
    """A row for each member of a host, or the one of a plain layer."""
    if not isinstance(place.layer, Host):
        own = own_variables(place.layer)
        return [_counted(place, own, [place.layer])]
    base = place.layer.layer
    whole = not isinstance(place.layer, TrainedCopy)
    rows = []
    for member in place.layer.members():
        method = getattr(member, "method", None)
        own, owners = own_weights(member), [member]
        if whole and not rows:  # the base counts once
            own, owners = [*own, *base.weights], [member, *all_layers(base)]
        row = _counted(place, own, owners)
        rows.append(
            dataclasses.replace(
                row,
                method=method,
                rank=getattr(member, "rank", None),
                adapter=member.adapter_name,
                strength=member.current_strength(),
                errors=getattr(member, "start_errors", None),
            )
        )
    if not whole:
        rows.append(_counted(place, own_variables(base), [base]))
    return rows


def _counted(place, weights, owners):
    trains = [w for w in weights if w.trainable]
    trainable = count_variables(trains, owners)
    frozen = count_variables(weights, owners) - trainable
    kind = type(subject(place.layer)).__name__
    return SummaryRow(place.path, kind, None, None, trainable, frozen)


def _shared_rows(model):
    """A row for each layer that several adapters share."""
    shared = {
        id(place.layer.shared): place.layer.shared
        for place in adapter_places(model)
        if place.layer.shared is not None
    }
    rows = []
    for layer in shared.values():
        trainable = count_weights(layer, trainable=True)
        frozen = count_weights(layer) - trainable
        kind = type(layer).__name__
        rows.append(SummaryRow(layer.name, kind, None, None, trainable, frozen))
    return rows


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
    if isinstance(layer, Host) or isinstance(subject(layer), known):
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
    several = len({row.adapter for row in summary.rows} - {None}) > 1
    if several:
        table.add_column("adapter", overflow="fold")
    table.add_column("method", no_wrap=True)
    for name in ("rank", "trainable", "frozen", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    lost = any(row.errors for row in summary.rows)
    if lost:
        table.add_column("lost %", justify="right", no_wrap=True)
    for rows, note in ((summary.rows, "trained"), (summary.raw, "raw kernel")):
        for label, group in grouped(rows, _size):
            row = group[0]
            rank = "" if row.rank is None else str(row.rank)
            counts = (row.trainable, row.frozen, row.total)
            name = [_named(row)] if several else []
            table.add_row(
                label,
                *name,
                row.method or note,
                rank,
                *(f"{len(group) * n:,}" for n in counts),
                *[_lost(group)] * lost,
            )
        table.add_section()
    frozen = summary.total - summary.trainable
    share = 100 * summary.trainable / max(summary.total, 1)
    counts = (summary.trainable, frozen, summary.total)
    table.add_row(
        f"whole model, {share:.3g} %",
        *([""] if several else []),
        "",
        "",
        *(f"{n:,}" for n in counts),
    )
    return table


def _lost(group):
    """The mean errors of a group in %, before and after."""
    errors = [row.errors for row in group if row.errors]
    means = [100 * sum(column) / len(errors) for column in zip(*errors)]
    return " -> ".join(f"{mean:.2g}" for mean in means)


def _named(row):
    """An adapter's name, and its strength where that is not 1."""
    if row.adapter is None:
        return ""
    if row.strength == 1:
        return row.adapter
    return (
        f"{row.adapter} ({row.strength:.3g})"
        if row.strength
        else (f"{row.adapter} (off)")
    )


def _size(row):
    counts = row.trainable, row.frozen
    return row.kind, row.method, row.rank, *counts, row.adapter, row.strength
