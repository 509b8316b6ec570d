"""Adapters as LoRA's pairs, and the pairs of a fused module as one."""

import math
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral._backend import to_numpy
from keras_spectral._internal.linalg import nearest_pair
from keras_spectral.exchange.names import Part
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers import ConvLoRA
from keras_spectral.layers import DoRADense
from keras_spectral.layers import LoRADense
from keras_spectral.model.convert import lora_pair
from keras_spectral.saving.naming import is_close


class Pair(NamedTuple):
    """A change `scale * A B` of a kernel, as PEFT has it.

    Attributes:
        a: (n_in x rank).
        b: (rank x n_out).
        alpha: The strength; the scale is alpha over the rank.
        rooted: Whether it is alpha over the rank's square root.
        magnitude: The columns' norms (n_out) of a DoRA, or None.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float
    rooted: bool = False
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rooted else self.rank)

    def with_scale(self, scale: float, rooted: bool) -> "Pair":
        """The same change with another scale, the rest going into B."""
        b = self.b if scale == self.scale else self.b * (self.scale / scale)
        root = math.sqrt(self.rank) if rooted else self.rank
        return self._replace(b=b, alpha=scale * root, rooted=rooted)


def pair_of(
    adapter: AdapterLayer, rank: int | None = None
) -> tuple[Pair, float]:
    """An adapter's change as a pair, and its relative error.

    Args:
        adapter: Any that `to_lora` takes, or a DoRADense.
        rank: What larger ones are truncated to; None allows no truncation.
    """
    plain = isinstance(adapter, LoRADense | ConvLoRA) and adapter.is_low_rank
    as_made = is_close(
        number_in(adapter.adapter_scale), adapter.initial_scale()
    )
    if isinstance(adapter, DoRADense):
        return _dora_pair(adapter, rank), 0.0
    if plain and adapter.pair.start_a is None and as_made:
        pair = Pair(
            to_numpy(adapter.lora_a),
            to_numpy(adapter.lora_b),
            adapter.alpha,
            adapter.scaling == "rslora",
        )
        if rank is None or pair.rank <= rank:
            return pair, 0.0
    if rank is None and not adapter.is_low_rank:
        raise ValueError(
            f"Layer '{adapter.name}' is a {type(adapter).__name__} whose "
            "change has no low rank. Expected rank=, what it is truncated "
            "to, or `merge_model`."
        )
    most = adapter.view.max_rank
    (a, b), error = lora_pair(adapter, min(rank or most, most))
    a, b = _without_zeros(to_numpy(a), to_numpy(b))
    if rank is not None and a.shape[1] > rank:
        a, b, error = _truncated(adapter, rank)
    return Pair(a, b, a.shape[1]), error


def join_pairs(parts: list[Part], pairs: dict[str, Pair]) -> Pair:
    """One pair for a module that is made of several kernels.

    Where all have one A it stays, and their B stand side by side. Else the A
    are stacked and B is block diagonal, so that the rank is their sum.

    Args:
        parts: The kernels.
        pairs: Those of their layers that have one, by the places' keys.
    """
    on = [(part, pairs[p]) for part in parts if (p := part.place.key) in pairs]
    if len(parts) == 1:
        return on[0][1]
    first = on[0][1]
    if any(pair.rooted != first.rooted for _, pair in on):
        on = [(part, pair.with_scale(pair.scale, False)) for part, pair in on]
        first = on[0][1]
    if any(not is_close(pair.scale, first.scale) for _, pair in on):
        on = [(p, pair.with_scale(first.scale, first.rooted)) for p, pair in on]
    total = parts[0].slot.total
    shared = len(on) == len(parts) and all(
        np.array_equal(pair.a, first.a) for _, pair in on
    )
    ranks = [first.rank] if shared else [pair.rank for _, pair in on]
    b = np.zeros((sum(ranks), total), "float32")
    start = 0
    for part, pair in on:
        b[start : start + pair.rank, part.columns] = pair.b
        start += 0 if shared else pair.rank
    a = first.a if shared else np.concatenate([p.a for _, p in on], axis=1)
    share = sum(ranks) / first.rank
    alpha = first.alpha * (math.sqrt(share) if first.rooted else share)
    magnitude = None
    if first.magnitude is not None:
        magnitude = np.zeros(total, "float32")
        for part in parts:
            pair = pairs.get(part.place.key)
            norms = np.linalg.norm(to_numpy(part.view.matrix()), axis=0)
            own = norms if pair is None else pair.magnitude
            magnitude[part.columns] = own
    return Pair(a, b, alpha, first.rooted, magnitude)


def _dora_pair(adapter, rank):
    a, b = map(to_numpy, adapter.pair.factors())
    if rank is not None and a.shape[1] > rank:
        raise ValueError(
            f"Layer '{adapter.name}' is a DoRADense of rank {a.shape[1]}. "
            f"Expected rank={a.shape[1]} or more: it cannot be truncated, as "
            "the columns' norms belong to the whole."
        )
    rooted = adapter.scaling == "rslora"
    pair = Pair(a, b, 1.0, rooted, to_numpy(adapter.magnitude))
    if adapter.pair.start_a is None:
        return pair._replace(alpha=adapter.alpha)
    # With the start beside it the rank has doubled, the scale has not.
    root = math.sqrt(pair.rank) if rooted else pair.rank
    return pair._replace(alpha=adapter.initial_scale() * root)


def _without_zeros(a, b):
    """The pair without ranks that do nothing, of which one is left."""
    on = np.abs(a).max(axis=0) * np.abs(b).max(axis=1) > 0
    on[0] |= not on.any()
    return a[:, on], b[on]


def _truncated(adapter, rank):
    wanted = to_numpy(adapter.delta_matrix())
    a, b = map(to_numpy, nearest_pair(ops.convert_to_tensor(wanted), rank))
    size = max(float(np.linalg.norm(wanted)), 1e-30)
    return a, b, float(np.linalg.norm(wanted - a @ b)) / size
