"""combine_adapters: one adapter made of several on one model."""

from collections.abc import Mapping

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers import BitFit
from keras_spectral.layers import KernelAdapter
from keras_spectral.layers import LoRADense
from keras_spectral.layers.host import Host
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.layers.trained_copy import fresh
from keras_spectral.library.merge_options import PAIR_METHODS
from keras_spectral.library.merge_options import check_options
from keras_spectral.library.merging import combine_deltas
from keras_spectral.library.merging import combine_pairs
from keras_spectral.model.hosts import check_new_name
from keras_spectral.model.hosts import require_names
from keras_spectral.model.paths import places
from keras_spectral.model.placing import Request
from keras_spectral.model.placing import wrap_places


def combine_adapters(
    model: keras.Model,
    weights: Mapping[str, float],
    name: str,
    method: str = "svd",
    *,
    density: float | None = None,
    sign: str = "total",
    rank: int | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    """Makes a new adapter, of LoRA pairs, out of several of a model.

    With the changes d_i = K'_i - K of a layer's kernel and the weights w_i:

    - `"svd"`: the truncated SVD of `sum w_i d_i`; any methods that merge.
    - `"ties_svd"`: of each d_i the share `density` of largest entries stays,
      of these only those whose sign is that of their sum (`sign="total"`) or
      of most (`"frequency"`); `sum w_i d_i` over the number that are left.
    - `"dare_linear_svd"`, `"dare_ties_svd"`: entries stay by chance, with
      probability `density`, and are divided by it.
    - `"magnitude_prune_svd"`: the largest entries stay.
    - `"cat"`: the pairs side by side: exact, ranks add up.
    - `"linear"`, `"ties"`, `"dare_linear"`, `"dare_ties"`,
      `"magnitude_prune"`: the same on the factors A and B apart, as HF PEFT
      does it; cross terms make them approximations even with density 1.

    The names are those of HF PEFT's `add_weighted_adapter`. Layers that train
    beside the adapters, and biases, become `w + sum w_i (w_i' - w)`. The new
    adapter is the only active one; `set_adapters` mixes without making one.

    Source: TIES: Yadav et al. 2023, arXiv 2306.01708; DARE: Yu et al. 2023,
    arXiv 2311.03099.

    Args:
        model: A model with these adapters.
        weights: `{name: weight}`; negative weights take away.
        name: The name of the new adapter.
        method: One of the above.
        density: Share of entries that stay, above 0 and at most 1, for
            methods that prune.
        sign: `"total"` or `"frequency"`, for TIES.
        rank: Rank of the new pairs, for `"svd"` and those that end so, as far
            as the layer allows. Defaults to the sum of the ranks.
        seed: Integer seed of DARE's draws.

    Returns:
        For each path the relative error of the rank's cut in the Frobenius
        norm; 0.0 where nothing is cut.

    Raises:
        ValueError: An unknown name or method, a name that is there, unlike
            ranks on factors, a bad density, an adapter that cannot be merged.
            The model is then as it was.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> for name in ("a", "b"):
    ...     model = ks.wrap_model(
    ...         model, "lora", "dense.*", adapter=name, rank=1
    ...     )
    >>> combine_adapters(model, {"a": 0.7, "b": -0.3}, "c", "cat")
    {'dense': 0.0}
    >>> ks.adapter_names(model)
    ['a', 'b', 'c']
    """
    check_model(model)
    weights = _checked(model, weights, name)
    check_options(method, density, sign)
    check_seed(seed)
    if rank is not None:
        check_rank(rank)
        if method in PAIR_METHODS:
            raise ValueError(
                f"Received rank={rank} with method={method!r}, which keeps the "
                "factors' own. Expected None, or a method that ends in 'svd'."
            )
    requests, kept, pairs, errors = [], [], {}, {}
    for place in places(model):
        if not isinstance(place.layer, Host):
            continue
        chosen = [m for m in place.layer.members() if m.adapter_name in weights]
        if not chosen:
            continue
        if isinstance(place.layer, TrainedCopy):
            kept.append((place, name))
            continue
        for member in chosen:
            _check_kind(member)
        own = [weights[member.adapter_name] for member in chosen]
        draws = None if seed is None else derived_seed(seed, place.key)
        options = (method, density, sign, draws)
        made = _pair(place.layer.view, chosen, own, options, rank)
        if made is not None:
            a, b, errors[place.path] = made
            pairs[place.key] = a, b
            size = {"rank": a.shape[1]}
            requests.append(Request(place, LoRADense, size, name))
        if any(member.bias_change() is not None for member in chosen):
            requests.append(Request(place, BitFit, {}, name))

    def fill(made):
        hosts = {place.key: place.layer for place in places(model)}
        for place in made:
            host, new = hosts[place.key], place.layer
            if isinstance(new, LoRADense):
                a, b = pairs[place.key]
                new.lora_a.assign(a)
                new.lora_b.assign(b)
            elif isinstance(new, BitFit):
                new.bias_delta.assign(_bias(host, weights))
            else:
                _mix(host, new, weights)

    wrap_places(model, requests, kept, fill=fill)
    return errors


def _checked(model, weights, name):
    """The weights as floats, if they and the name can be used."""
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            f"Received weights={weights!r}. Expected {{name: weight}}, such as "
            "{'mrpc': 0.7, 'cola': 0.3}."
        )
    require_names(model, list(weights))
    check_new_name(model, name)
    for key, weight in weights.items():
        check_number(weight, f"weight of {key!r}")
    return {key: float(weight) for key, weight in weights.items()}


