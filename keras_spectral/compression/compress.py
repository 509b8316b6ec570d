"""A smaller copy of a model: every kernel as a pair of thin ones."""

import re
import time
from typing import Any

import keras

from keras_spectral._backend import refill
from keras_spectral._backend import release
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.evaluate import batches
from keras_spectral.compression.calibrated import check_calibration
from keras_spectral.compression.calibrated import fits_of
from keras_spectral.compression.choice import check_goal
from keras_spectral.compression.choice import chosen_places
from keras_spectral.compression.choice import default_method
from keras_spectral.compression.costs import UNITS
from keras_spectral.compression.costs import fast_slicings
from keras_spectral.compression.costs import with_costs
from keras_spectral.compression.latency import Timer
from keras_spectral.compression.losses import with_prices
from keras_spectral.compression.pairs import fitted_pair
from keras_spectral.compression.ranks import allocate
from keras_spectral.compression.recovery import prepare_recovery
from keras_spectral.compression.recovery import spare
from keras_spectral.compression.report import CompressedLayer
from keras_spectral.compression.report import CompressionReport
from keras_spectral.compression.report import keep_report
from keras_spectral.compression.rules import RULES
from keras_spectral.compression.saved import copy_model
from keras_spectral.compression.saved import ordered_layers
from keras_spectral.compression.saved import plain_config
from keras_spectral.compression.saved import put_low_rank
from keras_spectral.compression.sequential import sequential_pairs
from keras_spectral.compression.spectrum import LEAVE
from keras_spectral.compression.spectrum import Spectrum
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.calibrate import Calibration
from keras_spectral.model.counting import count_weights
from keras_spectral.model.select import Target


