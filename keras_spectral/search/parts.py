"""Which parts of UniPELT blocks are worth keeping."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.evaluate import check_data
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.blocks import UniPELTBlock
from keras_spectral.blocks.unipelt import LOW_GATE
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.convert import drop
from keras_spectral.model.convert import exchange
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import require_adapters
from keras_spectral.model.hosts import require_plain
from keras_spectral.model.merge import unwrap_model
from keras_spectral.model.wrap import wrap_model

# The option that gives each part its size.
_OPTIONS = {"lora": "lora", "prefix": "prefix", "adapter": "bottleneck"}
Parts = dict[str, tuple[str, ...]]


def collect_gates(
    model: keras.Model, inputs: Any
) -> dict[str, dict[str, np.ndarray]]:
    """The gates of every example of a batch.

    Args:
        model: A model wrapped with "unipelt".
        inputs: One batch, as the model is called on it.

    Returns:
        For each block's path and each gate's name an array (examples,); of a
        block that runs several times all of them, one after the other.

    Raises:
        ValueError: The model has no UniPELTBlock, or the batch no example.
    """
    blocks = require_adapters(model, UniPELTBlock)
    check_data(inputs, "inputs")
    for block in blocks:
        block.collected = []
    try:
        model(inputs, training=False)
        return {
            place.path: dict(zip(place.layer.gate_names, _columns(place.layer)))
            for place in adapter_places(model, UniPELTBlock)
        }
    finally:
        for block in blocks:
            block.collected = None


def prune_parts(
    model: keras.Model,
    steps: int = 1000,
    threshold: float = LOW_GATE,
    keep_weights: bool = False,
) -> dict[str, Any]:
    """Removes the parts of UniPELT blocks whose gates are closed.

    A part goes if each of its gates, as a mean over the batch, has stayed
    below 0.05 for the last `steps` training steps; with `steps=0` if the
    mean of its gates since `reset_gates` is below `threshold`. A block
    without a part left loses its adapter. The others keep their weights.

    Args:
        model: A model wrapped with "unipelt".
        steps: Training steps, or 0.
        threshold: Gates below it count as closed with `steps=0`.
        keep_weights: Whether to return the weights of removed parts.

    Returns:
        For each path of a changed block the names of the removed parts, or
        with `keep_weights` `{part: {weight's name: array}}`.

    Raises:
        ValueError: The model has no UniPELTBlock; every part of every block
            would go; the adapters are switched off. Nothing has changed then.
    """
    check_whole(steps, "steps")
    check_number(threshold, "threshold", 0)
    check_flag(keep_weights, "keep_weights")

    def stays(block):
        closed = _closed_gates(block, steps, threshold)
        return [
            part
            for part in block.parts
            if not all(closed[n] for n in closed if n.split("_")[0] == part)
        ]

    kept, removed = {}, {}
    for place in _active_places(model):
        block = place.layer
        kept[block] = tuple(stays(block))
        gone = [part for part in block.parts if part not in kept[block]]
        if gone:
            weights = {part: _weights_of(block, part) for part in gone}
            removed[place.path] = weights if keep_weights else tuple(gone)
    _keep_parts(model, kept)
    return removed


def search_parts(
    model: keras.Model,
    dataset: Any,
    epochs: int = 3,
    keep: float | None = None,
    latency: float = 0.01,
    temperature: float = 1.0,
    gate: str = "sigmoid",
    **options,
) -> Parts:
    """Finds the parts of UniPELT that each block needs (AutoPELT).

    The model is wrapped with "unipelt" and trained with `gate="gumbel"`:
    each part is drawn on or off in every step, by a probability that is
    trained as well, and `latency` times the parts' share of the added work
    joins the loss. Then the parts that are more probable than not are kept,
    with their weights, or the most probable ones that fit into a share
    `keep` of the added weights. Their gates become those of `gate`. Train on
    to finish.

    Args:
        model: A plain model that is compiled.
        dataset: What `model.fit` takes as first argument, or a tuple `(x, y)`
            or `(x, y, sample_weight)`.
        epochs: Epochs of the search.
        keep: The largest share of added weights to keep, above 0 and at most
            1, or None.
        latency: Weight of the added work in the loss.
        temperature: Softness of the draws.
        gate: The gates of the result, `"sigmoid"` or `"softmax"`.
        **options: Further options of UniPELTBlock, such as `lora=8`.

    Returns:
        The kept parts of each block, by path.

    Raises:
        ValueError: The model is wrapped or not compiled, a bad option, or no
            part would be kept. The model is then plain, as it was.
    """
    check_choice(gate, "gate", ("sigmoid", "softmax"))
    if keep is not None and not 0 < check_number(keep, "keep") <= 1:
        raise ValueError(
            f"Received keep={keep!r}. Expected a number above 0 and at most 1, "
            "or None."
        )
    check_rank(epochs, "epochs")
    check_number(latency, "latency", 0)
    check_free(options, ("penalty", "sparsity"), "latency")
    check_ready(model)
    check_data(dataset)
    wrap_model(
        model,
        "unipelt",
        gate="gumbel",
        penalty="latency",
        sparsity=latency,
        temperature=temperature,
        **options,
    )
    try:
        fit(model, dataset, epochs)
        found = adapter_places(model, UniPELTBlock)
        kept = _most_probable([place.layer for place in found], keep)
        chosen = {place.path: kept[place.layer] for place in found}
        _keep_parts(model, kept, gate=gate, penalty="entropy", sparsity=None)
    except Exception:
        unwrap_model(model)
        raise
    return chosen


def _active_places(model):
    for adapter in require_adapters(model, UniPELTBlock):
        adapter.check_active()
    return adapter_places(model, UniPELTBlock)


def check_ready(model: keras.Model) -> None:
    """Raises a ValueError unless the model is plain and compiled."""
    require_plain(model)
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"Model '{model.name}' is not compiled. Expected "
            "`model.compile(optimizer, loss, metrics)` first."
        )


def check_free(
    options: dict[str, Any], taken: tuple[str, ...], instead: str
) -> None:
    """Raises a ValueError if options hold what a search chooses itself."""
    given = [name for name in taken if name in options]
    if given:
        raise ValueError(
            f"Received the options {given}, which the search chooses itself. "
            f"Expected others of UniPELTBlock; see `{instead}`."
        )


def fit(model: keras.Model, dataset: Any, epochs: int) -> None:
    """Trains with a progress bar over epochs where it takes long."""
    data = dataset if isinstance(dataset, tuple) else (dataset,)
    with LateProgress("searching parts", epochs) as progress:
        callback = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: progress.advance(1)
        )
        model.fit(*data, epochs=epochs, verbose=0, callbacks=[callback])


def _columns(block):
    values = [ops.convert_to_numpy(gates) for gates in block.collected]
    return np.concatenate(values).T if values else [[]] * len(block.gate_names)


def _closed_gates(block, steps, threshold):
    """Whether each gate is closed, by name."""
    if steps:
        low = ops.convert_to_numpy(block.low_steps) >= steps
        return dict(zip(block.gate_names, low.tolist()))
    means = block.gate_statistics()
    return {name: mean < threshold for name, (mean, _) in means.items()}


def _weights_of(block, part):
    names = (part, f"gate_{part}")
    return {
        weight.name: ops.convert_to_numpy(weight)
        for weight in own_variables(block)
        if weight.trainable and weight.name.startswith(names)
    }


def _most_probable(blocks, keep):
    """The parts to keep of each block with gumbel gates."""
    logits = {
        (block, part): logit
        for block in blocks
        for part, logit in zip(
            block.parts, ops.convert_to_numpy(block.gates.logits).tolist()
        )
    }
    if keep is None:
        chosen = {key for key, logit in logits.items() if logit > 0}
    else:
        sizes = {key: key[0].parts[key[1]] for key in logits}
        left, chosen = keep * sum(sizes.values()), set()
        for key in sorted(logits, key=logits.get, reverse=True):
            if sizes[key] <= left:
                left -= sizes[key]
                chosen.add(key)
    return {
        block: tuple(part for part in block.parts if (block, part) in chosen)
        for block in blocks
    }


def _keep_parts(model, kept, **changes):
    """Rebuilds blocks with some of their parts and options changed."""
    if not any(kept.values()):
        raise ValueError(
            f"No part of any block of model '{model.name}' would be kept. "
            "Expected gates that leave some open; `unwrap_model` drops all."
        )

    def make(old):
        off = {_OPTIONS[part]: 0 for part in _OPTIONS if part not in kept[old]}
        new = UniPELTBlock(old.layer, **{**old.options(), **changes, **off})
        return new, lambda: _take_weights(new, old)

    touched = [
        block
        for block, parts in kept.items()
        if parts and (changes or len(parts) < len(block.parts))
    ]
    exchange(model, touched, make)
    drop(model, [block for block, parts in kept.items() if not parts])


def _take_weights(new, old):
    """Copies what the two blocks have in common."""
    values = {w.name: w for w in own_variables(old)}
    stay = [
        old.gate_names.index(n) for n in new.gate_names if n in old.gate_names
    ]
    for weight in own_variables(new):
        record = not weight.trainable  # of gates that may be others
        if weight.name not in values or (record and old.gate != new.gate):
            continue
        value = ops.convert_to_tensor(values[weight.name])
        if tuple(value.shape) != tuple(weight.shape):
            value = ops.take(value, stay, axis=-1)
        weight.assign(value)