def _check_kind(member):
    if not isinstance(member, KernelAdapter):
        raise ValueError(
            f"Adapter '{member.adapter_name}' has a {type(member).__name__} at "
            f"'{member.name}', which does not change a kernel. "
            "Expected "
            "adapters of kernels; `set_adapters` mixes all kinds."
        )
    member.check_mergeable()


def _pair(view, members, weights, options, rank):
    """A, B and the error of the cut; None without a change of the kernel."""
    method, density, sign, seed = options
    changing = [(m, w) for m, w in zip(members, weights) if not m.only_bias]
    if not changing:
        return None
    members, weights = zip(*changing)
    if method in PAIR_METHODS:
        pairs = [_thin(member, method) for member in members]
        a, b = combine_pairs(pairs, list(weights), method, density, sign, seed)
        if a.shape[1] <= view.max_rank:
            return a, b, 0.0
        delta, rank = a @ b, view.max_rank
    else:
        deltas = [ops.convert_to_numpy(m.delta_matrix()) for m in members]
        delta = combine_deltas(
            deltas, list(weights), method, density, sign, seed
        )
        rank = rank or sum(_rank(m, view) for m in members)
    a, b = view.factor(ops.convert_to_tensor(delta), min(rank, view.max_rank))
    a, b = map(ops.convert_to_numpy, (a, b))
    product = ops.convert_to_numpy(view.to_matrix(view.from_matrix(a @ b)))
    size = max(np.linalg.norm(delta), keras.config.epsilon())
    return a, b, float(np.linalg.norm(delta - product) / size)


def _thin(member, method):
    if not member.is_low_rank:
        raise ValueError(
            f"Adapter '{member.adapter_name}' has a {type(member).__name__} at "
            f"'{member.name}', which is not a thin pair, as "
            f"method={method!r} needs. Expected a method that ends in 'svd'."
        )
    a, b = map(ops.convert_to_numpy, member.factors())
    return a, b, number_in(member.adapter_scale)


def _rank(member, view):
    if not member.is_low_rank:
        return view.max_rank
    return member.factors()[0].shape[1]


def _bias(host, weights):
    changes = [
        weights[m.adapter_name] * m.bias_change()
        for m in host.members()
        if m.adapter_name in weights and m.bias_change() is not None
    ]
    return sum(changes)


def _mix(host, new, weights):
    """Gives a new copy the weighted changes of others."""
    chosen = [m for m in host.members() if m.adapter_name in weights]
    for i, (base, copy) in enumerate(new.pairs):
        start = ops.cast(base, copy.dtype)
        total = fresh(base, copy.dtype)
        for member in chosen:
            change = member.pairs[i][1] - start
            total = total + weights[member.adapter_name] * change
        copy.assign(total)
    for i, (_, copy) in enumerate(new.running):
        copy.assign(fresh(chosen[0].running[i][1], copy.dtype))
