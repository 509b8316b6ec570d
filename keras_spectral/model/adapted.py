"""The class that a model has while adapters are in it."""

import keras

from keras_spectral._internal.layer_tools import all_layers
from keras_spectral.layers.host import Host
from keras_spectral.model import surgery
from keras_spectral.model.training import set_flags

_PACKAGE, _NAME = "keras_spectral", "AdaptedModel"
_CLASSES: dict[type, type] = {}


class Adapted:
    """Mixed into a model's class: what a wrap froze stays frozen.

    `model.trainable = False; model.trainable = True` thaws the adapters and
    the trained heads alone.
    """

    @property
    def trainable(self):
        return super().trainable

    @trainable.setter
    def trainable(self, value):
        # What a class of one's own does there is done as well.
        plain_class(self).trainable.fset(self, value)
        if value:
            set_flags(self)


class Rebuilt(Adapted):
    """An `Adapted` model whose own configuration knows no adapters.

    It is saved as the plain model's configuration and what adapts it.
    """

    def get_config(self):
        from keras_spectral.saving.adapter_file import describe_adapters

        if isinstance(self._config_before, Exception):
            raise ValueError(
                f"Model '{self.name}' cannot be saved whole: the configuration "
                f"of {plain_class(self).__name__} cannot be read "
                f"({self._config_before}). Expected a class with `get_config`; "
                "`save_adapters` saves the adapters alone, `save_weights` all "
                "weights."
            ) from self._config_before
        return {"base": self._config_before, **describe_adapters(self)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        from keras_spectral.saving.adapter_file import adapt_as_described

        load = keras.saving.deserialize_keras_object
        model = load(config["base"], custom_objects)
        return adapt_as_described(model, config)

    def save_to_preset(self, *args, **kwargs):
        raise ValueError(
            f"Model '{self.name}' has adapters, and no preset can hold them. "
            "Save the base inside of `with ks.unwrapped(model):` or the merged "
            "model inside of `with ks.merged(model):`, and the adapters by "
            "`ks.save_adapters(model, path)`."
        )


def plain_class(model: keras.Model) -> type:
    """A model's class without what adapters add to it."""
    return vars(type(model)).get("_plain_class", type(model))


def config_before(model: keras.Model) -> dict | Exception | None:
    """A plain model's configuration; None if its layers' own are enough."""
    if isinstance(model, Rebuilt):
        return model._config_before
    if surgery.is_plain_graph(plain_class(model)):
        return None
    try:
        config = keras.saving.serialize_keras_object(model)
    except Exception as error:
        return error
    config.pop("compile_config", None)  # the whole model has its own
    return config


def set_classes(models: dict[keras.Model, dict | Exception | None]) -> None:
    """Gives models the class that fits what is in them now.

    Args:
        models: For each the configuration that it had without adapters.
    """
    for model, config in models.items():
        kind = plain_class(model)
        if any(isinstance(x, Host) for x in all_layers(model)):
            kind = _adapted_class(kind, config is not None)
            vars(model)["_config_before"] = config
        if type(model) is not kind:
            object.__setattr__(model, "__class__", kind)


def _adapted_class(kind, rebuilt):
    if kind not in _CLASSES:
        mixin = Rebuilt if rebuilt else Adapted
        # Keras saves its own class by its public name.
        module = "keras" if kind is keras.Sequential else kind.__module__
        body = {"__module__": module, "__doc__": kind.__doc__}
        body["_plain_class"] = kind
        _CLASSES[kind] = type(kind.__name__, (mixin, kind), body)
        if rebuilt:
            # All these classes share `from_config`, so the last one stands
            # for every one of them.
            register = keras.saving.register_keras_serializable
            register(_PACKAGE, _NAME)(_CLASSES[kind])
    return _CLASSES[kind]


# A file may be loaded before any model was wrapped here.
keras.saving.register_keras_serializable(_PACKAGE, _NAME)(Rebuilt)
