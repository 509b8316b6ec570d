"""The best path of a GLoRA supernet, by evolution; and its fixed form."""

import functools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.evaluate import check_data
from keras_spectral._internal.evaluate import metric_of
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.layers import GLoRADense
from keras_spectral.layers.glora_path import KINDS
from keras_spectral.layers.glora_path import checked_path
from keras_spectral.layers.glora_path import shapes_of
from keras_spectral.model.convert import drop
from keras_spectral.model.convert import exchange
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import require_adapters

Paths = dict[str, dict[str, str]]

_TRIES = 10  # draws for each path that is to be new


def search_glora(
    model: keras.Model,
    dataset: Any,
    max_params: int,
    rounds: int = 20,
    population: int = 50,
    top: int = 10,
    mutations: int = 25,
    crossovers: int = 25,
    mutation: float = 0.2,
    seed: int | None = None,
    metric: str = "loss",
    mode: str = "min",
) -> Paths:
    """Finds a path for each layer of a trained GLoRA supernet.

    Nothing is trained: paths share the supernet's weights, so each trial only
    evaluates. The first round tries random paths. Each further one tries
    children of the best so far: mutations, in which each part's kind is drawn
    again with some probability, crossovers of two, in which each is that of
    either parent, and random paths as far as these are fewer than the
    population. A path that is too large loses parts at random until it
    fits, and none is tried twice.

    Args:
        model: A model wrapped with "glora" and `supernet=True`, trained and
            compiled.
        dataset: Validation data, not the training's: what `model.evaluate`
            takes as first argument, or a tuple `(x, y)` or
            `(x, y, sample_weight)`.
        max_params: How many numbers all layers' paths may train in sum. Only
            what a path uses counts.
        rounds: Rounds.
        population: How many paths each tries, if there are so many.
        top: How many of the best have children.
        mutations: Mutations in each round.
        crossovers: Crossovers in each round.
        mutation: The probability that a mutation changes a part, 0 to 1.
        seed: Integer seed of the search.
        metric: The name of a result of `model.evaluate`.
        mode: `"min"` if a smaller metric is better, `"max"` if a larger.

    Returns:
        The best path found, by the layers' paths; `finalize_glora` takes it.
        The model uses it from now on wherever it does not train.

    Raises:
        ValueError: The model has no active supernet, two on one layer, or is
            not compiled; no data, no such metric or one that is always NaN,
            or a bad option. The paths are then as they were.
    """
    for name, value in (
        ("rounds", rounds),
        ("population", population),
        ("top", top),
    ):
        check_rank(value, name)
    check_whole(max_params, "max_params")
    check_whole(mutations, "mutations")
    check_whole(crossovers, "crossovers")
    if check_number(mutation, "mutation", 0) > 1:
        raise ValueError(
            f"Received mutation={mutation!r}. Expected a probability, 0 to 1."
        )
    check_choice(mode, "mode", ("min", "max"))
    check_data(dataset)
    adapters = _supernets(model)
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"Model '{model.name}' is not compiled. Expected "
            "`model.compile(optimizer, loss, metrics)` first."
        )
    space = _Space(list(adapters.values()), max_params, check_seed(seed))
    before = {a: a.path_in_use() for a in adapters.values()}
    children = mutations + crossovers
    total = population + (rounds - 1) * max(population, children)
    sign = 1 if mode == "min" else -1
    scored: dict[tuple, float] = {}
    try:
        with LateProgress("searching paths", total) as progress:
            for _ in range(rounds):
                best = sorted(scored, key=scored.__getitem__)[:top]
                makers = [(space.random, population)]
                if best:
                    mutated = functools.partial(space.mutated, best, mutation)
                    crossed = functools.partial(space.crossed, best)
                    makers = [
                        (mutated, mutations),
                        (crossed, children),
                        *makers,
                    ]
                for path in space.new(makers, scored):
                    space.use(path)
                    value = sign * metric_of(model, dataset, metric)
                    scored[path] = math.inf if math.isnan(value) else value
                    progress.advance(1)
        found = min(scored, key=scored.__getitem__)
        if scored[found] == math.inf:
            raise ValueError(
                f"metric={metric!r} was NaN on each of {len(scored)} paths. "
                "Expected a number: the training probably diverged."
            )
    except BaseException:
        for adapter, parts in before.items():
            adapter.use_path(parts)
        raise
    space.use(found)
    return {path: a.path_in_use() for path, a in adapters.items()}


