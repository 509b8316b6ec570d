"""Wraps models: puts adapters around layers."""

import os
import warnings
from collections.abc import Iterable

import keras

from keras_spectral._internal.checks import check_adapter_name
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_path
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers import BitFit
from keras_spectral.layers.host import Host
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model import surgery
from keras_spectral.model.holders import hidden_holders
from keras_spectral.model.hosts import HOSTS
from keras_spectral.model.kept import bias_places
from keras_spectral.model.kept import kept_places
from keras_spectral.model.options import adapter_class_of
from keras_spectral.model.options import check_options
from keras_spectral.model.options import options_per_layer
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import places
from keras_spectral.model.placing import Request
from keras_spectral.model.placing import give_triplets
from keras_spectral.model.placing import wrap_places
from keras_spectral.model.select import Target
from keras_spectral.model.select import select


def wrap_model(
    model: keras.Model,
    method: str | type[AdapterLayer],
    target: Target | None = None,
    *,
    adapter: str = "default",
    exclude: Target | None = None,
    trainable: str | Iterable[str] | None = None,
    overrides: dict[str, dict] | None = None,
    svd_cache: str | os.PathLike | None = None,
    also: Iterable[keras.Model] = (),
    **options,
) -> keras.Model:
    """Puts an adapter around layers of a model, in place.

    Everything else is frozen, so the next `fit` trains the adapters and what
    `trainable` names. Works before and after `compile`, `fit`, `predict` and
    `generate`: compiled functions are dropped, and a built optimizer is
    replaced by a fresh one of the same configuration. What trains beside the
    adapters is a copy (float32 where the layer has 16 bits): `unwrap_model`
    brings the layer back as it was, `merge_model` makes the copy its own.

    A model can have several adapters, by name, each on any layers and of any
    methods. One with a new name becomes the only active one, and trains;
    `set_adapters` switches and mixes them.

    Layers that other models share are wrapped there as well if these models
    were wrapped before, are named in `also`, or use this one as a layer of
    their graph.

    Args:
        model: Any built Keras or KerasHub model.
        method: A registered name (`"lora"`, `"spectral"`) or adapter class.
        target: What to wrap: a regex that must match a layer's whole path
            (its chain of names, as `list_targets` shows), a list of such,
            a layer or its class, a callable `layer -> bool` that is asked of
            each layer an adapter fits, or one of
            `"attention"` (query and value projections), `"key-value-ffn"`
            (key and value projections and the second layers of feed-forward
            nets, by the names that KerasHub gives them), `"all-linear"`
            (every Dense and EinsumDense but heads), `"conv"`, `"all"`,
            `"biases"` (all with a bias, and norms), `"blocks"` (transformer
            blocks), `"backbone"`. Defaults to the method's own, such as
            `"attention"`, for convolutional methods `"conv"`, for those
            that adapt whole blocks `"blocks"`.
        adapter: The adapter's name. An adapter of that name gets more layers.
        exclude: What not to wrap; the same forms.
        trainable: Regexes of layers that stay trainable beside the adapters.
            Defaults to everything outside of `model.backbone` where there
            is one (the task head), elsewhere to nothing; `[]` for
            nothing at all. Each adapter has copies of its own. `"norms"`
            stands for all norms, `"biases"` for all biases.
        overrides: `{regex: {option: value}}` for single layers, later ones
            winning. Each must match a chosen layer.
        svd_cache: A folder that keeps the kernels' singular factors for the
            next time, for methods that start from them.
        also: Other models that share layers with this one.
        **options: Go to the adapter's constructor, such as `rank=8`. Of a
            `seed` each layer gets one of its own, made of it and its path.

    Returns:
        The model.

    Raises:
        ValueError: Nothing matches, a layer is unbuilt or has an adapter of
            that name, an option does not fit. The model is then as it was.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden"),
    ...      keras.layers.Dense(2, name="head")]
    ... )
    >>> model = wrap_model(model, "lora", target="hidden", rank=4)
    >>> [tuple(w.shape) for w in model.trainable_weights]
    [(16, 4), (4, 8)]
    """
    adapter_class = adapter_class_of(method)
    check_model(model)
    check_adapter_name(adapter)
    if svd_cache is not None:
        check_path(svd_cache, "svd_cache")
    candidates = places(model)
    if target is None:
        target = adapter_class.default_target
    chosen = select(model, candidates, target, exclude, adapter_class)
    check_chosen(model, chosen, adapter)
    kept = kept_places(model, candidates, trainable)
    per_layer = options_per_layer(chosen, options, overrides or {})
    check_options(adapter_class, per_layer)
    requests = [
        Request(place, adapter_class, per_layer[place.path], adapter)
        for place in chosen
    ]
    for place in bias_places(candidates, trainable, kept):
        requests.append(Request(place, BitFit, {}, adapter))

    for other in also:
        check_model(other)
        surgery.remember(other)

    _warn_of_holders(model, chosen)

    def prepare(adapters):
        give_triplets(adapters, svd_cache)

    wrap_places(model, requests, [(p, adapter) for p in kept], prepare)
    return model


def _warn_of_holders(model, chosen):
    """Warns of functions and objects that call a layer past its adapter."""
    held = hidden_holders(model, [place.layer for place in chosen])
    if held:
        name, kinds = next(iter(held.items()))
        warnings.warn(
            f"Layer '{name}' of model '{model.name}' is also held by a "
            f"{' and a '.join(kinds)}, which an adapter does not reach: it "
            "still uses the base, and after `merge_model` the merged "
            "kernel, so that outputs change there."
            + (f" So are {len(held) - 1} more." if len(held) > 1 else ""),
            stacklevel=3,
        )


def check_chosen(model: keras.Model, chosen: list[Place], name: str) -> None:
    """Raises a ValueError unless places can take an adapter of a name."""
    wrapped = [
        place
        for place in chosen
        if isinstance(place.layer, Host)
        and any(m.adapter_name == name for m in place.layer.members())
    ]
    if wrapped:
        raise ValueError(
            f"Already wrapped in model '{model.name}' by adapter '{name}': "
            f"{describe(wrapped)}. Give the new one a name of its own "
            "(`adapter=`), unwrap or merge first, or leave these out with "
            "`exclude`."
        )
    copies = [place for place in chosen if isinstance(place.layer, TrainedCopy)]
    if copies:
        raise ValueError(
            f"Layers of model '{model.name}' train as copies with another "
            f"adapter: {describe(copies)}. Expected layers that do not: leave "
            "these out with `exclude`."
        )
    for place in chosen:
        host, owner = HOSTS.get(place.layer, (lambda: None, None))
        if host() is not None:
            raise ValueError(
                f"'{place.path}' of model '{model.name}' was wrapped as a "
                f"layer of model '{owner}', which shares it. Expected that "
                "`wrap_model` gets both: unwrap that one, then "
                f"`wrap_model(..., also=[...])`."
            )
    unbuilt = [place for place in chosen if not place.layer.built]
    if unbuilt:
        raise ValueError(
            f"Model '{model.name}' is not built: {describe(unbuilt)} have no "
            "weights yet. Call it on a batch or use `build(input_shape)`, "
            "then wrap."
        )
