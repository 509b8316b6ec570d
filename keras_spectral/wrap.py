"""Wraps models: puts adapters around layers, takes them off, folds them in."""

import collections
import contextlib
import os
import warnings
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator

import keras

from keras_spectral import surgery
from keras_spectral._backend import scope_of
from keras_spectral._internal.snapshot import Snapshot
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.adapted import config_before
from keras_spectral.adapted import freeze_all_but
from keras_spectral.adapted import set_classes
from keras_spectral.adapted import tree
from keras_spectral.checks import check_choice
from keras_spectral.checks import is_small
from keras_spectral.kernels import kernel_view
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers.host import Host
from keras_spectral.layers.host import TrainedCopy
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
# For each layer inside of a model's host that host and the model's name.
_HOSTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# Layers that have hosts, but not inside of this `unwrapped` block.
_LENT: weakref.WeakSet = weakref.WeakSet()
_LOST = 0.01  # share of a correction that merging may lose without a word


def wrap_model(
    model: keras.Model,
    method: str | type[AdapterLayer],
    target: Target | None = None,
    *,
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
        also: Other models that share layers with this one.
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

    for other in also:
        _check_model(other)
        surgery.remember(other)

    _warn_of_holders(model, chosen)

    def prepare(adapters):
        give_triplets(adapters, svd_cache)

    wrap_places(model, requests, kept, prepare)
    return model


def unwrap_model(model: keras.Model) -> keras.Model:
    """Drops all adapters: the very same base layers are back, unchanged.

    Returns:
        The model, with the `trainable` flags and the heads it had before it
        was wrapped.

    Raises:
        ValueError: The model has no adapters.
    """
    require_adapters(model)
    with all_or_nothing() as snapshot:
        take_off(model, snapshot)
    return model


def merge_model(model: keras.Model, *, dtype: str | None = None) -> keras.Model:
    """Folds all adapters into their base kernels: plain Keras layers again.

    Outputs stay what they were, and what trained beside the adapters becomes
    the model's own. A 16-bit kernel rounds what it gains: a warning says
    where that eats more than 1 % of the correction.

    Args:
        model: A wrapped model.
        dtype: `"float32"` gives adapted layers of 16 bits a kernel that
            rounds nothing; they then compute in it as well.

    Returns:
        The model, with the `trainable` flags it had before it was wrapped.

    Raises:
        ValueError: The model has no adapters, one of them cannot be merged,
            or a merged kernel would hold NaN or infinities. Nothing has
            changed then.
    """
    adapters = require_adapters(model)
    check_choice(dtype, "dtype", (None, "float32", "float64"))
    with all_or_nothing() as snapshot:
        wide = {}
        if dtype is not None:
            small = [a for a in adapters if is_small(a.layer.variable_dtype)]
            wide = {a.layer: a.merged_matrix() for a in small}
        losses = fold_all(model, snapshot)
        if not wide:
            warn_of_rounding(losses)
        take_off(model, snapshot)
        if wide:
            swaps = {x: _widened(x, dtype, m) for x, m in wide.items()}
            put(model, swaps, snapshot)
    return model


def fold_all(model: keras.Model, snapshot: Snapshot) -> dict[str, float]:
    """Writes adapters and trained copies into their bases.

    Returns:
        For each adapter's path the share of the correction that was lost.
    """
    for host in hosts(model):
        if isinstance(host, AdapterLayer):
            host.check_active()
    snapshot.keep_values(base_weights(model))
    losses = {}
    for place in places(model):
        if isinstance(place.layer, AdapterLayer):
            losses[place.path] = place.layer.merge()
        elif isinstance(place.layer, TrainedCopy):
            place.layer.fold()
    return losses


def warn_of_rounding(losses: dict[str, float]) -> None:
    """Warns of corrections that a kernel of few bits could not take."""
    lost = {path: loss for path, loss in losses.items() if loss > _LOST}
    if lost:
        worst = max(lost, key=lost.get)
        warnings.warn(
            f"Rounding to the kernels' 16 bits lost {100 * lost[worst]:.0f} % "
            f"of the correction at '{worst}', and more than {100 * _LOST:.0f} "
            f"% in {len(lost)} of {len(losses)} layers. Keep the adapters, or "
            "use `merge_model(model, dtype='float32')`.",
            stacklevel=3,
        )


def _widened(layer, dtype, matrix):
    """An equal layer of another dtype with a kernel from a matrix."""
    config = {**layer.get_config(), "dtype": dtype}
    wide = type(layer).from_config(config)
    wide.build(layer.get_build_config()["input_shape"])
    for new, old in zip(wide.weights, layer.weights):
        new.assign(keras.ops.cast(old, new.dtype))
    kernel_view(wide).assign(matrix)
    return wide


def base_weights(model: keras.Model) -> list[keras.Variable]:
    """The weights of the layers inside of a model's hosts."""
    return [
        weight
        for host in hosts(model)
        for weight in (
            host.layer.weights
            if isinstance(host, AdapterLayer)
            else surgery.own_variables(host.layer)
        )
    ]


def hosts(model: keras.Model) -> list[Host]:
    """A model's adapters and trained copies."""
    return [p.layer for p in places(model) if isinstance(p.layer, Host)]


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
    fill: Callable[[dict], None] = lambda made: None,
) -> None:
    """Wraps chosen places, all or none.

    Args:
        model: The model they are in.
        requests: For each place the adapter class and its options.
        kept: Places that stay trainable, as copies of themselves.
        prepare: Called with the adapters before they are built.
        fill: Called before they are put in place with `{layer: built host}`.
    """
    if any(layer in _LENT for layer in tree(model)):
        raise ValueError(
            f"The adapters of model '{model.name}' are out for as long as an "
            "`unwrapped` or `merged` block lasts. Expected that it is wrapped "
            "after the block."
        )
    for adapter_class in {adapter_class for _, adapter_class, _ in requests}:
        adapter_class.check_model(model)
    with all_or_nothing() as snapshot, scope_of(model):
        _keep_all(model, snapshot)
        if not hosts(model):
            for layer in tree(model):
                _FLAGS.pop(layer, None)
        flags = {id(x): surgery.trainable_flags(x) for x in tree(model)}
        adapters = {}
        for place, adapter_class, options in requests:
            with _named(place):
                adapters[place.layer] = adapter_class(place.layer, **options)
        made = list(adapters.values())
        prepare(made)
        together = [*made, *(p.layer for p in adapter_places(model))]
        for kind in {type(adapter) for adapter in made}:
            kind.connect([a for a in together if type(a) is kind])
        copies = {
            place.layer: TrainedCopy(place.layer)
            for place in kept
            if _has_weights(place.layer) and place.layer not in adapters
        }
        swaps = {**adapters, **copies}
        paths = collections.Counter()
        for place in (*(place for place, _, _ in requests), *kept):
            if place.layer in swaps and not swaps[place.layer].built:
                twin = paths[place.layer.path]
                with _named(place):
                    surgery.build_in_place(swaps[place.layer], twin)
                paths[place.layer.path] += 1
        fill(swaps)
        warn_if_larger(requests, made)
        before = [x for x in tree(model) if not isinstance(x, Host)]
        put(model, swaps, snapshot)
        for layer in before:
            _FLAGS.setdefault(layer, flags[id(layer)])
        freeze_all_but(
            model, [copies.get(place.layer, place.layer) for place in kept]
        )


