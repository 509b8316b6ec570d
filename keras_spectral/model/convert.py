"""One kind of adapter into another, on a wrapped model, in place."""

import collections
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.evaluate import check_data
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.kernels.spectra import Triplets
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers import ConditionalSpectralDense
from keras_spectral.layers import DecayingLoRA
from keras_spectral.layers import GatedSpectralDense
from keras_spectral.layers import LoRADense
from keras_spectral.layers import SpectralDense
from keras_spectral.layers.budgeted import Budgeted
from keras_spectral.model import surgery
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import exchange_members
from keras_spectral.model.hosts import keep_all
from keras_spectral.model.hosts import require_adapters
from keras_spectral.model.paths import Place
from keras_spectral.model.training import set_flags


def to_lora(model: keras.Model, rank: int = 8) -> dict[str, float]:
    """Turns every adapter into a LoRADense with the same correction.

    Exact where the correction has a low rank of its own: SpectralDense
    "additive" of rank r becomes LoRA of rank 2r, "rotate" of rank r,
    GatedSpectralDense of its number of directions, PiSSA of rank 2r.
    SpectralDense "values" and ConvLoRA "loralib" are truncated by SVD.

    Args:
        model: A wrapped model.
        rank: What corrections that are not of low rank are truncated to;
            the layer's largest rank where that is smaller.

    Returns:
        For each path the relative error of the correction in the Frobenius
        norm: 0.0 where it was taken over as it is.

    Raises:
        ValueError: No adapters; they are switched off; a
            ConditionalSpectralDense (use `freeze_gates` first), or a
            DecayingLoRA or an adapter that changes biases (merge it). The
            model is then as it was.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden")]
    ... )
    >>> model = ks.wrap_model(model, "spectral", target="hidden", rank=2)
    >>> to_lora(model)
    {'hidden': 0.0}
    >>> model.layers[0].rank
    4
    """
    check_rank(rank)
    for adapter in require_adapters(model):
        adapter.check_active()
    pairs, errors = {}, {}
    for place in adapter_places(model):
        pairs[place.layer], errors[place.path] = lora_pair(place.layer, rank)

    def make(old):
        a, b = pairs[old]
        new = LoRADense(old.layer, rank=a.shape[1])

        def fill():
            new.lora_a.assign(a)
            new.lora_b.assign(b)

        return new, fill

    exchange(model, list(pairs), make)
    return errors


def freeze_gates(model: keras.Model, dataset: Any) -> keras.Model:
    """Turns input-conditional gates into fixed ones, which merge.

    Each ConditionalSpectralDense becomes a GatedSpectralDense on the same
    directions, whose gates are `alpha` times the share of the dataset's
    examples that open them.

    Args:
        model: A model wrapped with "conditional_spectral".
        dataset: What `model.predict` takes: typical inputs.

    Returns:
        The model.

    Raises:
        ValueError: No such adapters, they are switched off, or no data.
    """
    old = require_adapters(model, ConditionalSpectralDense)
    check_data(dataset)
    for adapter in old:
        adapter.check_active()
    for adapter in old:
        adapter.reset_gates()
    model.predict(dataset, verbose=0)
    unseen = [a.name for a in old if not number_in(a.example_count)]
    if unseen:
        raise ValueError(
            f"No example of the dataset reached the layers {unseen[:4]}. "
            "Expected at least one batch of inputs that uses every layer."
        )

    def make(adapter):
        new = GatedSpectralDense(adapter.layer, directions=adapter.rank)
        new.give_triplets(Triplets(adapter.u, adapter.s, adapter.v))

        def fill():
            new.gates.assign(adapter.mean_gates() * adapter.adapter_scale)

        return new, fill

    exchange(model, old, make)
    return model


