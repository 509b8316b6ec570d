"""Tables of the layers that can be wrapped, and of the methods."""

import dataclasses
import inspect
from typing import Any

import keras
import rich.box
import rich.console
import rich.table
from rich.text import Text

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.tables import grouped
from keras_spectral._internal.tables import show
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.norm import is_norm
from keras_spectral.layers import METHODS
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers import BitFit
from keras_spectral.layers.host import Host
from keras_spectral.model.options import adapter_class_of
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.presets import adaptable
from keras_spectral.model.select import chosen_by_presets
from keras_spectral.model.select import without_halves
from keras_spectral.model.ties import rewritten
from keras_spectral.model.ties import tied


@dataclasses.dataclass(frozen=True)
class TargetRow:
    """One layer that an adapter fits.

    Attributes:
        path: What a pattern has to match.
        kind: The layer's class.
        shape: n_in x n_out of its kernel as a matrix; None for a block or a
            backbone, which has no kernel of its own.
        max_rank: The largest rank that fits the kernel, or None.
        presets: The preset words that choose it.
        method: What it is wrapped with already, or None.
        note: Why it has to be asked for by its class, or "".
    """

    path: str
    kind: str
    shape: tuple[int, int] | None
    max_rank: int | None
    presets: tuple[str, ...]
    method: str | None
    note: str


@dataclasses.dataclass(frozen=True)
class Targets:
    """The table of `list_targets` as data.

    Attributes:
        rows: The layers, in the model's order.
    """

    rows: tuple[TargetRow, ...]

    def __repr__(self) -> str:
        wrapped = sum(row.method is not None for row in self.rows)
        return f"Targets({len(self.rows)} layers, {wrapped} of them wrapped)"


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """One method of `wrap_model`.

    Attributes:
        name: What `wrap_model` takes.
        cls: Its class.
        target: The default target.
        options: Its own options with their defaults.
        trains: What it trains, in words.
        merges: Whether `merge_model` can fold it into the kernel.
    """

    name: str
    cls: type[AdapterLayer]
    target: str
    options: dict[str, Any]
    trains: str
    merges: bool


@dataclasses.dataclass(frozen=True)
class Methods:
    """The table of `methods` as data.

    Attributes:
        rows: The methods by name.
    """

    rows: tuple[MethodRow, ...]

    def __repr__(self) -> str:
        return f"Methods({', '.join(row.name for row in self.rows)})"


def list_targets(
    model: keras.Model,
    method: str | type[AdapterLayer] | None = None,
    console: rich.console.Console | None = None,
) -> Targets:
    """Prints which layers of a model can be wrapped, and what chooses them.

    For each layer the table has its path, which `target=` has to match as a
    whole, its kernel as a matrix (inputs x outputs) and the largest rank
    that fits it, and the preset words that choose it. Layers of one name and
    kind share a line, `12 x .../query`.

    Args:
        model: A built Keras model, wrapped or not.
        method: List only what this method fits; a name or a class.
        console: Where to print; a new rich console by default.

    Returns:
        The table as data, layer by layer.

    Raises:
        ValueError: `model` is no Keras model or not built, or `method` no
            method.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden"),
    ...      keras.layers.Dense(2, name="head")]
    ... )
    >>> targets = list_targets(model, "lora", rich.console.Console(quiet=True))
    >>> targets.rows[0].path, targets.rows[0].shape, targets.rows[0].presets
    ('hidden', (16, 8), ('all-linear', 'all'))
    """
    check_model(model)
    found = shown = places(model)
    if method is not None:
        kinds = [adapter_class_of(method)]
    else:
        # Norms, and all with a bias, would be most of the table.
        kinds = [kind for kind in METHODS.values() if kind is not BitFit]
        shown = [p for p in found if not is_norm(subject(p.layer))]
    fits = {id(p) for kind in kinds for p in adaptable(shown, kind)}
    fits -= {id(p) for p in found if id(p) not in _ids(without_halves(found))}
    unsafe = rewritten(model, found)
    chosen = [
        p
        for p in found
        if id(p) in fits
        and subject(p.layer).built
        and id(subject(p.layer)) not in unsafe
    ]
    if fits and not chosen and not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built: its layers have no weights "
            "yet. Call it on a batch or use `build(input_shape)` first."
        )
    words = chosen_by_presets(model, found)
    notes = tied(model, found)
    targets = Targets(tuple(_row(p, words, notes) for p in chosen))
    show(console, _targets_table(model, targets))
    return targets


def methods(console: rich.console.Console | None = None) -> Methods:
    """Prints the methods that `wrap_model` knows, with their options.

    Args:
        console: Where to print; a new rich console by default.

    Returns:
        The table as data; methods of one's own are among them once their
        module is imported.

    Raises:
        ValueError: `console` is no console.

    Example:

    >>> table = methods(rich.console.Console(quiet=True))
    >>> lora = next(row for row in table.rows if row.name == "lora")
    >>> lora.options["rank"], lora.target, lora.merges
    (8, 'attention', True)
    """
    table = Methods(tuple(_method_row(name) for name in sorted(METHODS)))
    show(console, _methods_table(table))
    return table


def _ids(found):
    return {id(place) for place in found}


def _row(place: Place, words, notes):
    layer, method = subject(place.layer), None
    if isinstance(place.layer, Host):
        used = [getattr(m, "method", None) for m in place.layer.members()]
        method = ", ".join(filter(None, dict.fromkeys(used))) or None
    try:
        view = kernel_view(layer)
        shape, max_rank = (view.n_in, view.n_out), view.max_rank
    except ValueError:  # a block or a backbone
        shape = max_rank = None
    return TargetRow(
        place.path,
        type(layer).__name__,
        shape,
        max_rank,
        tuple(word for word, ids in words.items() if id(place) in ids),
        method,
        f"tied: {notes[id(layer)]}" if id(layer) in notes else "",
    )


def _method_row(name):
    cls = METHODS[name]
    parameters = inspect.signature(cls.__init__).parameters
    options = {n: parameters[n].default for n in cls.option_names()}
    trains = getattr(cls, "trains", None)
    if trains is None:
        trains = (inspect.getdoc(cls) or "").partition("\n")[0]
    return MethodRow(name, cls, cls.default_target, options, trains, cls.merges)


def _targets_table(model, targets):
    table = _new_table(f"Layers of {model.name} that an adapter fits")
    table.add_column("layer, its class and what chooses it", ratio=1)
    for name in ("matrix", "max rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, group in grouped(targets.rows, _what):
        row = group[0]
        words = ", ".join(row.presets) or "its path or class"
        if row.note:
            words = "its class alone"
        if row.method is not None:
            words += f"; has {row.method}"
        table.add_row(
            label.append(f"\n  {row.kind}: {words}", "dim"),
            "" if row.shape is None else "{} x {}".format(*row.shape),
            "" if row.max_rank is None else f"{row.max_rank:,}",
        )
    return table


def _what(row):
    return row.kind, row.shape, row.max_rank, row.presets, row.method, row.note


def _methods_table(methods):
    table = _new_table("Methods of wrap_model")
    table.add_column("method", no_wrap=True)
    table.add_column("what it trains, and its options", ratio=1)
    table.add_column("target", no_wrap=True)
    table.add_column("merges", no_wrap=True)
    for row in methods.rows:
        options = ", ".join(f"{k}={v!r}" for k, v in row.options.items())
        merges = "yes" if row.merges else "no"
        table.add_row(
            row.name,
            Text(row.trains).append(f"\n{options}", "dim"),
            row.target,
            merges,
        )
    return table


def _new_table(title):
    return rich.table.Table(
        title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
