"""A smaller copy of a model: every kernel as a pair of thin ones."""

import contextlib
import re
import time

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.linalg import nearest_pair
from keras_spectral.compression import ranks
from keras_spectral.compression.choice import check_goal
from keras_spectral.compression.choice import chosen_places
from keras_spectral.compression.report import CompressedLayer
from keras_spectral.compression.report import CompressionReport
from keras_spectral.compression.report import keep_report
from keras_spectral.compression.saved import copy_model
from keras_spectral.compression.saved import ordered_layers
from keras_spectral.compression.saved import plain_config
from keras_spectral.compression.saved import put_low_rank
from keras_spectral.kernels import KernelView
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.counting import count_weights
from keras_spectral.model.kept import kept_places
from keras_spectral.model.paths import places
from keras_spectral.model.select import Target
from keras_spectral.model.training import set_flags
from keras_spectral.model.wrap import wrap_model


def compress_model(
    model: keras.Model,
    ratio: float | None = None,
    *,
    budget: int | None = None,
    max_error: float | None = None,
    method: str = "alds",
    target: Target | None = None,
    exclude: Target | None = None,
    keep_ends: bool = False,
    true_bound: bool = False,
    recover: str | None = None,
    recover_rank: int = 8,
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

    Source: ALDS: Liebenwein et al. 2021, arXiv 2107.11442.

    Args:
        model: Any built Keras or KerasHub model that can be saved.
        ratio: Share of the chosen kernels' weights to remove, above 0 and
            below 1, or
        budget: how many weights the whole model may have, or
        max_error: the largest error bound of a layer, above 0 and below 1:
            of the spectral norm of what is dropped, over the kernel's. That
            is the `bound` of the report, for the ranks without what
            `recover="lora"` spares; the report's `error` is another number,
            by the Frobenius norm.
        method: How ranks are chosen.
        target: Which layers, as for `wrap_model`. Defaults to all that can
            be factorised but embeddings.
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

    Returns:
        The new model, made of plain Keras layers and `LowRank` ones.
        `compression_report` says what happened to each layer.

    Raises:
        ValueError: A bad option; a budget that cannot be met; nothing to
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
    """
    start = time.monotonic()
    check_choice(method, "method", tuple(ranks.RULES))
    check_choice(recover, "recover", (None, "train", "lora"))
    check_rank(recover_rank, "recover_rank")
    check_flag(keep_ends, "keep_ends")
    check_flag(true_bound, "true_bound")
    check_goal(ratio, budget, max_error)
    chosen = chosen_places(model, target, exclude, keep_ends)
    views = [kernel_view(place.layer) for place in chosen]
    spectra = _spectra(views, method, true_bound or max_error is not None)
    if budget is not None:
        budget = (
            int(budget) - count_weights(model) + sum(s.weights for s in spectra)
        )
    if ratio is not None:
        budget = int((1 - ratio) * sum(s.weights for s in spectra))
    choices = ranks.allocate(spectra, method, budget, max_error)
    order = {id(x): i for i, x in enumerate(ordered_layers(model))}
    small = copy_model(model)
    copies = ordered_layers(small)
    plan = {
        copies[order[id(place.layer)]]: choice
        for place, choice in zip(chosen, choices)
        if choice.rank is not None
    }
    spared = recover_rank if recover == "lora" else 0
    plan = _factorize(small, plan, spared)
    left = [_spare(choice, spared) for choice in choices]
    _check_count(small, count_weights(model), spectra, left)
    if recover is not None:
        _prepare_recovery(small, plan, recover, spared)
    rows = [_row(*x) for x in zip(chosen, views, spectra, choices, left)]
    saved = sum(row.weights[0] - row.weights[1] for row in rows)
    weights = (count_weights(model), count_weights(model) - saved)
    seconds = time.monotonic() - start
    keep_report(small, CompressionReport(tuple(rows), weights, seconds))
    return small


def low_rank_layer(view: KernelView, a, b) -> LowRank:
    """A built pair of layers that does a layer's work with kernel A B.

    Args:
        view: The view of the layer that it is to replace.
        a: Tensor (parts, rows, rank).
        b: Tensor (parts, rank, columns).
    """
    base = view.layer
    down, up = view.thin_layers(a.shape[-1], a.shape[0])
    layer = LowRank(down, up, name=base.name, dtype=base.dtype_policy)
    with _zero_start(down, up):
        layer.build(base.get_build_config()["input_shape"])
    a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
    grouped = b.shape[-1] < view.n_out
    stacked = b.reshape(-1, view.n_out)
    kernel_view(down).assign(_block_diagonal(a))
    kernel_view(up).assign(_block_diagonal(b) if grouped else stacked)
    bias = getattr(base, "bias", None)
    if bias is not None:
        up.bias.assign(bias)
    return layer


@contextlib.contextmanager
def _zero_start(*layers):
    """Layers built within it draw no random weights, only to be overwritten:
    JAX compiles that draw anew for each shape, half a second a time."""
    drawn = [
        (layer, name, value)
        for layer in layers
        for name, value in vars(layer).items()
        if name.endswith("_initializer")
    ]
    for layer, name, _ in drawn:
        setattr(layer, name, keras.initializers.Zeros())
    try:
        yield
    finally:
        for layer, name, value in drawn:
            setattr(layer, name, value)


def _block_diagonal(blocks):
    """A matrix with the blocks (parts, rows, columns) on its diagonal."""
    parts, rows, columns = blocks.shape
    matrix = np.einsum(
        "prc,pq->prqc", blocks, np.eye(parts, dtype=blocks.dtype)
    )
    return matrix.reshape(parts * rows, parts * columns)


def _spectra(views, method, true_bound):
    found = []
    with LateProgress("singular values", len(views)) as progress:
        for view in views:
            matrix = view.matrix()
            slicings = view.slicings() if method == "alds" else [1]
            values = {
                n: ops.convert_to_numpy(
                    ops.svd(view.parts(matrix, n), compute_uv=False)
                )
                for n in slicings
            }
            per_rank = {n: view.pair_weights(1, n) for n in slicings}
            spectrum = ranks.Spectrum(
                values, view.num_weights, per_rank, true_bound
            )
            found.append(spectrum)
            progress.advance(1)
    return found


def _factorize(small, plan, spared):
    """Puts pairs in place of a copy's layers, `spared` ranks smaller.

    Returns the plan with the new layers for keys.
    """
    swaps = {}
    with LateProgress("factorising kernels", len(plan)) as progress:
        for layer, choice in plan.items():
            view = kernel_view(layer)
            rank = _spare(choice, spared).rank
            parts = view.parts(view.matrix(), choice.slices)
            # All ranks, cut in numpy: JAX compiles once for each shape.
            pair = nearest_pair(parts, min(parts.shape[-2:]))
            a, b = map(ops.convert_to_numpy, pair)
            a, b = a[..., :rank], b[..., :rank, :]
            swaps[layer] = low_rank_layer(view, a, b)
            swaps[layer].trainable = layer.trainable
            progress.advance(1)
    put_low_rank(small, swaps, plain_config(small, swaps))
    return {swaps[layer]: choice for layer, choice in plan.items()}


def _spare(choice, spared):
    """A choice with so much less rank, but at least 1."""
    if choice.rank is None:
        return choice
    return ranks.Choice(max(1, choice.rank - spared), choice.slices)


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


def _prepare_recovery(small, plan, recover, spared):
    """Freezes all but what is to restore what was lost."""
    found = places(small)
    if recover == "train":
        halves = [half for layer in plan for half in (layer.down, layer.up)]
        heads = [p.layer for p in kept_places(small, found, None)]
        set_flags(small, [*plan, *halves, *heads])
        return
    ranks_left = {
        re.escape(p.path): {"rank": min(spared, plan[p.layer].rank - 1)}
        for p in found
        if p.layer in plan and plan[p.layer].rank > 1
    }
    if ranks_left:
        names = list(ranks_left)
        wrap_model(small, "lora", target=names, overrides=ranks_left)


def _row(place, view, spectrum, choice, left):
    shape = place.layer.get_build_config()["input_shape"]
    return CompressedLayer(
        place.path,
        type(place.layer).__name__,
        (view.n_in, view.n_out),
        choice.rank,
        choice.slices,
        (spectrum.weights, spectrum.size(choice)),
        (view.flops(shape), view.flops(shape, choice.rank, choice.slices)),
        spectrum.relative_error(left),
        spectrum.bound(choice),
    )
