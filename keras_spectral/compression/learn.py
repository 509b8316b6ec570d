"""Training and compressing in turn: `learn_compression`."""

import os
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_path
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.compiling import check_compiled
from keras_spectral._internal.compiling import compile_like
from keras_spectral._internal.evaluate import check_data
from keras_spectral.compression.choice import chosen_places
from keras_spectral.compression.learn_state import load_state
from keras_spectral.compression.learn_state import save_state
from keras_spectral.compression.own_numbers import assign_numbers
from keras_spectral.compression.own_numbers import in_kernel_shape
from keras_spectral.compression.own_numbers import own_numbers
from keras_spectral.compression.pairs import low_rank_layer
from keras_spectral.compression.pulled import Pulled
from keras_spectral.compression.saved import copy_model
from keras_spectral.compression.saved import ordered_layers
from keras_spectral.compression.saved import plain_config
from keras_spectral.compression.saved import put_low_rank
from keras_spectral.compression.schemes import Scheme
from keras_spectral.compression.schemes import check_schemes
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress

_MADE = ("x", "y", "sample_weight", "epochs")


def learn_compression(
    model: keras.Model,
    dataset: Any,
    compressions: dict[str, Scheme],
    *,
    mu: float = 1e-3,
    growth: float = 1.25,
    rounds: int = 30,
    epochs: int = 1,
    checkpoint: str | os.PathLike | None = None,
    **fit_options: Any,
) -> tuple[keras.Model, list[dict]]:
    """Trains a copy of a model until its kernels are what schemes allow.

    It minimises the loss L of kernels K that are equal to compressed ones T,
    by the method of multipliers, a round being

    - L step: `epochs` of `fit` with the loss
      `L(K) + mu/2 |K - T - m/mu|^2`,
    - C step: for each kernel the T with the least
      `cost(T) + mu/2 |K - m/mu - T|^2`, which the scheme finds,
    - `m = m - mu (K - T)` and `mu = growth mu`.

    At the end K is T. Nothing is compiled again between rounds, and one
    optimizer trains in all of them.

    Source: Carreira-Perpinan 2017, arXiv 1707.01209; learned ranks:
    Idelbayev and Carreira-Perpinan, CVPR 2020.

    Args:
        model: A built and compiled model, trained so far. It stays as it is.
            Data are given as its own `call` takes them.
        dataset: What `fit` takes as first argument, or a tuple `(x, y)` or
            `(x, y, sample_weight)`.
        compressions: `{regex of layers' paths: scheme}`, see `ks.schemes`.
        mu: How hard kernels are pulled in the first round, above 0.
        growth: By how much mu grows in each round, at least 1.
        rounds: How many rounds.
        epochs: Of each L step.
        checkpoint: A file that keeps the state after each round. Where it is
            there already, the run goes on from it.
        **fit_options: For `fit`, such as `batch_size`.

    Returns:
        The new model, and a list with a dictionary for each round: `round`,
        `mu`, `logs` of its last epoch, and by paths `ranks` (of schemes that
        have one), `zeros` (the share of weights) and `distortion`
        (`|K - T| / |K|` before the pull of that round took place). Of
        learned ranks a kernel becomes a `LowRank` where that has fewer
        weights; other kernels hold the compressed weights.

    Raises:
        ValueError: A bad option; a regex that matches nothing, or the layer
            of another one; a model that is not compiled; what
            `compress_model` refuses; a checkpoint of another run.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(16, name="hidden")]
    ... )
    >>> model.compile("sgd", "mse")
    >>> data = keras.ops.ones((4, 16)), keras.ops.ones((4, 16))
    >>> scheme = ks.schemes.FixedRank(2)
    >>> small, history = learn_compression(
    ...     model, data, {"hidden": scheme}, rounds=2
    ... )
    >>> small.get_layer("hidden").down.units, history[-1]["ranks"]
    (2, {'hidden': 2})
    """
    check_number(mu, "mu", 1e-30)
    check_number(growth, "growth", 1)
    check_rank(rounds, "rounds")
    check_rank(epochs, "epochs")
    check_data(dataset)
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    _check_fit_options(fit_options)
    chosen = _scheme_places(model, compressions)
    check_compiled(model)
    order = {id(x): i for i, x in enumerate(ordered_layers(model))}
    copy = copy_model(model)
    copies = ordered_layers(copy)
    run = _Run(
        copy,
        [path for path, _, _ in chosen],
        [copies[order[id(layer)]] for _, layer, _ in chosen],
        [scheme for _, _, scheme in chosen],
    )
    compile_like(run.pulled, model)
    run.pulled.optimizer.build(run.pulled.trainable_variables)
    settings = f"{dict(zip(run.paths, run.schemes))}, mu={mu}, growth={growth}"
    if checkpoint is not None and os.path.exists(checkpoint):
        run.history = load_state(checkpoint, run.pulled, settings)
    else:
        run.start(mu)
    arrays = dataset if isinstance(dataset, tuple) else (dataset,)
    data = dict(zip(_MADE, arrays))
    fit_options = {"verbose": 0, **fit_options, "epochs": epochs}
    with LateProgress("learning a compression", rounds) as progress:
        progress.advance(len(run.history))
        for number in range(len(run.history), rounds):
            run.round(number, mu * growth**number, data, fit_options)
            if checkpoint is not None:
                save_state(checkpoint, run.pulled, run.history, settings)
            progress.advance(1)
    return run.finished(), run.history