def compress_model(
    model: keras.Model,
    ratio: float | None = None,
    *,
    budget: float | None = None,
    max_error: float | None = None,
    method: str | None = None,
    measure: str = "weights",
    max_slices: int | None = None,
    target: Target | None = None,
    exclude: Target | None = None,
    keep_ends: bool = False,
    true_bound: bool = False,
    recover: str | None = None,
    recover_rank: int = 8,
    calibration: Any = None,
    compensate_bias: bool = True,
    sequential: bool = False,
    batch_size: int = 32,
    unknown_size: int | None = None,
    latencies: dict[str, float] | None = None,
) -> keras.Model:
    """Returns a smaller model whose kernels are truncated by SVD.

    Each kernel K (n_in x n_out) becomes a pair of thin layers of rank r with
    `r (n_in + n_out)` weights; where that is not fewer, the layer stays as it
    is. The model given is not touched. How ranks are chosen:

    - `"uniform"`: the same share of weights in every kernel;
    - `"energy"`: the same share of the sum of squared singular values;
    - `"global"`: all singular values above one share of each kernel's
      largest;
    - `"alds"`: convolutions are cut into slices of their input channels with
      a pair each (a grouped convolution and a 1x1); slices and ranks are
      chosen so that the largest relative error of all layers is smallest.
      A pair, in slices or not, takes a layer's place where it is faster by a
      tenth, which is timed here, unless `max_slices` says otherwise. Layers
      that no pair makes faster are compressed as well only if a budget cannot
      be met without them;
    - `"sensitivity"`: such that the change of the model's outputs, all layers
      together, is smallest. What a layer's change adds to it is estimated
      from gradients of the outputs on the first 64 examples of
      `calibration`. Slices and times count as for ALDS.

    By default it is `"alds"`, and with data for `calibration` and without a
    `max_error` `"sensitivity"`. If the calibration is one of `calibrate`,
    which knows no gradients, it is `"uniform"` where most weights are in
    layers that cannot be cut: there ALDS is `"global"`, which kept less of
    MiniLM's answers.

    With `calibration`, a few hundred typical inputs, what is smallest at a
    rank is no longer the change of the kernel, `||K - A B||`, but that of the
    layer's outputs, `||X K - X A B||` on its inputs X. With `C = X^T X /
    count = L L^T` the kernel's place in all that is said above is taken by
    `L^T K`, and `A B = K V V^T` with the first right singular vectors V of
    it. The bias makes up for the mean of what is lost, so that the means are
    left out of C. Layers that look up a table are truncated as without.

    Sources: ALDS: Liebenwein et al. 2021, arXiv 2107.11442. Outputs: Wang et
    al. 2024 (SVD-LLM), arXiv 2403.07378; Masana et al. 2017 (the bias), arXiv
    1707.04693.

    Args:
        model: Any built Keras or KerasHub model that can be saved.
        ratio: Share of the chosen kernels' weights (or of their operations
            or time, see `measure`) to remove, above 0 and below 1, or
        budget: how many weights the whole model may have (or how many
            operations for one example, or milliseconds for a batch, the
            chosen layers may take), or
        max_error: the largest error bound of a layer, above 0 and below 1:
            of the spectral norm of what is dropped, over the kernel's. That
            is the `bound` of the report, for the ranks without what
            `recover="lora"` spares; the report's `error` is another number,
            by the Frobenius norm.
        method: How ranks are chosen. None: see above.
        measure: What is saved: `"weights"`; `"flops"`, the operations of
            kernels; or `"latency"`, the time that layers take in inference on
            this machine and backend. Each shape is timed once, whole and as a
            pair of a few ranks. A layer that none makes faster stays whole.
        max_slices: Of ALDS and sensitivity, the most slices of a layer,
            however slow they are. By default the time decides; where it is
            not known, because a model leaves sizes open, there are none.
        target: Which layers, as for `wrap_model`. Defaults to all that can
            be factorised but embeddings, or to those that `calibrate` has
            seen, if `calibration` is of it.
        exclude: Which layers not; the same forms.
        keep_ends: Whether the first and the last of them stay as they are.
        true_bound: Whether ALDS judges s slices by their error bound. By
            default it leaves out the bound's factor sqrt(s), as its authors'
            code does, which favours slices and keeps more of the accuracy.
            With `max_error` the bound always counts.
        recover: How it is going to be trained: None, as the model was;
            `"train"`, the factors alone; `"lora"`, a LoRA of `recover_rank`
            on frozen factors, which have as much less rank. A later
            `finalize_transfer` makes one pair of both.
        recover_rank: Rank of that LoRA.
        calibration: What `model.predict` takes, or a tuple `(x, y)`: inputs
            like those that the model is for. Or what `calibrate` gives for
            it, if it has all layers to compress.
        compensate_bias: Whether, with calibration, a layer's bias makes up
            for the mean of what its outputs lose. It is left as it is where
            several outputs of a kernel share a number of it, and layers
            without one get none.
        sequential: Whether layers are fitted one after the other, in the
            order in which they run, to `||(X + X') K / 2 - X' A B||` with the
            inputs X' that the layers compressed before give. Ranks are those
            of X. It runs the model on the data, twice over, once for each
            group of layers that have one input, up to these; or once alone,
            if all data are one batch (see `batch_size`). Layers that a batch
            meets several times are fitted to X.
        batch_size: Of `calibration`, where it is arrays, and of the batch
            that layers are timed on.
        unknown_size: What the sizes count as for the time that a model leaves
            open, such as the length of sequences.
        latencies: Times that are known already: `latencies` of an earlier
            report. The report has milliseconds if this is given, even as
            `{}`, or if they are the measure.

    Returns:
        The new model, made of plain Keras layers and `LowRank` ones.
        `compression_report` says what happened to each layer.

    Raises:
        ValueError: A bad option; a budget that cannot be met; a model of
            open sizes that is to be timed; data that the model cannot run
            on, that give NaN, or outputs without gradients; nothing to
            compress; adapters or quantised kernels in the model; a kernel
            that holds NaN or infinities, that something else holds as well
            or that its layer does not use as its class does; a model that is
            not built or that Keras cannot save.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((64,)), keras.layers.Dense(64, name="hidden"),
    ...      keras.layers.Dense(8, name="head")]
    ... )
    >>> small = compress_model(model, ratio=0.5, exclude="head")
    >>> small.get_layer("hidden").down.units
    16
    >>> data = keras.random.normal((128, 64))
    >>> small = compress_model(
    ...     model, 0.5, exclude="head", calibration=data, sequential=True
    ... )
    """
    start = time.monotonic()
    check_choice(method, "method", (None, *RULES))
    check_choice(measure, "measure", tuple(UNITS))
    check_choice(recover, "recover", (None, "train", "lora"))
    check_rank(recover_rank, "recover_rank")
    check_flag(keep_ends, "keep_ends")
    check_flag(true_bound, "true_bound")
    check_flag(compensate_bias, "compensate_bias")
    check_flag(sequential, "sequential")
    check_rank(batch_size, "batch_size")
    for name, size in (
        ("max_slices", max_slices),
        ("unknown_size", unknown_size),
    ):
        if size is not None:
            check_rank(size, name)
    check_goal(ratio, budget, max_error, measure == "weights")
    check_calibration(calibration, method, sequential)
    if target is None and isinstance(calibration, Calibration):
        target = [re.escape(path) for path in calibration]
    chosen = chosen_places(model, target, exclude, keep_ends)
    small = copy_model(model)
    copies = dict(zip(map(id, ordered_layers(model)), ordered_layers(small)))
    views = [kernel_view(place.layer) for place in chosen]
    if method is None:
        method = default_method(views, calibration, max_error)
    data = calibration
    if calibration is not None and not isinstance(calibration, Calibration):
        data = batches(calibration, batch_size)
        if sequential or method == "sensitivity":
            data = list(data)
    own = [kernel_view(copies[id(place.layer)]) for place in chosen]
    both = list(zip(views, own))
    fits = fits_of(model, chosen, both, data, compensate_bias)
    if not sequential:  # which runs the copy
        _release(fits)
    timer = Timer(batch_size, unknown_size, latencies)
    for _ in range(2):  # by all times: a layer may be faster than it seemed
        limits = [
            _slicings(view, method, measure, max_slices, timer)
            for view in views
        ]
    true_bound = true_bound or max_error is not None
    spectra = _spectra(fits, limits, true_bound, keep=not sequential)
    if method == "sensitivity":
        spectra = with_prices(model, chosen, fits, spectra, data)
    spectra = with_costs(spectra, views, measure, timer)
    if budget is not None and measure == "weights":
        budget += sum(s.weights for s in spectra) - count_weights(model)
    if ratio is not None:
        budget = (1 - ratio) * sum(s.cost(LEAVE) for s in spectra)
    choices = allocate(spectra, method, budget, max_error, UNITS[measure])
    spared = recover_rank if recover == "lora" else 0
    left = [spare(choice, spared) for choice in choices]
    plan = {
        fit.view.layer: (fit, choice)
        for fit, choice in zip(fits, left)
        if choice.rank is not None
    }
    if sequential:
        pairs = sequential_pairs(small, plan, data)
    else:
        _refill([fit for fit in fits if fit.view.layer not in plan])
        pairs = _pairs(plan)
    swaps = {layer: pair.layer for layer, pair in pairs.items()}
    put_low_rank(small, swaps, plain_config(small, swaps))
    _check_count(small, count_weights(model), spectra, left)
    if recover is not None:
        whole = {
            swaps[fit.view.layer]: choice
            for fit, choice in zip(fits, choices)
            if choice.rank is not None
        }
        prepare_recovery(small, whole, recover, spared)
    errors = [
        _error(pairs.get(fit.view.layer), s, c)
        for fit, s, c in zip(fits, spectra, left)
    ]
    timed = timer if measure == "latency" or latencies is not None else None
    rows = [
        _row(*x, timed) for x in zip(chosen, views, spectra, choices, errors)
    ]
    saved = sum(row.weights[0] - row.weights[1] for row in rows)
    weights = (count_weights(model), count_weights(model) - saved)
    seconds = time.monotonic() - start
    error_of = "kernels" if calibration is None else "outputs"
    report = CompressionReport(
        tuple(rows), weights, seconds, error_of, timer.latencies
    )
    keep_report(small, report)
    return small