def compact_ranks(model: keras.Model) -> dict[str, int]:
    """Drops the directions of adapters that are off, for good.

    Each AdaLoRADense or GatedSpectralDense becomes a LoRADense of the rank
    that is left, each adaptive SpectralDense one of the columns that are
    left, with the same outputs; one without any left loses its adapter.

    Args:
        model: A model wrapped with "adalora", "gated_spectral" or "spectral"
            with `adaptive=True`.

    Returns:
        The rank that is left at each path.

    Raises:
        ValueError: The model has no such layer, they are switched off, or
            all triplets of the model are off. It is then as it was.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden")]
    ... )
    >>> model = ks.wrap_model(model, "adalora", target="hidden", rank=4)
    >>> values = model.layers[0].lora_e.assign([0.0, 1.0, 0.0, 2.0])
    >>> compact_ranks(model)
    {'hidden': 2}
    """
    found = budgeted_places(model)
    for place in found:
        place.layer.check_active()
    ranks = {place.path: place.layer.active_rank() for place in found}
    if not any(ranks.values()):
        raise ValueError(
            f"Every triplet of model '{model.name}' is off (E = 0). Expected "
            "a trained model; `unwrap_model` drops the adapters."
        )

    def make(old):
        numbers, _ = old.direction_weights()
        on = ops.convert_to_numpy(numbers).nonzero()[0]
        if isinstance(old, SpectralDense):
            return old.with_directions(on)
        rank = len(on)
        new = LoRADense(
            old.layer, rank=rank, alpha=number_in(old.adapter_scale) * rank
        )

        def fill():
            a, b = map(ops.convert_to_tensor, old.factors())
            new.lora_a.assign(ops.take(a, on, axis=1))
            new.lora_b.assign(ops.take(b, on, axis=0))

        return new, fill

    adapters = [place.layer for place in found]
    exchange(model, [a for a in adapters if a.active_rank()], make)
    drop(model, [a for a in adapters if not a.active_rank()])
    return ranks


def budgeted_places(model: keras.Model) -> list[Place]:
    """Where adapters are whose directions a budget can take away.

    Raises:
        ValueError: There are none.
    """
    check_model(model)
    found = [
        place
        for place in adapter_places(model)
        if isinstance(place.layer, Budgeted) and place.layer.has_budget
    ]
    if not found:
        raise ValueError(
            f"Model '{model.name}' has no adapters whose ranks can be taken "
            "away. Expected a model wrapped with 'adalora', with 'spectral' "
            "and adaptive=True, or with 'gated_spectral'."
        )
    return found


def drop(model: keras.Model, adapters: list[AdapterLayer]) -> None:
    """Takes some adapters off; their bases stay frozen like the others."""
    if not adapters:
        return
    with all_or_nothing() as snapshot:
        keep_all(model, snapshot)
        exchange_members(model, dict.fromkeys(adapters), snapshot)


def lora_pair(adapter: AdapterLayer, rank: int) -> tuple[tuple, float]:
    """A, B with the scale in B, and their relative error; see `to_lora`."""
    view = adapter.view
    adapter.check_mergeable()
    if isinstance(adapter, DecayingLoRA):
        raise ValueError(
            f"Layer '{adapter.name}' is a DecayingLoRA: what it changes is the "
            "fading original itself, which has no low rank. Merge it instead."
        )
    if adapter.bias_change() is not None:
        raise ValueError(
            f"Layer '{adapter.name}' is a {type(adapter).__name__}, which "
            "changes the bias as well. Expected a change of the kernel alone, "
            "as a LoRA makes it. Merge it instead."
        )
    if adapter.is_low_rank:
        a, b = adapter.factors()
        if a.shape[1] <= view.max_rank:
            return (a, b * adapter.adapter_scale), 0.0
        rank = view.max_rank
    wanted = adapter.delta_matrix()
    a, b = view.factor(wanted, min(rank, view.max_rank))
    missing = view.to_matrix(view.from_matrix(wanted - ops.matmul(a, b)))
    size = ops.maximum(ops.norm(wanted), keras.config.epsilon())
    return (a, b), float(ops.convert_to_numpy(ops.norm(missing) / size))


def exchange(
    model: keras.Model,
    adapters: list[AdapterLayer],
    make: Callable[[AdapterLayer], tuple[AdapterLayer, Callable[[], None]]],
) -> None:
    """Puts a new adapter in the place of each old one, all or none.

    Args:
        model: The model they are in.
        adapters: The old adapters.
        make: Gives for an old adapter the new one, unbuilt, and what fills
            it once it is built.
    """
    changes: dict = {}
    paths: collections.Counter = collections.Counter()
    with all_or_nothing() as snapshot:
        keep_all(model, snapshot)
        for old in adapters:
            new, fill = make(old)
            base = old.layer
            new.adapter_name = old.adapter_name
            surgery.build_in_place(new, base, paths[base.path])
            new.take_base_from(old)
            new.is_trained = old.is_trained
            new.set_strength(old.current_strength())
            paths[base.path] += 1
            fill()
            changes[old] = new
        exchange_members(model, changes, snapshot)
        set_flags(model)
