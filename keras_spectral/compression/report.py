"""The report of a compression, as data and as a table."""

import dataclasses
import weakref

import keras
import rich.console
import rich.table

from keras_spectral._internal.checks import check_model

_REPORTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class CompressedLayer:
    """One layer that was looked at; `rank` is None where it was left alone.

    Attributes:
        path: Where it is.
        kind: Class of the original.
        shape: n_in x n_out of its kernel as a matrix.
        rank: Singular values kept, in each slice.
        slices: Slices of the input with a pair of their own (ALDS).
        weights: Numbers in its kernel before and after.
        flops: Floating point operations of its kernel for one example
            before and after, a multiplication and an addition being two.
            Sizes that are not known, as those of sequences, count as 1.
        error: How far the new kernel K' is from the old one K:
            `||K - K'|| / ||K||` by the Frobenius norm, from 0 to 1, before
            any training. With calibration it is how far the outputs are,
            `||X K - X K'|| / ||X K||` on its inputs X, less what the bias
            makes up for; if `sequential`, `||X K - X' K'|| / ||X K||` with
            the compressed model's inputs X', which can be above 1. With
            `recover="lora"` all that is without the rank which the LoRA is
            going to fill.
        bound: What `max_error` limits: a bound of the same by the spectral
            norm, for all the rank and for X' = X. Where kernels are sliced
            it has the factor sqrt(slices) and can be above 1.
        milliseconds: How long the layer takes in inference on one batch,
            before and after; None where nothing was timed.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    slices: int
    weights: tuple[int, int]
    flops: tuple[int, int]
    error: float
    bound: float
    milliseconds: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """The effects of `compress_model` on each layer.

    Attributes:
        layers: The layers that it looked at, in the model's order.
        weights: All weights of the whole model before and after.
        seconds: How long it took.
        measure: What the layers' `error` is of: `"kernels"`, or with
            calibration `"outputs"`.
        latencies: Milliseconds of all that was timed, for `latencies` of
            another call on this machine.
    """

    layers: tuple[CompressedLayer, ...]
    weights: tuple[int, int]
    seconds: float
    measure: str = "kernels"
    latencies: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def flops(self) -> tuple[int, int]:
        """Sums over the layers."""
        before, after = zip(*(layer.flops for layer in self.layers))
        return sum(before), sum(after)

    @property
    def milliseconds(self) -> tuple[float, float] | None:
        """Sums over the layers, None where nothing was timed."""
        times = [layer.milliseconds for layer in self.layers]
        if None in times:
            return None
        before, after = zip(*times)
        return sum(before), sum(after)

    def __repr__(self) -> str:
        changed = sum(layer.rank is not None for layer in self.layers)
        before, after = self.weights
        return (
            f"CompressionReport({changed} of {len(self.layers)} layers "
            f"factorised, {before:,} to {after:,} weights)"
        )

    def __rich__(self) -> rich.table.Table:
        times = self.milliseconds
        saved = [
            f"{_percent(self.weights)} fewer weights",
            f"{_percent(self.flops)} fewer FLOPs",
        ]
        if times is not None:
            saved.append(f"{_percent(times)} less time")
        table = rich.table.Table(
            title=", ".join(saved),
            caption="before > after; k 10^3, M 10^6, G 10^9, T 10^12; "
            f"rel. error: of the {self.measure}, by the Frobenius norm; of "
            "the whole model the largest",
        )
        table.add_column("layer", overflow="fold", ratio=1)
        names = ["matrix", "rank", "slices", "weights", "FLOPs"]
        names += ["ms"] * (times is not None)
        for name in (*names, "rel. error"):
            table.add_column(name, justify="right", no_wrap=True)

        def add(name, matrix, rank, slices, row, error):
            cells = [_change(row.weights), _change(row.flops)]
            if times is not None:
                cells.append(_change(row.milliseconds))
            table.add_row(name, matrix, rank, slices, *cells, f"{error:.3f}")

        for layer in self.layers:
            kept = layer.rank is None
            add(
                layer.path,
                "{} x {}".format(*layer.shape),
                "full" if kept else str(layer.rank),
                "" if kept else str(layer.slices),
                layer,
                layer.error,
            )
        table.add_section()
        worst = max(layer.error for layer in self.layers)
        add("whole model", "", "", "", self, worst)
        return table


def compression_report(
    model: keras.Model, console: rich.console.Console | None = None
) -> CompressionReport:
    """Prints what `compress_model` did to each layer of the model it made.

    Args:
        model: A model that `compress_model` returned in this process.
        console: Where to print; a new rich console by default.

    Returns:
        The table as data.

    Raises:
        ValueError: The model was not made by `compress_model`, or loaded
            from a file.
    """
    check_model(model)
    if model not in _REPORTS:
        raise ValueError(
            f"There is no report for model '{model.name}'. Expected a model "
            "that `compress_model` has returned in this process."
        )
    report = _REPORTS[model]
    (console or rich.console.Console()).print(report)
    return report


def keep_report(model: keras.Model, report: CompressionReport) -> None:
    """Remembers it for as long as the model lives."""
    _REPORTS[model] = report


def _change(pair):
    before, after = map(_short, pair)
    return before if before == after else f"{before} > {after}"


def _short(number):
    """Three digits and a thousands letter."""
    for letter in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{letter}"
        number /= 1000
    return f"{number:,.3g}T"


def _percent(pair):
    before, after = pair
    return f"{100 * (1 - after / max(before, 1)):.1f} %"
