"""A wrapped model as something else for a moment."""

import contextlib
from collections.abc import Iterator

import keras

from keras_spectral import surgery
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral._internal.snapshot import insist
from keras_spectral.layers import DecayingLoRA
from keras_spectral.layers.host import TrainedCopy
from keras_spectral.wrap import bases_in_place
from keras_spectral.wrap import fold_all
from keras_spectral.wrap import hosts
from keras_spectral.wrap import require_adapters
from keras_spectral.wrap import warn_of_rounding


@contextlib.contextmanager
def unwrapped(model: keras.Model) -> Iterator[keras.Model]:
    """The plain base model for as long as the block lasts.

    Inside, the very base layers are in place, so that plain checkpoints are
    saved, loaded or exported. Not for training.

    Raises:
        ValueError: The model has no adapters.
    """
    require_adapters(model)
    with bases_in_place(model):
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
    require_adapters(model)
    with all_or_nothing() as snapshot:
        warn_of_rounding(fold_all(model, snapshot))
    try:
        with bases_in_place(model):
            yield model
    finally:
        insist(snapshot.restore_values)


@contextlib.contextmanager
def adapters_disabled(model: keras.Model) -> Iterator[keras.Model]:
    """The base model's outputs for as long as the block lasts, no retrace.

    Its own heads are in place of those that were trained. The model is
    changed for all threads. Only with a SoftPrompt, which changes shapes,
    compiled functions are dropped.

    Raises:
        ValueError: The model has no adapters.
    """
    active = [a for a in require_adapters(model) if not a.disabled]
    copies = [x for x in hosts(model) if isinstance(x, TrainedCopy)]
    retraced = [model] if any(a.retraces for a in active) else []
    with all_or_nothing() as snapshot:
        snapshot.keep_values(adapter.scale for adapter in active)
        for copy in copies:
            snapshot.keep_values(surgery.own_variables(copy))
        snapshot.keep(*active)
        for adapter in active:
            adapter.scale.assign(0.0)
            adapter.disabled = True
        for copy in copies:
            copy.take_base()
        surgery.forget_compiled(retraced)
    try:
        yield model
    finally:
        insist(lambda: _enable(active, snapshot, retraced))


def _enable(active, snapshot, retraced):
    snapshot.restore_values()
    for adapter in active:
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
