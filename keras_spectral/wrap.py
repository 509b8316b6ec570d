"""Wraps models: puts adapters around layers, takes them off, folds them in."""

import collections
import contextlib
import os
import weakref
from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_spectral import surgery
from keras_spectral.layers import AdapterLayer
from keras_spectral.options import adapter_class_of
from keras_spectral.options import check_options
from keras_spectral.options import options_per_layer
from keras_spectral.options import warn_if_larger
from keras_spectral.paths import Place
from keras_spectral.paths import describe
from keras_spectral.paths import places
from keras_spectral.select import Target
from keras_spectral.select import kept_places
from keras_spectral.select import select
from keras_spectral.spectra import factorize

# What was trainable before a model was first wrapped, by layer.
_FLAGS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def wrap_model(
    model: keras.Model,
    method: str | type[AdapterLayer],
    target: Target | None = None,
    *,
    exclude: Target | None = None,
    trainable: str | Iterable[str] | None = None,
    overrides: dict[str, dict] | None = None,
    svd_cache: str | os.PathLike | None = None,
    **options,
) -> keras.Model:
    """Puts an adapter around layers of a model, in place.

    Everything else is frozen, so the next `fit` trains the adapters and what
    `trainable` names. Works before and after `compile`, `fit`, `predict` and
    `generate`: compiled functions are dropped, and a built optimizer is
    replaced by a fresh one of the same configuration. Layers that other
    models share are wrapped there as well.

    Args:
        model: Any built Keras or KerasHub model.
        method: A registered name (`"lora"`, `"spectral"`) or adapter class.
        target: What to wrap: a regex that must match a layer's whole path
            (its chain of names, as `list_targets` shows), a list of such,
            a layer or its class, a callable `layer -> bool` that is asked of
            each layer an adapter fits, or one of
            `"attention"` (query and value projections), `"all-linear"`
            (every Dense and EinsumDense but heads), `"conv"`, `"all"`,
            `"blocks"` (transformer blocks), `"backbone"`. Defaults to the
            method's own:
            `"attention"`, for convolutional methods `"conv"`, for those
            that adapt whole blocks `"blocks"`.
        exclude: What not to wrap; the same forms.
        trainable: Regexes of layers that stay trainable beside the adapters.
            Defaults to everything outside of `model.backbone` where there
            is one (the task head), elsewhere to nothing; `[]` for
            nothing at all.
        overrides: `{regex: {option: value}}` for single layers, later ones
            winning. Each must match a chosen layer.
        svd_cache: A folder that keeps the kernels' singular factors for the
            next time, for methods that start from them.
        **options: Go to the adapter's constructor, such as `rank=8`. Of a
            `seed` each layer gets one of its own, made of it and its path.

    Returns:
        The model.

    Raises:
        ValueError: Nothing matches, a layer is wrapped already or unbuilt, an
            option does not fit. The model is then as it was.

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
    _check_model(model)
    candidates = places(model)
    if target is None:
        target = adapter_class.default_target
    chosen = select(model, candidates, target, exclude, adapter_class)
    _check_chosen(model, chosen)
    kept = kept_places(model, candidates, trainable)
    per_layer = options_per_layer(chosen, options, overrides or {})
    check_options(adapter_class, per_layer)
    requests = [
        (place, adapter_class, per_layer[place.path]) for place in chosen
    ]

    def prepare(adapters):
        give_triplets(adapters, svd_cache)

    wrap_places(model, requests, kept, prepare)
    return model


def unwrap_model(model: keras.Model) -> keras.Model:
    """Drops all adapters: the very same base layers are back, unchanged.

    Returns:
        The model, with the `trainable` flags it had before it was wrapped.

    Raises:
        ValueError: The model has no adapters.
    """
    _take_off(model, require_adapters(model))
    return model


def merge_model(model: keras.Model) -> keras.Model:
    """Folds all adapters into their base kernels: plain Keras layers again.

    Outputs stay what they were. All kernels are checked before the first one
    is written.

    Returns:
        The model, with the `trainable` flags it had before it was wrapped.

    Raises:
        ValueError: The model has no adapters, one of them cannot be merged,
            or a merged kernel would hold NaN or infinities. Nothing has
            changed then.
    """
    adapters = require_adapters(model)
    for adapter in adapters:
        adapter.merged_matrix()
    for adapter in adapters:
        adapter.merge()
    _take_off(model, adapters)
    return model


def adapter_places(
    model: keras.Model, *kinds: type[AdapterLayer]
) -> list[Place]:
    """The model's adapters, of all kinds or some, and where they are."""
    kinds = kinds or (AdapterLayer,)
    return [p for p in places(model) if isinstance(p.layer, kinds)]