def _slicings(view, method, measure, most, timer):
    """The numbers of slices to look at, each with its largest rank or None."""
    if method not in ("alds", "sensitivity"):
        return {1: None}
    known = view.slicings()
    if most is None and measure == "weights":
        return fast_slicings(view, known, timer)
    return {n: None for n in known if most is None or n <= most}


def _release(fits):
    """Frees the kernels of a copy until it is known which of them stay."""
    for fit in fits:
        if fit.view.kernel_name is not None:  # it is no product of two
            release(fit.view.variable())


def _refill(fits):
    """Brings kernels back that stay whole."""
    for fit in fits:
        fit.forget()
        if fit.view.kernel_name is not None:
            refill(fit.view.variable(), fit.source.variable())


def _spectra(fits, limits, true_bound, keep):
    found = []
    with LateProgress("singular values", len(fits)) as progress:
        for fit, limit in zip(fits, limits):
            view = fit.view
            # Of several slicings that would be too much to keep.
            keep_it = keep and len(limit) == 1
            values = {n: fit.spectrum(n, keep_it) for n in limit}
            per_rank = {n: view.pair_weights(1, n) for n in limit}
            spectrum = Spectrum(
                values, view.num_weights, per_rank, true_bound, limits=limit
            )
            found.append(spectrum)
            progress.advance(1)
    return found


def _pairs(plan):
    pairs = {}
    with LateProgress("factorising kernels", len(plan)) as progress:
        for layer, (fit, choice) in plan.items():
            pairs[layer] = fitted_pair(fit, choice)
            fit.forget()
            progress.advance(1)
    return pairs


def _error(pair, spectrum, choice):
    """What is lost of the outputs, or of a kernel that no data were for."""
    if pair is None:
        return 0.0
    if pair.error is None:
        return spectrum.relative_error(choice)
    return pair.error


def _check_count(small, before, spectra, choices):
    """Raises unless a model has as many weights as its layers say."""
    saved = sum(
        s.weights - s.size(choice) for s, choice in zip(spectra, choices)
    )
    expected, got = before - saved, count_weights(small)
    if got != expected:
        raise ValueError(
            f"The compressed model has {got:,} weights, and by its layers it "
            f"should have {expected:,}. Expected kernels that their layers "
            "alone hold, in a model that its `.keras` file restores: leave "
            "out with `exclude` what is shared or held by something else."
        )


def _row(place, view, spectrum, choice, error, timer):
    pair = choice.rank, choice.slices
    times = None
    if timer is not None:
        whole = timer.whole(view)
        times = (whole, timer.pair(view, *pair) if choice.rank else whole)
    shape = place.layer.get_build_config()["input_shape"]
    return CompressedLayer(
        place.path,
        type(place.layer).__name__,
        (view.n_in, view.n_out),
        choice.rank,
        choice.slices,
        (spectrum.weights, spectrum.size(choice)),
        (view.flops(shape), view.flops(shape, *pair)),
        error,
        spectrum.bound(choice),
        times,
    )