class _Run:
    """The model in training, and what its kernels are to become."""

    def __init__(self, model, paths, layers, schemes):
        self.model = model
        self.paths = paths
        self.schemes = schemes
        self.views = [kernel_view(layer) for layer in layers]
        kernels = [view.variable() for view in self.views]
        self.pulled = Pulled(model, kernels)
        self.history = []

    def start(self, mu):
        """Targets are the projections of the kernels as they are."""
        self.pulled.mu.assign(mu)
        for i in range(len(self.views)):
            kernel = self.pulled.kernels[i]
            target = self._projection(i, ops.convert_to_numpy(kernel), mu)
            self.pulled.targets[i].assign(
                in_kernel_shape(self.views[i], target)
            )

    def round(self, number, mu, data, options):
        self.pulled.mu.assign(mu)
        logs = self.pulled.fit(**data, **options).history
        record = {"round": number, "mu": mu}
        record["logs"] = {name: float(x[-1]) for name, x in logs.items()}
        record |= {"ranks": {}, "zeros": {}, "distortion": {}}
        for i, path in enumerate(self.paths):
            view, scheme = self.views[i], self.schemes[i]
            target = self._projection(i, self.pulled.shifted(i), mu)
            kernel = own_numbers(view)
            size = max(np.linalg.norm(kernel), 1e-30)
            gap = np.linalg.norm(kernel - target) / size
            record["distortion"][path] = float(gap)
            record["zeros"][path] = float(np.mean(target == 0))
            rank = scheme.rank(target)
            if rank is not None:
                record["ranks"][path] = rank
            self.pulled.project(i, in_kernel_shape(view, target))
        self.history.append(record)

    def _projection(self, i, kernel, mu):
        """The C step of a kernel, given in its own shape."""
        view = self.views[i]
        blocks = ops.convert_to_numpy(view.blocks(view.to_matrix(kernel)))
        numbers = blocks.reshape(-1, blocks.shape[-1]).astype("float64")
        return self.schemes[i].project(numbers, mu, view)

    def finished(self):
        """The plain model."""
        swaps = {}
        for i, view in enumerate(self.views):
            target = self.pulled.targets[i]
            view.variable().assign(ops.cast(target, view.variable().dtype))
            numbers = own_numbers(view)
            rank = self.schemes[i].rank(numbers)
            if rank and view.pair_weights(rank) < view.num_weights:
                swaps[view.layer] = _pair(view, numbers, rank)
                swaps[view.layer].trainable = view.layer.trainable
            else:
                assign_numbers(view, numbers)
        if swaps:
            config = plain_config(self.model, swaps)
            put_low_rank(self.model, swaps, config)
        return self.model


def _pair(view, matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank])
    a = (u[:, :rank] * root)[None].astype("float32")
    b = (root[:, None] * vt[:rank])[None].astype("float32")
    return low_rank_layer(view, a, b)


def _scheme_places(model, compressions):
    """Path, layer and scheme of every kernel."""
    check_schemes(model, compressions)
    found = {}
    for pattern, scheme in compressions.items():
        for place in chosen_places(model, pattern, None, False):
            if id(place.layer) in found:
                raise ValueError(
                    f"'{place.path}' is matched by several of "
                    f"{list(compressions)}. Expected one scheme for a layer."
                )
            view = kernel_view(place.layer)
            if view.groups > 1 and scheme.has_rank:
                raise ValueError(
                    f"'{place.path}' is a convolution of {view.groups} groups, "
                    f"and {scheme!r} is for one matrix. Expected another "
                    "scheme, or a layer without groups."
                )
            found[id(place.layer)] = place.path, place.layer, scheme
    return list(found.values())


def _check_fit_options(options):
    taken = [name for name in _MADE if name in options]
    if taken:
        raise ValueError(
            f"Received {taken} among the options of `fit`. Expected the data "
            "as `dataset`, and the epochs of a round as `epochs`."
        )