def put(
    model: keras.Model, swaps: dict, snapshot: Snapshot, renew: bool = True
) -> None:
    """Puts layers in the place of others, with all that follows from it.

    Args:
        model: The model they are in.
        swaps: `{old layer: new layer}`.
        snapshot: Keeps what is changed.
        renew: Whether it is for good, so that built optimizers are replaced
            by fresh ones.
    """
    owners = surgery.owners(model)
    above = surgery.models_above(owners, swaps)
    configs = {x: config_before(x) for x in above}
    surgery.replace_layers(owners, swaps, snapshot, renew)
    set_classes(configs)
    surgery.forget_compiled(above)
    surgery.remember(model)
    # Out for a moment, hosts are still those of their bases.
    for old, new in swaps.items() if renew else ():
        if isinstance(old, Host):
            _HOSTS.pop(old.layer, None)
        if isinstance(new, Host):
            _HOSTS[new.layer] = weakref.ref(new), model.name


def take_off(model: keras.Model, snapshot: Snapshot) -> None:
    """Puts all bases back, with the flags that they had."""
    _put_bases(model, snapshot)
    for layer in tree(model):
        _FLAGS.pop(layer, None)


@contextlib.contextmanager
def bases_in_place(model: keras.Model) -> Iterator[None]:
    """The base layers are in the model for as long as the block lasts."""
    flags = Snapshot()
    flags.keep_flags(surgery.all_layers(model))
    with all_or_nothing() as snapshot:
        inside = _put_bases(model, snapshot, renew=False)
        bases = [host.layer for host in inside]
        _LENT.update(bases)
        try:
            yield
        finally:
            _LENT.difference_update(bases)
        put(model, {h.layer: h for h in inside}, snapshot, renew=False)
        for host in inside:
            host.keep_base_frozen()
        flags.restore()


