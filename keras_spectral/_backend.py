"""What Keras offers no way to do: the one file that imports a backend."""

import contextlib

import keras


def eagerly() -> contextlib.AbstractContextManager:
    """Runs what is inside now, even while a TensorFlow graph is traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def concretely() -> contextlib.AbstractContextManager:
    """Runs what is inside on numbers that are there, whatever is traced."""
    if keras.backend.backend() != "jax":
        return eagerly()
    import jax

    return jax.ensure_compile_time_eval()


def scope_of(model: keras.layers.Layer) -> contextlib.AbstractContextManager:
    """The scope of the TensorFlow strategy that a model was built under."""
    strategy = getattr(model, "distribute_strategy", None)
    if keras.backend.backend() != "tensorflow" or strategy is None:
        return contextlib.nullcontext()
    return strategy.scope()


def is_training(training) -> bool:
    """Whether a call trains; a ValueError where JAX hides it.

    `keras.RematScope` traces the arguments of what it computes anew, so that
    nothing inside can ask whether it trains (Keras's Dropout neither).
    """
    try:
        return bool(training)
    except Exception as error:
        raise ValueError(
            "This adapter does something else while training, and a "
            "`keras.RematScope` hides from it whether it trains. Expected "
            "`keras.RematScope(mode='list_of_layers', layer_names=[...])` "
            "with layers that hold no adapters, or an adapter without dropout."
        ) from error
