"""Copies of models by what Keras would write into a file, without the file."""

import json

import keras
from keras import ops
from keras.src.saving import saving_lib
from keras.src.saving.serialization_lib import ObjectSharingScope


def copied(model: keras.Model, known: dict[str, type]) -> keras.Model:
    """An equal model with weights and assets of its own.

    Weights go from layer to layer, so that no more than one of them is held
    beside the two models.

    Args:
        model: A model that Keras can save.
        known: Classes of its layers, by name.
    """
    with ObjectSharingScope():
        config = keras.saving.serialize_keras_object(model)
    config = json.loads(json.dumps(config))
    config.pop("compile_config", None)
    with ObjectSharingScope():
        copy = keras.saving.deserialize_keras_object(
            config, known, safe_mode=False
        )
    weights = _Handed()
    assets = saving_lib.DiskIOStore("assets", mode="w")
    failed, errors = set(), {}
    try:
        saving_lib._save_state(model, weights, assets, "", set())
        saving_lib._load_state(
            copy, weights, assets, "", False, set(), failed, errors
        )
    finally:
        assets.close()
    if failed:
        saving_lib._raise_loading_failure(errors)
    return copy


class _Handed(saving_lib.NpzIOStore):
    """In the place of a file: what layers save, by their paths."""

    def __init__(self):
        self.contents = {}

    def make(self, path, metadata=None):
        return self.contents.setdefault(path, {})

    def get(self, path):
        entry = self.contents.get(path, {})
        return {name: _own(value) for name, value in entry.items()}


def _own(value):
    """A value that no variable holds: JAX gives buffers away in training."""
    return ops.copy(value) if isinstance(value, keras.Variable) else value
