"""Compiling one model as another one is."""

import keras

from keras_spectral._internal.optimizers import renewed


def compile_like(model: keras.Model, other: keras.Model) -> None:
    """Compiles a model with a fresh optimizer and fresh metrics of another.

    Raises:
        ValueError: The other one is not compiled.
    """
    check_compiled(other)
    config = dict(other._compile_config.config)
    config["optimizer"] = renewed(other.optimizer)
    for name in ("metrics", "weighted_metrics"):
        config[name] = keras.tree.map_structure(_fresh, config[name])
    model.compile(**config)


def check_compiled(model: keras.Model) -> None:
    """Raises a ValueError unless a model has a loss and an optimizer."""
    if not getattr(model, "compiled", False) or model.loss is None:
        raise ValueError(
            f"Model '{model.name}' is not compiled with a loss. Expected one "
            "that is: `model.compile(optimizer, loss)`."
        )


def _fresh(metric):
    """A metric of the same kind without counts; names stay names."""
    if isinstance(metric, keras.metrics.Metric):
        return type(metric).from_config(metric.get_config())
    return metric
