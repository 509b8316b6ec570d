"""Wraps models: puts adapters around layers, takes them off, folds them in."""

import contextlib
import inspect
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator

import keras

from keras_spectral import surgery
from keras_spectral.layers import METHODS
from keras_spectral.layers import AdapterLayer
from keras_spectral.select import Place
from keras_spectral.select import Target
from keras_spectral.select import describe
from keras_spectral.select import match_paths
from keras_spectral.select import outside_backbone
from keras_spectral.select import places
from keras_spectral.select import select

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
        method: A registered name (`"lora"`, `"conv_lora"`) or adapter class.
        target: What to wrap: a regex that must match a layer's whole path
            (its chain of names, as `adapter_summary` shows), a list of such,
            a layer class, a callable `layer -> bool` that is asked of each
            layer an adapter fits, or one of
            `"attention"` (query and value projections), `"all-linear"`
            (every Dense and EinsumDense but heads), `"conv"`, `"all"`.
            Defaults to the method's own: `"attention"`, for convolutional
            methods `"conv"`.
        exclude: What not to wrap; the same forms.
        trainable: Regexes of layers that stay trainable beside the adapters.
            Defaults to everything outside of `model.backbone` where there
            is one (the task head), elsewhere to nothing; `[]` for
            nothing at all.
        overrides: `{regex: {option: value}}` for single layers, later ones
            winning. Each must match a chosen layer.
        **options: Go to the adapter's constructor, such as `rank=8`.

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
    adapter_class = _adapter_class(method)
    _check_model(model)
    candidates = places(model)
    if target is None:
        target = adapter_class.default_target
    chosen = select(model, candidates, target, exclude)
    _check_chosen(model, chosen)
    kept = _kept_places(model, candidates, trainable)
    per_layer = _options_per_layer(chosen, options, overrides or {})
    requests = [
        (place, adapter_class, per_layer[place.path]) for place in chosen
    ]
    wrap_places(model, requests, kept)
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


@contextlib.contextmanager
def unwrapped(model: keras.Model) -> Iterator[keras.Model]:
    """The plain base model for as long as the block lasts.

    Inside, the very base layers are in place, so that plain checkpoints are
    saved, loaded or exported. Not for training.

    Raises:
        ValueError: The model has no adapters.
    """
    adapters = require_adapters(model)
    models = surgery.replace_layers(model, {a: a.layer for a in adapters})
    for adapter in adapters:
        adapter.release()
    surgery.forget_compiled(models)
    try:
        yield model
    finally:
        models = surgery.replace_layers(model, {a.layer: a for a in adapters})
        for adapter in adapters:
            adapter.hold()
        surgery.forget_compiled(models)


@contextlib.contextmanager
def adapters_disabled(model: keras.Model) -> Iterator[keras.Model]:
    """The base model's outputs for as long as the block lasts, no retrace.

    Raises:
        ValueError: The model has no adapters.
    """
    active = [a for a in require_adapters(model) if not a.disabled]
    scales = [float(adapter.scale) for adapter in active]
    for adapter in active:
        adapter.scale.assign(0.0)
        adapter.disabled = True
    try:
        yield model
    finally:
        for adapter, scale in zip(active, scales):
            adapter.scale.assign(scale)
            adapter.disabled = False


def adapter_places(model: keras.Model) -> list[Place]:
    """The model's adapters and where they are."""
    found = places(model)
    return [p for p in found if isinstance(p.layer, AdapterLayer)]


def require_adapters(model: keras.Model) -> list[AdapterLayer]:
    """The model's adapters; a ValueError if there are none."""
    _check_model(model)
    adapters = [place.layer for place in adapter_places(model)]
    if not adapters:
        raise ValueError(
            f"Model '{model.name}' has no adapters. Expected a model that "
            "`wrap_model` or `load_adapters` has wrapped."
        )
    return adapters


def wrap_places(
    model: keras.Model,
    requests: list[tuple[Place, type[AdapterLayer], dict]],
    kept: list[Place],
    fill: Callable[[list[AdapterLayer]], None] = lambda adapters: None,
) -> None:
    """Wraps chosen places, all or none.

    Args:
        model: The model they are in.
        requests: For each place the adapter class and its options.
        kept: Places that stay trainable.
        fill: Called with the built adapters before they are put in place.
    """
    flags = {id(x): surgery.trainable_flags(x) for x in _tree(model)}
    adapters = {}
    try:
        for place, adapter_class, options in requests:
            adapters[place.layer] = _build_adapter(
                place, adapter_class, options, adapters
            )
        fill(list(adapters.values()))
        tree = _tree(model)
        models = surgery.replace_layers(model, adapters, renew_optimizers=True)
    except Exception:
        for adapter in adapters.values():
            adapter.release()
        raise
    for layer in tree:
        if not isinstance(layer, AdapterLayer):
            _FLAGS.setdefault(layer, flags[id(layer)])
    _freeze(model, [place.layer for place in kept])
    surgery.forget_compiled(models)


def _build_adapter(place, adapter_class, options, others):
    twins = sum(base.path == place.layer.path for base in others)
    try:
        adapter = adapter_class(place.layer, **options)
        surgery.build_in_place(adapter, twins)
    except ValueError as error:
        raise ValueError(f"At '{place.path}': {error}") from error
    return adapter


def _take_off(model, adapters):
    swaps = {adapter: adapter.layer for adapter in adapters}
    models = surgery.replace_layers(model, swaps, renew_optimizers=True)
    for adapter in adapters:
        adapter.release()
    _restore_flags(model)
    surgery.forget_compiled(models)


def _adapter_class(method):
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]
    if inspect.isclass(method) and issubclass(method, AdapterLayer):
        return method
    raise ValueError(
        f"Received method={method!r}. Expected one of {sorted(METHODS)} or "
        "a subclass of `AdapterLayer`."
    )


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


def _kept_places(model, candidates, trainable):
    if trainable is None:
        return outside_backbone(model, candidates)
    patterns = [trainable] if isinstance(trainable, str) else list(trainable)
    kept = []
    for pattern in patterns:
        matched = match_paths(candidates, pattern)
        if not matched:
            raise ValueError(
                f"trainable={pattern!r} matches no layer of model "
                f"'{model.name}'. Layers here: {describe(candidates)}."
            )
        for place in matched:
            inside = f"{place.path}/"
            kept += [
                other
                for other in candidates
                if other is place or other.path.startswith(inside)
            ]
    return kept


def _options_per_layer(chosen, options, overrides):
    per_layer = {place.path: dict(options) for place in chosen}
    for pattern, changes in overrides.items():
        matched = match_paths(chosen, pattern)
        if not matched:
            raise ValueError(
                f"overrides has {pattern!r}, which matches none of the "
                f"layers to wrap: {describe(chosen)}."
            )
        for place in matched:
            per_layer[place.path].update(changes)
    return per_layer


def _tree(model):
    return [model, *(place.layer for place in places(model))]


def _restore_flags(model):
    for layer in _tree(model):
        if layer in _FLAGS:
            surgery.set_trainable(layer, *_FLAGS.pop(layer))


def _freeze(model, kept):
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
