"""A quantised model with adapters that make up for what was lost."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.layers.lora import LoRADense
from keras_spectral.model.hosts import require_plain
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.select import select
from keras_spectral.model.wrap import wrap_model


def quantize_with_lora(
    model: keras.Model,
    mode: str = "int4",
    target: Any = "all-linear",
    *,
    rank: int = 8,
    rounds: int = 1,
    exclude: Any = None,
    **options,
) -> keras.Model:
    """Quantises a float model and wraps it with LoRAs that start by LoftQ.

    In each round of a layer with the kernel K the quantised kernel is
    `Q = quant(K - A B)` and A B the best pair of its rank for `K - Q`, so
    that `Q + A B` is as near to K as it gets; `adapter_summary` then says how
    far it is, without and with the adapters. The rest of the model is
    quantised by `model.quantize(mode)`. The model trains on as any wrapped
    one: QLoRA's way to fine-tune what does not fit into memory otherwise.

    Source: Li et al. 2023, arXiv 2310.08659, algorithm 1; QLoRA: Dettmers et
    al. 2023, arXiv 2305.14314.

    Args:
        model: A built float model without adapters.
        mode: What `model.quantize` takes: `"int8"` or `"int4"`.
        target: The layers that get adapters, as in `wrap_model`.
        rank: That of the pairs.
        rounds: How often Q and A B are made in turn, 1 to 5 in the paper.
        exclude: Layers without adapters, in the same forms.
        **options: Further arguments of `wrap_model`.

    Returns:
        The model, quantised and wrapped.

    Raises:
        ValueError: A bad option, adapters, a layer that Keras cannot
            quantise. The model's kernels are then what they were.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((64,)), keras.layers.Dense(32, name="hidden"),
    ...      keras.layers.Dense(8, name="head")]
    ... )
    >>> model = quantize_with_lora(model, "int4", "hidden", rank=4)
    >>> before, after = model.get_layer("hidden").start_errors
    >>> before > after > 0
    True
    """
    require_plain(model)
    check_choice(mode, "mode", ("int8", "int4"))
    check_rank(rank)
    check_whole(rounds, "rounds", 1)
    chosen = select(model, places(model), target, exclude, LoRADense)
    views = {p.path: kernel_view(subject(p.layer)) for p in chosen}
    for path, view in views.items():
        if view.quantized:
            raise ValueError(
                f"Layer '{path}' is quantised. Expected a float model; "
                "`wrap_model(..., initializer='loftq', original=...)` takes a "
                "quantised one."
            )
    originals = {
        path: ops.convert_to_numpy(view.matrix())
        for path, view in views.items()
    }
    with all_or_nothing() as snapshot:
        snapshot.keep_values(view.variable() for view in views.values())
        with LateProgress("quantising", len(views)) as progress:
            for path, view in views.items():
                rest = _without_pair(view, originals[path], mode, rank, rounds)
                view.assign(ops.convert_to_tensor(rest))
                progress.advance(1)
        model.quantize(mode)
    return wrap_model(
        model,
        "lora",
        [subject(place.layer) for place in chosen],
        rank=rank,
        initializer="loftq",
        original=originals,
        **options,
    )


def _without_pair(view, kernel, mode, rank, rounds):
    """The matrix whose quantisation a pair of a rank makes up for best."""
    rest = kernel
    for _ in range(rounds - 1):
        lost = kernel - _quantised(view.layer, rest, mode)
        a, b = view.factor(ops.convert_to_tensor(lost, "float32"), rank)
        rest = np.float32(kernel - ops.convert_to_numpy(ops.matmul(a, b)))
    return rest


def _quantised(layer, matrix, mode):
    """A matrix as a layer of the same kind would hold it, quantised."""
    copy = type(layer).from_config(layer.get_config())
    copy.build(layer.get_build_config()["input_shape"])
    kernel_view(copy).assign(ops.convert_to_tensor(matrix))
    copy.quantize(mode)
    return ops.convert_to_numpy(kernel_view(copy).matrix())
