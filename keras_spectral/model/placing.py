"""Puts adapters and copies into a model's places, all or none."""

import collections
import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

import keras

from keras_spectral._backend import scope_of
from keras_spectral._backend import without_gradients
from keras_spectral._internal.layer_tools import trainable_flags
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.kernels.spectra import factorize
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers.host import Host
from keras_spectral.layers.trained_copy import NamedCopy
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model import surgery
from keras_spectral.model import training
from keras_spectral.model.hosts import FLAGS
from keras_spectral.model.hosts import LENT
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import built_around
from keras_spectral.model.hosts import hosts
from keras_spectral.model.hosts import keep_all
from keras_spectral.model.hosts import members
from keras_spectral.model.hosts import names_in
from keras_spectral.model.hosts import put
from keras_spectral.model.options import warn_if_larger
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject


class Request(NamedTuple):
    """A wish for a place: a method, its options, the adapter's name."""

    place: Place
    kind: type[AdapterLayer]
    options: dict
    name: str = "default"


def give_triplets(
    adapters: list[AdapterLayer], svd_cache: str | os.PathLike | None = None
) -> None:
    """Factorises all the kernels that some adapters are going to need."""
    requests = []
    for adapter in adapters:
        if type(adapter).triplets_needed is AdapterLayer.triplets_needed:
            continue
        view = adapter.view_of(adapter.layer)
        requests.append((adapter, view, adapter.triplets_needed(view)))
    needing = [(a, view, count) for a, view, count in requests if count]
    found = factorize([(view, count) for _, view, count in needing], svd_cache)
    for (adapter, _, _), triplets in zip(needing, found):
        adapter.give_triplets(triplets)


def wrap_places(
    model: keras.Model,
    requests: list[Request],
    kept: list[tuple[Place, str]],
    prepare: Callable[[list[AdapterLayer]], None] = give_triplets,
    fill: Callable[[list[Place]], None] = lambda made: None,
) -> None:
    """Gives places new members, all or none.

    Those whose names are new to a model with other ones become the only
    active ones.

    Args:
        model: The model they are in.
        requests: What becomes of each place.
        kept: Places that train as copies of themselves, and with what name.
        prepare: Called with the adapters before they are built.
        fill: Called with the places of built members, before these are put
            in: adapters in the order of `requests`, then copies.
    """
    if any(layer in LENT for layer in training.tree(model)):
        raise ValueError(
            f"The adapters of model '{model.name}' are taken out until an "
            "`unwrapped` or `merged` block ends. Expected `wrap_model` after "
            "the block."
        )
    for kind in {request.kind for request in requests}:
        kind.check_model(model)
    with all_or_nothing() as snapshot, scope_of(model), without_gradients():
        keep_all(model, snapshot)
        if not hosts(model):
            for layer in training.tree(model):
                FLAGS.pop(layer, None)
        flags = {id(x): trainable_flags(x) for x in training.tree(model)}
        new: list[Place] = []
        for place, kind, options, name in requests:
            with _named(place):
                base = subject(place.layer)
                made = kind(base, adapter_name=name, **options)
                new.append(Place(place.path, place.key, made))
        adapters = [place.layer for place in new]
        prepare(adapters)
        _connect(adapters, adapter_places(model))
        taken = {
            (id(request.place.layer), request.name) for request in requests
        }
        for place, name in kept:
            trains = (id(place.layer), name) not in taken
            if trains and _can_train(place, name):
                made = NamedCopy(subject(place.layer), name)
                new.append(Place(place.path, place.key, made))
        _build(new)
        fill(new)
        warn_if_larger(requests, adapters)
        before = [x for x in training.tree(model) if not isinstance(x, Host)]
        known = names_in(model)
        put(model, _swaps(model, new), snapshot)
        for layer in before:
            FLAGS.setdefault(layer, flags[id(layer)])
        if known and any(p.layer.adapter_name not in known for p in new):
            for member in members(model):
                if member.adapter_name in known:
                    member.is_trained = False
                    member.set_strength(0.0)
        training.set_flags(model)


def _connect(adapters, old):
    """Lets new adapters share what those of a kind and a name share."""
    groups = collections.defaultdict(list)
    for adapter in [*adapters, *(place.layer for place in old)]:
        groups[type(adapter), adapter.adapter_name].append(adapter)
    new = {(type(adapter), adapter.adapter_name) for adapter in adapters}
    for kind, name in new:
        kind.connect(groups[kind, name])


def _build(new):
    """Builds new members, their weights' paths apart from each other's."""
    paths = collections.Counter()
    for place in new:
        member = place.layer
        base = vars(member).get("base") or member.layer
        with _named(place):
            surgery.build_in_place(member, base, paths[base.path, type(member)])
        paths[base.path, type(member)] += 1


def _swaps(model, new):
    """Hosts with the new members in the place of layers and other hosts."""
    added = collections.defaultdict(list)
    for place in new:
        added[place.key].append(place.layer)
    swaps = {}
    for place in places(model):
        if place.key not in added:
            continue
        old, extra = place.layer, added[place.key]
        if isinstance(old, Host):
            host = old.with_members([*old.members(), *extra])
            for member in extra:
                if isinstance(member, Host):
                    member.take_base_from(old)
        elif isinstance(extra[0], NamedCopy):
            host = TrainedCopy(old, extra)
        else:
            host = extra[0].with_members(extra)
        built_around(host)
        swaps[old] = host
    return swaps


def _can_train(place, name):
    """Whether a place can train as a copy; False if it has no weights."""
    if isinstance(place.layer, TrainedCopy):
        names = [member.adapter_name for member in place.layer.members()]
        return name not in names
    if isinstance(place.layer, Host):
        own = [m for m in place.layer.members() if m.adapter_name == name]
        if own or not place.layer.layer.weights or place.layer.opens_base:
            return False
        raise ValueError(
            f"'{place.path}' has adapter "
            f"'{place.layer.members()[0].adapter_name}' and cannot train as a "
            f"copy for adapter '{name}' beside it. "
            "Expected `trainable=` without this layer, such as `trainable=[]`."
        )
    return bool(place.layer._trainable_variables)


@contextlib.contextmanager
def _named(place):
    """Says where an error happened."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"At '{place.path}': {error}") from error
