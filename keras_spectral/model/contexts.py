"""A wrapped model as something else for a moment.

These blocks change the model for all threads.
"""

import contextlib
from collections.abc import Iterator

import keras

from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.layers import DecayingLoRA
from keras_spectral.model.hosts import Names
from keras_spectral.model.hosts import keep_all
from keras_spectral.model.hosts import members
from keras_spectral.model.hosts import require_adapters
from keras_spectral.model.hosts import require_names
from keras_spectral.model.hosts import taken_out
from keras_spectral.model.merge import fold_all
from keras_spectral.model.merge import warn_of_rounding
from keras_spectral.model.names import set_strengths


@contextlib.contextmanager
def unwrapped(
    model: keras.Model, *, adapter: Names = None
) -> Iterator[keras.Model]:
    """The plain base model for as long as the block lasts.

    Inside, the very base layers are in place, so that plain checkpoints are
    saved, loaded or exported. Not for training.

    Args:
        model: A wrapped model.
        adapter: The name of the adapter that is left out, or several; all by
            default.

    Raises:
        ValueError: The model has no adapters, or none of that name.
    """
    names = require_names(model, adapter)
    with taken_out(model, names):
        yield model


@contextlib.contextmanager
def merged(
    model: keras.Model, *, adapter: Names = None
) -> Iterator[keras.Model]:
    """The merged plain model for as long as the block lasts.

    Inside, plain layers with the changes folded in are in place, to be
    saved, exported or timed. Afterwards the adapters are back and the base
    weights are bit for bit what they were. Not for training.

    Args:
        model: A wrapped model.
        adapter: The name of the adapter that is folded in, or several; by
            default all that are active. The others are left out.

    Raises:
        ValueError: As `merge_model` does; nothing has changed then.
    """
    require_names(model, adapter)
    with all_or_nothing() as snapshot:
        warn_of_rounding(fold_all(model, snapshot, adapter))
        with taken_out(model):
            yield model
        snapshot.restore()


@contextlib.contextmanager
def adapters_disabled(model: keras.Model) -> Iterator[keras.Model]:
    """The base model's outputs for as long as the block lasts, no retrace.

    Its own heads are in place of those that were trained. Only with what
    changes shapes (SoftPrompt) or keeps averages of its own, compiled
    functions are dropped.

    Raises:
        ValueError: The model has no adapters.
    """
    require_adapters(model)
    found = members(model)
    before = [(member, member.current_strength()) for member in found]
    with all_or_nothing() as snapshot:
        keep_all(model, snapshot)
        set_strengths(model, [(member, 0.0) for member in found])
        for member in found:
            member.disabled = True
        try:
            yield model
        finally:
            for member in found:
                member.disabled = False
            set_strengths(model, before)
        snapshot.restore()


@contextlib.contextmanager
def adapters_alone(model: keras.Model) -> Iterator[keras.Model]:
    """Runs DecayingLoRA pairs without their originals, no retrace.

    For as long as the block lasts, inference leaves the originals out.

    Raises:
        ValueError: The model has no DecayingLoRA.
    """
    adapters = require_adapters(model, DecayingLoRA)
    with all_or_nothing() as snapshot:
        snapshot.keep_values(adapter.alone for adapter in adapters)
        for adapter in adapters:
            adapter.alone.assign(1.0)
        yield model
        snapshot.restore()
