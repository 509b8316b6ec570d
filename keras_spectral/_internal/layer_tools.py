"""Single layers from inside: what Keras has no public names for."""

import inspect

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.stateless_scope import in_stateless_scope


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that a layer tracks directly, in tracking order."""
    return list(layer._layers)


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and everything below it, once each."""
    return list(layer._flatten_layers())


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights that a layer holds itself, not through sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def learned_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Those of its own weights that training changes, unless they are frozen.

    So not the running means of a norm.
    """
    return list(layer._trainable_variables)


def set_trainable(
    layer: keras.layers.Layer, flag: bool, weights: bool | list[bool]
) -> None:
    """Sets a layer's flag and those of its own weights, not its sublayers'.

    A weight that was created as non-trainable stays so.
    """
    if layer._trainable != flag:  # Keras is slow to set an attribute
        layer._trainable = flag
    own = layer._trainable_variables
    if isinstance(weights, bool):
        weights = [weights] * len(own)
    for variable, trainable in zip(own, weights):
        variable.trainable = trainable


def trainable_flags(layer: keras.layers.Layer) -> tuple[bool, list[bool]]:
    """The flags that `set_trainable` would restore."""
    return layer._trainable, [v.trainable for v in layer._trainable_variables]


def config_of_shared(layer: keras.layers.Layer) -> keras.layers.Layer | dict:
    """The entry of a `get_config` for a layer that others hold as well.

    While a whole model is saved, the layer itself: so Keras notes that it is
    shared, and restores the sharing. Else its configuration.
    """
    if get_global_attribute("shared_objects/id_to_config_map") is not None:
        return layer
    return keras.saving.serialize_keras_object(layer)


def take_signature(layer: keras.layers.Layer, base: keras.layers.Layer) -> None:
    """Lets a layer with a general `call` be called as another one is."""
    signature = inspect.signature(base.call)
    parameters = dict(signature.parameters)
    if "training" not in parameters:
        training = inspect.Parameter(
            "training", inspect.Parameter.KEYWORD_ONLY, default=None
        )
        parameters["training"] = training
    layer._call_signature = signature.replace(
        parameters=sorted(parameters.values(), key=lambda p: p.kind)
    )


def set_path(variable: keras.Variable, path: str) -> None:
    """Gives a new variable a path of its own."""
    variable._path = path


def takes_training(layer: keras.layers.Layer) -> bool:
    """Whether a layer's `call` has an argument `training`."""
    return bool(layer._call_has_training_arg)


def freeze(layer: keras.layers.Layer) -> None:
    """Freezes a layer and all below, hosts and what is in them excepted."""
    if getattr(layer, "is_host", False):
        return
    set_trainable(layer, False, False)
    for child in sublayers(layer):
        freeze(child)


def asks_shapes_only() -> bool:
    """Whether what is made now serves for its shape, and is made again later.

    So it is in a model that JAX builds within its first `fit`: variables get
    their numbers afterwards.
    """
    return in_stateless_scope()
