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
            member.trainable = member.is_trained
        vars(layer)["_trainable"] = is_active(layer)
        layer.freeze_base()


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


def forget_sets(models: Iterable[keras.Model]) -> None:
    """Drops what models trained other sets of variables with."""
    for model in models:
        _SETS.pop(model, None)


def _key(model):
    return tuple(id(variable) for variable in model.trainable_variables)


def _switch(model, old, new):
    kept = _SETS.setdefault(model, {})
    optimizer = getattr(model, "optimizer", None)
    if kept.get("now") is not optimizer:
        kept.clear()  # it was compiled anew
    if getattr(optimizer, "built", True):
        kept[old] = surgery.training_state(model)
        fresh = optimizer and renewed(optimizer)
    else:
        fresh = optimizer
    state = kept.get(new, (fresh, {}))
    surgery.set_training_state(model, *state)
    kept["now"] = state[0]
