"""Copies of models, and how models with exchanged layers are saved."""

from collections.abc import Iterable

import keras

from keras_spectral._internal.copies import copied
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.kernels import LowRank
from keras_spectral.model import surgery
from keras_spectral.model.hosts import put
from keras_spectral.model.paths import places
from keras_spectral.model.select import without_halves

_PACKAGE, _NAME = "keras_spectral", "CompressedModel"


def copy_model(model: keras.Model) -> keras.Model:
    """An equal model with weights of its own, by what a file would hold.

    Raises:
        ValueError: Keras cannot restore the model from a file.
    """
    kinds = {type(place.layer) for place in places(model)} | {type(model)}
    try:
        return copied(model, {kind.__name__: kind for kind in kinds})
    except Exception as error:
        raise ValueError(
            f"Keras cannot restore model '{model.name}' "
            f"({type(model).__name__}) from a `.keras` file: {error} "
            "Expected one that `model.save` and `load_model` can handle; "
            "a class of your own needs `get_config`."
        ) from error


def ordered_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """All layers in tracking order; a factorised one counts as one.

    Names may change when a model is built again, the order does not.
    """
    return [place.layer for place in without_halves(places(model))]


def plain_config(
    model: keras.Model, layers: Iterable[keras.layers.Layer]
) -> dict | None:
    """The serialised model, if it cannot save factorised layers by itself.

    A model that is more than a graph of layers rebuilds its inner layers
    from its own configuration, which knows nothing of exchanged ones.

    Args:
        model: A plain model.
        layers: Those of its layers that are going to be exchanged.

    Raises:
        ValueError: The model's configuration cannot be read.
    """
    if isinstance(model, _Compressed):
        return model._config_before
    if {id(layer) for layer in layers} <= _graph_layers(model):
        return None
    try:
        config = keras.saving.serialize_keras_object(model)
    except Exception as error:
        raise ValueError(
            f"The configuration of model '{model.name}' cannot be read: "
            f"{error} Expected a class with `get_config`."
        ) from error
    config.pop("compile_config", None)  # the whole model has its own
    return config


def put_low_rank(
    model: keras.Model,
    swaps: dict[keras.layers.Layer, LowRank],
    config: dict | None,
) -> None:
    """Puts factorised layers in place, so that the model can be saved.

    Args:
        model: The model.
        swaps: `{layer: factorised layer}`.
        config: What `plain_config` gave for it. With it, the model gets a
            class of its own that saves factorised layers beside it.
    """
    with all_or_nothing() as snapshot:
        put(model, swaps, snapshot)
        if config is not None:
            snapshot.keep(model)
            _become_compressed(model, config)


class _Compressed:
    """The saved form of a model with exchanged inner layers.

    Its configuration holds that of the model before, and each factorised
    layer with its path.
    """

    def get_config(self):
        save = keras.saving.serialize_keras_object
        return {
            "base": self._config_before,
            "low_rank": [
                {"position": i, "layer": save(layer)}
                for i, layer in enumerate(ordered_layers(self))
                if isinstance(layer, LowRank)
            ],
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        load = keras.saving.deserialize_keras_object
        model = load(config["base"], custom_objects)
        plain = ordered_layers(model)
        swaps = {}
        for entry in config["low_rank"]:
            layer = load(entry["layer"], custom_objects)
            base = plain[entry["position"]]
            layer.build(base.get_build_config()["input_shape"])
            swaps[base] = layer
        with all_or_nothing() as snapshot:
            put(model, swaps, snapshot)
        return _become_compressed(model, config["base"])


def _become_compressed(model, config):
    """Gives a model the class that saves its factorised layers."""
    kind = type(model)
    if not issubclass(kind, _Compressed):
        kind = type(_NAME, (_Compressed, kind), {"__module__": __name__})
        # All these classes share `from_config`, so the last one stands for
        # every one of them.
        keras.saving.register_keras_serializable(_PACKAGE, _NAME)(kind)
        model.__class__ = kind
    object.__setattr__(model, "_config_before", config)
    return model


def _graph_layers(model):
    """Layers that plain graphs of layers save themselves."""
    found = set()
    if surgery.is_plain_graph(model):
        for layer in model.layers:
            found |= {id(layer)} | _graph_layers(layer)
    return found


# A file may be loaded before any model was compressed here.
keras.saving.register_keras_serializable(_PACKAGE, _NAME)(_Compressed)
