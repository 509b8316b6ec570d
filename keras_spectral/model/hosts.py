"""The hosts in a model: finding them, putting them in and taking them out."""

import contextlib
import weakref
from collections.abc import Iterable
from collections.abc import Iterator

import keras

from keras_spectral._internal.checks import check_adapter_name
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import did_you_mean
from keras_spectral._internal.layer_tools import all_layers
from keras_spectral._internal.layer_tools import set_trainable
from keras_spectral._internal.snapshot import Snapshot
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers.host import Host
from keras_spectral.model import surgery
from keras_spectral.model import training
from keras_spectral.model.adapted import config_before
from keras_spectral.model.adapted import set_classes
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.training import tree

Names = str | Iterable[str] | None

# What was trainable before a model was first wrapped, by layer.
FLAGS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# For each layer inside of a model's host that host and the model's name.
HOSTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# Layers that have hosts, but not inside of this `unwrapped` block.
LENT: weakref.WeakSet = weakref.WeakSet()


def hosts(model: keras.Model) -> list[Host]:
    """A model's adapters, stacks of them and trained copies."""
    return [p.layer for p in places(model) if isinstance(p.layer, Host)]


def members(model: keras.Model) -> list[keras.layers.Layer]:
    """All members of a model's hosts."""
    return [member for host in hosts(model) for member in host.members()]


def member_places(
    model: keras.Model, names: Iterable[str] | None = None
) -> list[Place]:
    """The members, of all names or some, and where they are."""
    return [
        Place(place.path, place.key, member)
        for place in places(model)
        if isinstance(place.layer, Host)
        for member in place.layer.members()
        if names is None or member.adapter_name in names
    ]


def adapter_places(
    model: keras.Model,
    *kinds: type[AdapterLayer],
    names: Iterable[str] | None = None,
) -> list[Place]:
    """The model's adapters, of all kinds or some, and where they are."""
    kinds = kinds or (AdapterLayer,)
    found = member_places(model, names)
    return [place for place in found if isinstance(place.layer, kinds)]


def require_adapters(
    model: keras.Model, *kinds: type[AdapterLayer]
) -> list[AdapterLayer]:
    """The model's adapters; a ValueError if there are none of these kinds."""
    check_model(model)
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


def require_plain(model: keras.Model) -> None:
    """Raises a ValueError if it is no model, or one that has adapters."""
    if hosts(check_model(model)):
        raise ValueError(
            f"Model '{model.name}' has adapters. Expected a plain one: merge "
            "or unwrap it first."
        )


def names_in(model: keras.Model) -> list[str]:
    """The names of the adapters, in the order of the layers."""
    return list(dict.fromkeys(m.adapter_name for m in members(model)))


def require_names(model: keras.Model, names: Names) -> list[str]:
    """Names as a list, None being all; a ValueError if there is no such."""
    require_adapters(model)
    return chosen_names(model, names_in(model), names)


def check_new_name(model: keras.Model, name: str) -> str:
    """Raises unless a name is one that no adapter of the model has."""
    if check_adapter_name(name) in names_in(model):
        raise ValueError(
            f"Model '{model.name}' has an adapter '{name}' already. Expected "
            "another name, or `delete_adapter` first."
        )
    return name


def chosen_names(
    model: keras.Model, known: list[str], names: Names
) -> list[str]:
    """`require_names` for a model whose names are known already."""
    if names is None:
        return known
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Iterable):
        raise ValueError(
            f"Received adapter={names!r}. Expected a name or a list of names."
        )
    given = list(given)
    for name in given:
        if name not in known:
            raise ValueError(
                f"Model '{model.name}' has no adapter {name!r}. Expected one "
                f"of {known}." + did_you_mean(name, known)
            )
    return given


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
    keeping = training.moved_members if renew else contextlib.nullcontext
    with keeping(above):
        surgery.replace_layers(owners, swaps, snapshot, renew)
        set_classes(configs)
        training.forget_compiled(above)
    surgery.remember(model)
    # Out for a moment, hosts are still those of their bases.
    for old in swaps if renew else ():
        if isinstance(old, Host):
            HOSTS.pop(old.layer, None)
    for new in swaps.values() if renew else ():
        if isinstance(new, Host):
            HOSTS[new.layer] = weakref.ref(new), model.name


def exchange_members(
    model: keras.Model,
    changes: dict[keras.layers.Layer, keras.layers.Layer | None],
    snapshot: Snapshot,
    renew: bool = True,
) -> dict[keras.layers.Layer, keras.layers.Layer]:
    """Puts other members, or none, in the place of some.

    Returns:
        What took whose place, `{old host: new host or base}`.
    """
    swaps = {}
    for host in hosts(model):
        if not any(member in changes for member in host.members()):
            continue
        new = [changes.get(member, member) for member in host.members()]
        swaps[host] = host.with_members([m for m in new if m is not None])
        built_around(swaps[host])
    put(model, swaps, snapshot, renew)
    return swaps


def built_around(host: keras.layers.Layer) -> None:
    """Builds a host that holds built members."""
    if isinstance(host, Host) and not host.built:
        host.build((host.layer.get_build_config() or {}).get("input_shape"))


def take_off(
    model: keras.Model, snapshot: Snapshot, names: Iterable[str] | None = None
) -> None:
    """Drops members, all or those of some names.

    Bases that have none left are free again, with the flags that they had
    once the model has no adapter at all.
    """
    _take_out(model, snapshot, names)
    if not hosts(model):
        for layer in tree(model):
            FLAGS.pop(layer, None)


@contextlib.contextmanager
def taken_out(
    model: keras.Model, names: Iterable[str] | None = None
) -> Iterator[None]:
    """Members are out of the model for as long as the block lasts.

    Where a layer has no other ones the very base is in place.
    """
    flags = Snapshot()
    flags.keep_flags(all_layers(model))
    with all_or_nothing() as snapshot:
        swaps = _take_out(model, snapshot, names, renew=False)
        bases = [host.layer for host in swaps]
        LENT.update(bases)
        try:
            yield
        finally:
            LENT.difference_update(bases)
        put(model, {new: old for old, new in swaps.items()}, snapshot, False)
        for host in swaps:
            host.keep_base_frozen()
        flags.restore()


def _take_out(model, snapshot, names, renew=True):
    keep_all(model, snapshot)
    names = names_in(model) if names is None else names
    gone = {m: None for m in members(model) if m.adapter_name in names}
    swaps = exchange_members(model, gone, snapshot, renew)
    for host in swaps:
        if not isinstance(swaps[host], Host):
            host.free_base()
    if hosts(model):
        training.set_flags(model)
    else:
        for layer in tree(model):
            if layer in FLAGS:
                set_trainable(layer, *FLAGS[layer])
    return swaps


def keep_all(model: keras.Model, snapshot: Snapshot) -> None:
    """Keeps flags, and the values that adapters share or count."""
    snapshot.keep_flags(all_layers(model))
    snapshot.keep(*hosts(model), *members(model))
    for member in members(model):
        own = member._non_trainable_variables
        snapshot.keep_values(w for w in own if len(w.shape) == 0)