def finalize_glora(
    model: keras.Model, paths: Paths | None = None
) -> keras.Model:
    """Turns a GLoRA supernet into layers with a fixed path each.

    Each takes over what its path uses of the supernet's weights, so outputs
    are those of the supernet on that path. It can be trained on and merged. A
    layer whose path uses nothing loses its adapter.

    Args:
        model: A model with active supernets.
        paths: For each layer's path the kinds of its parts, as `search_glora`
            gives them. Layers that are left out, and by default all, keep the
            path that they use.

    Returns:
        The model.

    Raises:
        ValueError: There is no active supernet, one of the paths is none of
            its layers' or no path, or no layer would keep an adapter. Nothing
            has changed then.
    """
    adapters = _supernets(model)
    paths = {} if paths is None else paths
    if not isinstance(paths, dict) or not paths.keys() <= adapters.keys():
        raise ValueError(
            f"Received paths={paths!r}. Expected a dictionary with some of "
            f"{list(adapters)}, as `search_glora` gives it."
        )
    parts = {
        adapter: checked_path(paths.get(path, adapter.path_in_use()))
        for path, adapter in adapters.items()
    }
    used = [a for a in parts if _path_size(a, parts[a])]
    if not used:
        raise ValueError(
            f"No layer of model '{model.name}' would keep a part. Expected "
            "one at least; `unwrap_model` drops the adapters."
        )

    def make(old):
        new = GLoRADense(old.layer, old.rank, parts[old], seed=old.seed)

        def fill():
            for weight in new.trainable_weights:
                rows, columns = weight.shape
                whole = ops.convert_to_tensor(getattr(old, weight.name))
                weight.assign(whole[:rows, :columns])

        return new, fill

    exchange(model, used, make)
    drop(model, [a for a in parts if a not in used])
    return model


class _Space:
    """The paths of several layers together, as tuples of kinds."""

    def __init__(self, adapters, limit, seed):
        self.adapters, self.limit = adapters, limit
        self.rng = np.random.default_rng(seed)
        # For each part of each layer the size of each kind.
        self.sizes = [
            {kind: _path_size(adapter, {part: kind}) for kind in kinds}
            for adapter in adapters
            for part, kinds in KINDS.items()
        ]

    def new(self, makers, known) -> list[tuple]:
        """Paths that are not known, as far as there are any.

        Args:
            makers: Pairs of what makes a path and up to how many in sum.
            known: The paths that were tried.
        """
        paths: dict[tuple, None] = {}
        for make, wanted in makers:
            for _ in range(_TRIES * wanted):
                if len(paths) >= wanted:
                    break
                path = self.fitting(make())
                if path not in known:
                    paths[path] = None
        return list(paths)

    def random(self) -> tuple:
        return tuple(self._one_of(list(kinds)) for kinds in self.sizes)

    def mutated(self, best: list[tuple], share: float) -> tuple:
        return self._either(self._one_of(best), self.random(), 1 - share)

    def crossed(self, best: list[tuple]) -> tuple:
        return self._either(self._one_of(best), self._one_of(best), 0.5)

    def _one_of(self, some):
        return some[self.rng.integers(len(some))]

    def _either(self, one, other, share):
        first = self.rng.random(len(one)) < share
        return tuple(x if own else y for x, y, own in zip(one, other, first))

    def fitting(self, path: tuple) -> tuple:
        """A path without as many parts as are too much for the limit.

        What has no weights, the factor D without a bias, counts as none.
        """
        sizes = [own[kind] for own, kind in zip(self.sizes, path)]
        kept = np.flatnonzero(sizes)
        for i in self.rng.permutation(kept):
            if sum(sizes) <= self.limit:
                break
            sizes[i] = 0
        return tuple(k if size else "none" for k, size in zip(path, sizes))

    def use(self, path: tuple) -> None:
        """Sets the layers' variables: nothing is traced again."""
        count = len(KINDS)
        for i, adapter in enumerate(self.adapters):
            kinds = path[i * count : (i + 1) * count]
            adapter.use_path(dict(zip(KINDS, kinds)))


def _supernets(model) -> dict[str, GLoRADense]:
    """The active supernets by their layers' paths."""
    require_adapters(model, GLoRADense)
    found = [
        place
        for place in adapter_places(model, GLoRADense)
        if place.layer.supernet and place.layer.current_strength()
    ]
    paths = [place.path for place in found]
    if not found or len(set(paths)) < len(paths):
        raise ValueError(
            f"Model '{model.name}' has {len(found)} active supernets on "
            f"{len(set(paths))} layers. Expected one at least, and one on a "
            "layer: `wrap_model(model, 'glora', supernet=True)`, and "
            "`set_adapters` where there are several."
        )
    return {place.path: place.layer for place in found}


def _path_size(adapter, parts) -> int:
    """How many numbers of a path an adapter trains."""
    shapes = shapes_of(parts, adapter.rank, adapter.view)
    return sum(math.prod(shape) for shape in shapes.values())
