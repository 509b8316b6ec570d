"""The end of weight transfer: adapters become the layers themselves."""

import keras
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral.compression.pairs import low_rank_layer
from keras_spectral.compression.saved import plain_config
from keras_spectral.compression.saved import put_low_rank
from keras_spectral.kernels import LowRank
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers import DecayingLoRA
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model.contexts import unwrapped
from keras_spectral.model.hosts import hosts
from keras_spectral.model.hosts import require_adapters
from keras_spectral.model.merge import unwrap_model


def finalize_transfer(model: keras.Model) -> keras.Model:
    """Turns finished low-rank pairs into factorised layers, in place.

    Each DecayingLoRA is replaced by a `LowRank` layer of its pair alone; the
    original kernel is gone, and with a `min_decay` above zero the share that
    had remained of it. An adapter on a `LowRank` layer, as `recover="lora"`
    makes them, is joined with it, exactly: ranks add up.

    Returns:
        The model, plain but for `LowRank` layers, with the `trainable` flags
        that it had before it was wrapped.

    Raises:
        ValueError: A decay has not ended; another adapter than these; an
            adapter is switched off. The model is then as it was.

    Example:

    >>> import keras_spectral as ks
    >>> layer = ks.DecayingLoRA(
    ...     keras.layers.Dense(8, name="hidden"), rank=2, end_step=1
    ... )
    >>> model = keras.Sequential([keras.Input((16,)), layer])
    >>> model.compile("sgd", "mse")
    >>> data = keras.ops.ones((4, 16)), keras.ops.ones((4, 8))
    >>> history = model.fit(*data, verbose=0)
    >>> finalize_transfer(model).count_params()
    56
    """
    adapters = require_adapters(model)
    for adapter in adapters:
        _check_finished(adapter)
    for host in hosts(model):
        if len([m for m in host.members() if isinstance(m, AdapterLayer)]) > 1:
            raise ValueError(
                f"Layer '{host.name}' has several adapters. Expected one for "
                "each layer: `delete_adapter` drops the others."
            )
    for copy in hosts(model):
        if isinstance(copy, TrainedCopy):
            copy.merge()
    with unwrapped(model):
        config = plain_config(model, [adapter.layer for adapter in adapters])
        swaps = {a.layer: _finished(a) for a in adapters}
    unwrap_model(model)
    for base, layer in swaps.items():
        layer.trainable = base.trainable
    put_low_rank(model, swaps, config)
    return model


def _check_finished(adapter):
    adapter.check_active()
    if isinstance(adapter.layer, LowRank):
        if not hasattr(adapter, "factors"):
            adapter.check_mergeable()
            raise ValueError(
                f"Layer '{adapter.name}' has a {type(adapter).__name__}, whose "
                "change is not a thin product. Expected one that is, such as "
                "'lora'."
            )
    elif not isinstance(adapter, DecayingLoRA):
        raise ValueError(
            f"Layer '{adapter.name}' has a {type(adapter).__name__} on a "
            f"{type(adapter.layer).__name__}. Expected a DecayingLoRA, or an "
            "adapter on a LowRank layer; others merge with `merge_model`."
        )
    elif adapter.decay_factor() > adapter.min_decay:
        raise ValueError(
            f"The original of layer '{adapter.name}' has not faded yet: its "
            f"factor is {adapter.decay_factor():.3g} at step "
            f"{number_in(adapter.step)} of {adapter.end_step}. Train on, or "
            "choose a smaller `end_step`."
        )


def _finished(adapter):
    """The factorised layer that does what an adapter and its base do."""
    view = adapter.view
    if isinstance(adapter, DecayingLoRA):
        a, b = _in_parts(view, adapter.lora_a, adapter.lora_b, view.groups)
        layer = low_rank_layer(view, a, b * adapter.amount)
        bias = getattr(adapter.layer, "bias", None)
        if adapter.decay_bias and bias is not None:
            layer.up.bias.assign(bias * adapter.min_decay)
        return layer
    a, b = view.pair()
    more_a, more_b = _in_parts(view, *adapter.factors(), a.shape[0])
    a = ops.concatenate([a, more_a], axis=-1)
    b = ops.concatenate([b, more_b * adapter.amount], axis=-2)
    return low_rank_layer(view, a, b)


def _in_parts(view, a, b, parts):
    """A (n_in x r), B (r x n_out) as (parts, rows, r), (parts, r, columns)."""
    rank = a.shape[1]
    a = ops.reshape(a, (parts, -1, rank))
    if view.groups > 1:
        b = ops.reshape(b, (rank, parts, -1))
        return a, ops.swapaxes(b, 0, 1)
    return a, ops.broadcast_to(b, (parts, rank, view.n_out))
