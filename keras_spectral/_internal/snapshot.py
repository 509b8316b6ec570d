"""Changes of a model that happen as a whole or not at all."""

import contextlib
from collections.abc import Iterable
from collections.abc import Iterator

import keras
from keras import ops


class Snapshot:
    """A record of what objects were like, restored at any moment.

    It keeps an object's class, its attributes and the built-in containers
    that these hold, and variables' values and flags. Bringing back writes
    past `__setattr__` and Keras's trackers, so that nothing of a model's own
    code runs.
    """

    def __init__(self):
        self._classes: dict[int, tuple] = {}
        self._containers: dict[int, tuple] = {}
        self._flags: list[tuple] = []
        self._values: list[tuple] = []

    def keep(self, *objects) -> None:
        """Keeps objects as they are now, those it knows as they were."""
        for thing in objects:
            if id(thing) in self._classes:
                continue
            self._keep_container(vars(thing))
            tracker = vars(thing).get("_tracker")
            if tracker is not None:
                self._keep_container(tracker.stored_ids)
                for _, store in tracker.config.values():
                    self._keep_container(store)
            self._classes[id(thing)] = (thing, type(thing))

    def keep_flags(self, layers: Iterable[keras.layers.Layer]) -> None:
        """Keeps the `trainable` flags of layers and of their own weights."""
        for layer in layers:
            own = [*layer._trainable_variables, *layer._non_trainable_variables]
            weights = [(variable, variable.trainable) for variable in own]
            self._flags.append((layer, layer._trainable, weights))

    def keep_values(self, variables: Iterable[keras.Variable]) -> None:
        """Keeps copies of variables' values."""
        for variable in variables:
            self._values.append((variable, ops.copy(variable)))

    def restore(self) -> None:
        """Brings everything back."""
        for thing, kind in self._classes.values():
            if type(thing) is not kind:
                object.__setattr__(thing, "__class__", kind)
        for container, content in self._containers.values():
            _refill(container, content)
        for layer, flag, weights in self._flags:
            vars(layer)["_trainable"] = flag
            for variable, trainable in weights:
                if variable.trainable != trainable:
                    variable.trainable = trainable
        for variable, value in self._values:
            variable.assign(value)

    def forget(self) -> None:
        """Keeps nothing any more: what has happened is not undone."""
        for kept in (self._classes, self._containers):
            kept.clear()
        for kept in (self._flags, self._values):
            kept.clear()

    def _keep_container(self, value):
        if isinstance(value, tuple):
            for item in value:
                self._keep_container(item)
        if not isinstance(value, dict | list | set):
            return
        # TensorFlow's own containers are replaced, never changed in place.
        if id(value) in self._containers or _is_foreign(value):
            return
        content = dict(value) if isinstance(value, dict) else list(value)
        self._containers[id(value)] = (value, content)
        items = content.values() if isinstance(content, dict) else content
        for item in items:
            if isinstance(item, dict | list | set | tuple):
                self._keep_container(item)


@contextlib.contextmanager
def all_or_nothing() -> Iterator[Snapshot]:
    """Brings back what a snapshot keeps if the block fails.

    An interruption (Ctrl-C) counts as a failure.
    """
    snapshot = Snapshot()
    try:
        yield snapshot
    except BaseException:
        insist(snapshot.restore)
        raise


def finish(function) -> None:
    """Calls a function that can be called again until it has ended.

    An interruption (Ctrl-C) waits until then.
    """
    stopped = None
    while True:
        try:
            function()
            break
        except KeyboardInterrupt as interruption:
            stopped = interruption
    if stopped is not None:
        raise stopped


def insist(function) -> None:
    """Calls a function that can be called twice, again if interrupted."""
    try:
        function()
    except BaseException:
        function()
        raise


def _is_foreign(value):
    return type(value).__module__.startswith("tensorflow.")


def _refill(container, content):
    """Makes a container hold what it held, past its own methods."""
    if isinstance(container, dict):
        if _same_items(container, content):
            return
        # An attribute that stays is never missing, not even for a moment.
        kind = _base_of(container)
        if list(container) == list(content)[: len(container)]:
            kind.update(container, content)
            return
        for key in [key for key in container if key not in content]:
            kind.__delitem__(container, key)
        kind.update(container, content)
    elif isinstance(container, set):
        if container != set(content):
            set.clear(container)
            set.update(container, content)
    else:
        list.__setitem__(container, slice(None), content)


def _base_of(container):
    """`dict`, or `OrderedDict`, which keeps an order of its own."""
    builtin = ("builtins", "collections")
    return next(k for k in type(container).__mro__ if k.__module__ in builtin)


def _same_items(container, content):
    return len(container) == len(content) and all(
        key in content and content[key] is value
        for key, value in container.items()
    )
