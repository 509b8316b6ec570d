"""Adapters that share a layer with the others of their name."""

import keras

from keras_spectral._internal.layer_tools import config_of_shared


class Sharing:
    """Mixed into adapters all of which, in one model, use one more layer.

    `wrap_model` makes it and gives it to all; files hold it once. A layer by
    itself has one of its own. A method says what it is by the class
    attributes and `make_shared`.
    """

    shared_argument: str  # the constructor's argument, and the attribute
    shared_kind: type[keras.layers.Layer]
    shared_sizes: tuple[str, ...]  # what both must have in common

    @classmethod
    def make_shared(cls, adapters: list) -> keras.layers.Layer:
        """A layer that these adapters can share."""
        raise NotImplementedError

    def check_shared(self, shared: keras.layers.Layer) -> None:
        """Raises a ValueError unless the adapter can use a layer."""
        kind, name = self.shared_kind.__name__, self.shared_argument
        if not isinstance(shared, self.shared_kind):
            raise ValueError(
                f"Received {name}={shared!r} for layer '{self.name}'. "
                f"Expected a {kind}, or None."
            )
        wanted = {size: getattr(self, size) for size in self.shared_sizes}
        found = {size: getattr(shared, size) for size in self.shared_sizes}
        if wanted != found:
            raise ValueError(
                f"Layer '{self.name}' has {wanted}, the {kind} that it shares "
                f"{found}. Expected the same for all layers that share one."
            )

    def set_shared(self, shared: keras.layers.Layer | dict | None) -> None:
        """Keeps the argument: a layer, its configuration, or None."""
        if isinstance(shared, dict):
            shared = keras.saving.deserialize_keras_object(shared)
        if shared is not None:
            self.check_shared(shared)
        setattr(self, self.shared_argument, shared)

    def build_shared(self) -> None:
        """Builds what is shared, made here if nobody has given it."""
        if self.shared is None:
            self.set_shared(self.make_shared([self]))
        if not self.shared.built:
            self.shared.build()

    @property
    def shared(self) -> keras.layers.Layer | None:
        return getattr(self, self.shared_argument)

    @classmethod
    def connect(cls, adapters):
        given = [a.shared for a in adapters if a.shared is not None]
        lonely = [a for a in adapters if a.shared is None]
        if lonely:
            shared = given[0] if given else cls.make_shared(lonely)
            for adapter in lonely:
                adapter.set_shared(shared)

    @classmethod
    def option_names(cls):
        names = super().option_names()
        return [name for name in names if name != cls.shared_argument]

    def get_config(self):
        shared = config_of_shared(self.shared)
        return {**super().get_config(), self.shared_argument: shared}
