"""Trainable flags of a wrapped model, and an optimizer for each set."""

import contextlib
import weakref
from collections.abc import Iterable
from collections.abc import Iterator

import keras

from keras_spectral._internal.layer_tools import set_trainable
from keras_spectral._internal.layer_tools import sublayers
from keras_spectral._internal.optimizers import renewed
from keras_spectral.layers.host import Host
from keras_spectral.layers.member import own_weights
from keras_spectral.model import surgery
from keras_spectral.model.paths import places

# For each model what it trained each set of variables with.
_SETS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def tree(model: keras.Model) -> list[keras.layers.Layer]:
    """The model and every layer that has a place in it."""
    return [model, *(place.layer for place in places(model))]


def set_flags(
    model: keras.Model, kept: Iterable[keras.layers.Layer] = ()
) -> None:
    """Freezes all but the members that are to train and the way to them.

    Args:
        model: The model.
        kept: Plain layers that train as well.
    """
    active, kept = {}, {id(layer) for layer in kept}

    def is_active(layer):
        if id(layer) not in active:
            active[id(layer)] = False
            below = [is_active(child) for child in sublayers(layer)]
            own = isinstance(layer, Host) and any(
                member.is_trained for member in layer.members()
            )
            own = own or id(layer) in kept
            active[id(layer)] = own or any(below)
        return active[id(layer)]

    for layer in tree(model):
        if not isinstance(layer, Host):
            set_trainable(layer, is_active(layer), id(layer) in kept)
            continue
        for member in layer.members():
            _set_all(member, member.is_trained, layer.layer)
        vars(layer)["_trainable"] = is_active(layer)
        layer.freeze_base()


def _set_all(layer, flag, base):
    """Sets the flags of a layer and of all below, a base excepted."""
    set_trainable(layer, flag, flag)
    for child in sublayers(layer):
        if child is not base:
            _set_all(child, flag, base)


@contextlib.contextmanager
def another_set(model: keras.Model, changed: Iterable) -> Iterator[None]:
    """Inside, other variables of a model begin to train.

    Compiled functions and the optimizer belong to the variables that train:
    each set of these has its own, which are there again when it comes back.

    Args:
        model: The model.
        changed: Layers that begin or cease to train.
    """
    owners = surgery.owners(model)
    above = surgery.models_above(owners, changed) or [model]
    before = {x: _key(x) for x in above if isinstance(x, keras.Model)}
    yield
    for other, old in before.items():
        new = _key(other)
        if new != old:
            _switch(other, old, new)


def forget_compiled(models: Iterable[keras.Model]) -> None:
    """Drops compiled functions, those of other sets of variables as well."""
    surgery.forget_compiled(models)
    for model in models:
        kept = _SETS.get(model, {})
        for key in kept.keys() - {"now"}:
            optimizer, _ = kept[key]
            kept[key] = optimizer, {}


@contextlib.contextmanager
def moved_members(models: Iterable[keras.Model]) -> Iterator[None]:
    """Inside, members come and go; sets of those that stay are kept.

    Args:
        models: The models whose members change.
    """
    models = [x for x in models if isinstance(x, keras.Model)]
    before = {x: (_key(x), getattr(x, "optimizer", None)) for x in models}
    yield
    for model, (old, optimizer) in before.items():
        kept = _SETS.setdefault(model, {})
        if kept.get("now") is not optimizer:
            kept.clear()
        if getattr(optimizer, "built", False):
            kept[old] = optimizer, {}
        alive = _weights_of_members(model)
        for key in kept.keys() - {"now"}:
            if not alive.issuperset(key):
                del kept[key]
        if _key(model) in kept:
            surgery.set_training_state(model, *kept[_key(model)])
        kept["now"] = getattr(model, "optimizer", None)


def _weights_of_members(model):
    return {
        id(weight)
        for place in places(model)
        if isinstance(place.layer, Host)
        for member in place.layer.members()
        for weight in own_weights(member)
    }


def _key(model):
    return tuple(id(variable) for variable in model.trainable_variables)


def _switch(model, old, new):
    kept = _SETS.setdefault(model, {})
    optimizer = getattr(model, "optimizer", None)
    if kept.get("now") is not optimizer:
        kept.clear()  # it was compiled again
    if getattr(optimizer, "built", True):
        kept[old] = surgery.training_state(model)
        fresh = optimizer and renewed(optimizer)
    else:
        fresh = optimizer
    state = kept.get(new, (fresh, {}))
    surgery.set_training_state(model, *state)
    kept["now"] = state[0]
