"""A wrapped model as something else for a moment."""

import contextlib
from collections.abc import Iterator

import keras

from keras_spectral import surgery
from keras_spectral.layers import DecayingLoRA
from keras_spectral.wrap import require_adapters


@contextlib.contextmanager
def unwrapped(model: keras.Model) -> Iterator[keras.Model]:
    """The plain base model for as long as the block lasts.

    Inside, the very base layers are in place, so that plain checkpoints are
    saved, loaded or exported. Not for training.

    Raises:
        ValueError: The model has no adapters.
    """
    with _bases_in_place(model, require_adapters(model)):
        yield model


@contextlib.contextmanager
def merged(model: keras.Model) -> Iterator[keras.Model]:
    """The merged plain model for as long as the block lasts.

    Inside, plain layers with the corrections folded in are in place, to be
    saved, exported or timed. Afterwards the adapters are back and the base
    weights are bit for bit what they were. Not for training.

    Raises:
        ValueError: As `merge_model` does; nothing has changed then.
    """
    adapters = require_adapters(model)
    for adapter in adapters:
        adapter.merged_matrix()
    weights = [w for adapter in adapters for w in adapter.layer.weights]
    values = [keras.ops.copy(weight) for weight in weights]
    try:
        for adapter in adapters:
            adapter.merge()
        with _bases_in_place(model, adapters):
            yield model
    finally:
        for weight, value in zip(weights, values):
            weight.assign(value)


@contextlib.contextmanager
def _bases_in_place(model, adapters):
    models = surgery.replace_layers(model, {a: a.layer for a in adapters})
    for adapter in adapters:
        adapter.release()
    surgery.forget_compiled(models)
    try:
        yield
    finally:
        models = surgery.replace_layers(model, {a.layer: a for a in adapters})
        for adapter in adapters:
            adapter.hold()
        surgery.forget_compiled(models)


@contextlib.contextmanager
def adapters_disabled(model: keras.Model) -> Iterator[keras.Model]:
    """The base model's outputs for as long as the block lasts, no retrace.

    Only with a SoftPrompt, which changes shapes, compiled functions are
    dropped.

    Raises:
        ValueError: The model has no adapters.
    """
    active = [a for a in require_adapters(model) if not a.disabled]
    scales = [float(adapter.scale) for adapter in active]
    for adapter in active:
        adapter.scale.assign(0.0)
        adapter.disabled = True
    retraced = [model] if any(a.retraces for a in active) else []
    surgery.forget_compiled(retraced)
    try:
        yield model
    finally:
        for adapter, scale in zip(active, scales):
            adapter.scale.assign(scale)
            adapter.disabled = False
        surgery.forget_compiled(retraced)


@contextlib.contextmanager
def adapters_alone(model: keras.Model) -> Iterator[keras.Model]:
    """What the DecayingLoRA pairs do without their originals, no retrace.

    For as long as the block lasts, inference leaves the originals out.

    Raises:
        ValueError: The model has no DecayingLoRA.
    """
    adapters = require_adapters(model, DecayingLoRA)
    before = [float(adapter.alone) for adapter in adapters]
    for adapter in adapters:
        adapter.alone.assign(1.0)
    try:
        yield model
    finally:
        for adapter, value in zip(adapters, before):
            adapter.alone.assign(value)