def _put_bases(model, snapshot, renew=True):
    _keep_all(model, snapshot)
    swaps = {host: host.layer for host in hosts(model)}
    put(model, swaps, snapshot, renew)
    for host in swaps:
        host.free_base()
    for layer in tree(model):
        if layer in _FLAGS:
            surgery.set_trainable(layer, *_FLAGS[layer])
    return swaps


def _keep_all(model, snapshot):
    """Keeps flags, and the values that adapters share or count."""
    snapshot.keep_flags(surgery.all_layers(model))
    snapshot.keep(*hosts(model))
    for place in adapter_places(model):
        own = place.layer._non_trainable_variables
        snapshot.keep_values(w for w in own if not w.shape)


def _has_weights(layer):
    return not isinstance(layer, Host) and bool(layer._trainable_variables)


@contextlib.contextmanager
def _named(place):
    """Says where an error happened."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"At '{place.path}': {error}") from error


def _check_model(model):
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            f"Received a {type(model).__name__}. Expected a Keras model."
        )


def _warn_of_holders(model, chosen):
    """Warns of functions and objects that call a layer past its adapter."""
    held = surgery.hidden_holders(model, [place.layer for place in chosen])
    if held:
        name, kinds = next(iter(held.items()))
        warnings.warn(
            f"Layer '{name}' of model '{model.name}' is also held by a "
            f"{' and a '.join(kinds)}, which an adapter does not reach: it "
            "goes on seeing the base, and after `merge_model` the merged "
            "kernel, so that outputs change there."
            + (f" So are {len(held) - 1} more." if len(held) > 1 else ""),
            stacklevel=3,
        )


def _check_chosen(model, chosen):
    wrapped = [p for p in chosen if isinstance(p.layer, AdapterLayer)]
    if wrapped:
        raise ValueError(
            f"Already wrapped in model '{model.name}': {describe(wrapped)}. "
            "Unwrap or merge first, or leave these out with `exclude`."
        )
    for place in chosen:
        host, owner = _HOSTS.get(place.layer, (lambda: None, None))
        if host() is not None:
            raise ValueError(
                f"'{place.path}' of model '{model.name}' was wrapped as a "
                f"layer of model '{owner}', which shares it. Expected that "
                "`wrap_model` is told of both: unwrap that one, then "
                f"`wrap_model(..., also=[...])`."
            )
    unbuilt = [place for place in chosen if not place.layer.built]
    if unbuilt:
        raise ValueError(
            f"Model '{model.name}' is not built: {describe(unbuilt)} have no "
            "weights yet. Call it on a batch or use `build(input_shape)`, "
            "then wrap."
        )
