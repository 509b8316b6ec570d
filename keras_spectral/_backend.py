"""What Keras offers no way to do: the one file that imports a backend."""

import contextlib

import keras


def eagerly() -> contextlib.AbstractContextManager:
    """Runs what is inside now, even while a TensorFlow graph is traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def scope_of(model: keras.layers.Layer) -> contextlib.AbstractContextManager:
    """The scope of the TensorFlow strategy that a model was built under."""
    strategy = getattr(model, "distribute_strategy", None)
    if keras.backend.backend() != "tensorflow" or strategy is None:
        return contextlib.nullcontext()
    return strategy.scope()