def require_adapters(
    model: keras.Model, *kinds: type[AdapterLayer]
) -> list[AdapterLayer]:
    """The model's adapters; a ValueError if there are none of these kinds."""
    _check_model(model)
    adapters = [place.layer for place in adapter_places(model, *kinds)]
    if not adapters:
        wanted = " or ".join(repr(kind.method) for kind in kinds)
        raise ValueError(
            f"Model '{model.name}' has no adapters"
            + (f" of method {wanted}" if kinds else "")
            + ". Expected a model that `wrap_model` or `load_adapters` has "
            "wrapped."
        )
    return adapters


def give_triplets(
    adapters: list[AdapterLayer], svd_cache: str | os.PathLike | None = None
) -> None:
    """Factorises all the kernels that some adapters are going to need."""
    requests = []
    for adapter in adapters:
        view = adapter.view_of(adapter.layer)
        requests.append((adapter, view, adapter.triplets_needed(view)))
    needing = [(a, view, count) for a, view, count in requests if count]
    found = factorize([(view, count) for _, view, count in needing], svd_cache)
    for (adapter, _, _), triplets in zip(needing, found):
        adapter.give_triplets(triplets)


def wrap_places(
    model: keras.Model,
    requests: list[tuple[Place, type[AdapterLayer], dict]],
    kept: list[Place],
    prepare: Callable[[list[AdapterLayer]], None] = give_triplets,
    fill: Callable[[list[AdapterLayer]], None] = lambda adapters: None,
) -> None:
    """Wraps chosen places, all or none.

    Args:
        model: The model they are in.
        requests: For each place the adapter class and its options.
        kept: Places that stay trainable.
        prepare: Called with the adapters before they are built.
        fill: Called with the built adapters before they are put in place.
    """
    for adapter_class in {adapter_class for _, adapter_class, _ in requests}:
        adapter_class.check_model(model)
    flags = {id(x): surgery.trainable_flags(x) for x in _tree(model)}
    adapters = {}
    try:
        for place, adapter_class, options in requests:
            with _named(place):
                adapters[place.layer] = adapter_class(place.layer, **options)
        made = list(adapters.values())
        prepare(made)
        together = [*made, *(p.layer for p in adapter_places(model))]
        for kind in {type(adapter) for adapter in made}:
            kind.connect([a for a in together if type(a) is kind])
        paths = collections.Counter()
        for place, _, _ in requests:
            with _named(place):
                twin = paths[place.layer.path]
                surgery.build_in_place(adapters[place.layer], twin)
            paths[place.layer.path] += 1
        fill(made)
        warn_if_larger(requests, made)
        tree = _tree(model)
        models = surgery.replace_layers(model, adapters, renew_optimizers=True)
    except Exception:
        for adapter in adapters.values():
            adapter.release()
        raise
    for layer in tree:
        if not isinstance(layer, AdapterLayer):
            _FLAGS.setdefault(layer, flags[id(layer)])
    freeze_all_but(model, [place.layer for place in kept])
    surgery.forget_compiled(models)


@contextlib.contextmanager
def _named(place):
    """Says where an error happened."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"At '{place.path}': {error}") from error


def _take_off(model, adapters):
    swaps = {adapter: adapter.layer for adapter in adapters}
    models = surgery.replace_layers(model, swaps, renew_optimizers=True)
    for adapter in adapters:
        adapter.release()
    _restore_flags(model)
    surgery.forget_compiled(models)


def _check_model(model):
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            f"Received a {type(model).__name__}. Expected a Keras model."
        )


def _check_chosen(model, chosen):
    wrapped = [p for p in chosen if isinstance(p.layer, AdapterLayer)]
    if wrapped:
        raise ValueError(
            f"Already wrapped in model '{model.name}': {describe(wrapped)}. "
            "Unwrap or merge first, or leave these out with `exclude`."
        )
    unbuilt = [place for place in chosen if not place.layer.built]
    if unbuilt:
        raise ValueError(
            f"Model '{model.name}' is not built: {describe(unbuilt)} have no "
            "weights yet. Call it on a batch or use `build(input_shape)`, "
            "then wrap."
        )


def _tree(model):
    return [model, *(place.layer for place in places(model))]


def _restore_flags(model):
    for layer in _tree(model):
        if layer in _FLAGS:
            surgery.set_trainable(layer, *_FLAGS.pop(layer))


def freeze_all_but(
    model: keras.Model, kept: Iterable[keras.layers.Layer]
) -> None:
    """Freezes all but adapters, `kept` layers and the way down to them."""
    kept = {id(layer) for layer in kept}
    active = {}

    def is_active(layer):
        if id(layer) not in active:
            active[id(layer)] = False
            below = [is_active(child) for child in surgery.sublayers(layer)]
            here = isinstance(layer, AdapterLayer) or id(layer) in kept
            active[id(layer)] = here or any(below)
        return active[id(layer)]

    for layer in _tree(model):
        if not isinstance(layer, AdapterLayer):
            surgery.set_trainable(layer, is_active(layer), id(layer) in kept)
