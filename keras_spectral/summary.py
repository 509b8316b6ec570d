"""A table of what is adapted and what trains."""

import dataclasses
import math

import keras
import rich.console
import rich.table

from keras_spectral.layers import AdapterLayer
from keras_spectral.paths import places
from keras_spectral.surgery import own_variables


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One layer: counts are numbers of weights, the base's included."""

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

    Other layers that train beside the adapters are marked "trained". Below
    stand layers with a raw kernel, which is no Dense, Conv or Embedding
    (experts' tables, position embeddings), so that no adapter reaches it.

    Args:
        model: A Keras model, wrapped or not.
        console: Where to print; a new rich console by default.

    Returns:
        The same as data.

    Example:

    >>> import keras_spectral as ks
    >>> layer = ks.LoRADense(keras.layers.Dense(8, name="hidden"), rank=2)
    >>> model = keras.Sequential([keras.Input((16,)), layer])
    >>> adapter_summary(model, rich.console.Console(quiet=True))
    Summary(1 adapters, 48 of 185 weights trainable)
    """
    found = [_row(place) for place in places(model)] + _shared_rows(model)
    rows = tuple(r for r in found if r.method is not None or r.trainable)
    raw = tuple(
        _row(place) for place in places(model) if _holds_raw_kernel(place.layer)
    )
    summary = Summary(
        rows, raw, _count(model.trainable_weights), _count(model.weights)
    )
    (console or rich.console.Console()).print(_table(model, summary))
    return summary


def _row(place):
    layer = place.layer
    if isinstance(layer, AdapterLayer):
        kind = type(layer.layer).__name__
        method, rank = layer.method, getattr(layer, "rank", None)
        weights = [*own_variables(layer), *layer.layer.weights]
    else:
        kind, method, rank = type(layer).__name__, None, None
        weights = own_variables(layer)
    trainable = _count(w for w in weights if w.trainable)
    frozen = _count(weights) - trainable
    return SummaryRow(place.path, kind, method, rank, trainable, frozen)


def _shared_rows(model):
    """A row for each layer that several adapters share."""
    rows = {}
    for place in places(model):
        if isinstance(place.layer, AdapterLayer) and place.layer.shared:
            shared = place.layer.shared
            trainable = _count(shared.trainable_weights)
            frozen = _count(shared.weights) - trainable
            rows[id(shared)] = SummaryRow(
                shared.name,
                type(shared).__name__,
                None,
                None,
                trainable,
                frozen,
            )
    return list(rows.values())


def _count(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def _holds_raw_kernel(layer):
    known = (
        AdapterLayer,
        keras.layers.Dense,
        keras.layers.EinsumDense,
        keras.layers.Embedding,
        *(getattr(keras.layers, f"Conv{n}D") for n in (1, 2, 3)),
        *(getattr(keras.layers, f"Conv{n}DTranspose") for n in (1, 2, 3)),
        keras.layers.SeparableConv1D,
        keras.layers.SeparableConv2D,
    )
    if isinstance(layer, known):
        return False
    return any(
        sum(size > 1 for size in weight.shape) > 1
        for weight in own_variables(layer)
    )


def _table(model, summary):
    table = rich.table.Table(title=f"Adapters of {model.name}")
    table.add_column("layer", overflow="fold", ratio=1)
    table.add_column("method", no_wrap=True)
    for name in ("rank", "trainable", "frozen", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    for rows, note in ((summary.rows, "trained"), (summary.raw, "raw kernel")):
        for row in rows:
            rank = "" if row.rank is None else str(row.rank)
            counts = (row.trainable, row.frozen, row.total)
            table.add_row(
                row.path, row.method or note, rank, *(f"{n:,}" for n in counts)
            )
        table.add_section()
    frozen = summary.total - summary.trainable
    share = 100 * summary.trainable / max(summary.total, 1)
    counts = (summary.trainable, frozen, summary.total)
    table.add_row(
        f"whole model, {share:.2f} % trainable",
        "",
        "",
        *(f"{n:,}" for n in counts),
    )
    return table
