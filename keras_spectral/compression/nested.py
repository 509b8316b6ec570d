"""Compressed models whose ranks change at run time."""

import math
import random

import keras

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.layer_tools import all_layers
from keras_spectral.compression.pairs import low_rank_layer
from keras_spectral.compression.saved import plain_config
from keras_spectral.compression.saved import put_low_rank
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view
from keras_spectral.model import surgery
from keras_spectral.model import training
from keras_spectral.model.hosts import require_plain


def nest_ranks(
    small: keras.Model,
    lowest: float = 0.25,
    whole: float = 0.5,
    seed: int | None = None,
) -> keras.Model:
    """Makes a compressed model train at several ranks at once, in place.

    Of the training steps a share `whole` runs as before. In the others a
    share s between `lowest` and 1 is drawn, and each `LowRank` layer uses the
    first `s r` of its r codes alone, so that the first ones learn to do
    without the last. `set_rank` then chooses, as often as you like, how much
    of the one model to run. The loss that falls is, on average,

    `whole L(1) + (1 - whole) E_s L(s)`.

    A step costs what it did: what is not drawn is multiplied by zero, so that
    nothing is traced again.

    Source: Yaguchi et al. 2019 (Decomposable-Net), arXiv 1910.13141, with
    one draw a step for the sum of two losses; the first codes are those of
    the largest singular values.

    Args:
        small: What `compress_model` returned, for example. Compile it after
            this.
        lowest: The smallest share, from 0 (a single code) to below 1.
        whole: How many steps are at full rank, from 0 to below 1.
        seed: Integer seed of what is drawn.

    Returns:
        `small` itself.

    Raises:
        ValueError: A bad option; a model without `LowRank` layers, or with
            adapters.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((64,)), keras.layers.Dense(64, name="hidden"),
    ...      keras.layers.Dense(8, name="head")]
    ... )
    >>> small = ks.compress_model(model, 0.5, exclude="head")
    >>> small = nest_ranks(small, seed=0)
    >>> small.compile("adam", "mse")
    >>> data = keras.ops.ones((8, 64)), keras.ops.ones((8, 8))
    >>> history = small.fit(*data, verbose=0)
    >>> set_rank(small, 0.5)
    >>> small.get_layer("hidden").active_rank
    8
    """
    check_number(lowest, "lowest", 0, 1)
    check_number(whole, "whole", 0, 1)
    if check_seed(seed) is None:
        seed = random.randrange(2**31)  # one for all layers
    require_plain(small)
    swaps = {}
    for old in _factorised(small):
        new = LowRank(
            old.down,
            old.up,
            active_rank=old.active_rank,
            lowest=lowest,
            whole=whole,
            seed=int(seed),
            name=old.name,
            dtype=old.dtype_policy,
        )
        new.build(old.get_build_config()["input_shape"])
        new.trainable = old.trainable
        swaps[old] = new
    put_low_rank(small, swaps, plain_config(small, swaps))
    return small


def set_rank(small: keras.Model, share: float) -> None:
    """Runs a compressed model with the first of its codes alone.

    Each `LowRank` layer of rank r uses `ceil(share r)` codes from now on, in
    inference and in training, and takes as much less time; the others stay in
    memory and come back with `set_rank(small, 1.0)`. On PyTorch nothing is
    traced again, on JAX and TensorFlow the next step or prediction is, once.
    A model around this one, such as a `distiller`, has to be compiled again.

    A model that was not trained for it (`nest_ranks`) is as good as if it had
    been truncated further; so is one whose last training mixed the order of
    its codes, as `finalize_transfer` does with those of adapters. Moving
    averages, as BatchNormalization has them, are those of the ranks trained.

    Args:
        small: What `compress_model` returned, for example.
        share: Above 0 and at most 1.

    Raises:
        ValueError: A bad share; a model without `LowRank` layers; halves that
            are quantised, whose ranks are chosen before.

    Example: see `nest_ranks`.
    """
    if check_number(share, "share") <= 0 or share > 1:
        raise ValueError(
            f"Received share={share!r}. Expected a number above 0 and at most "
            "1: the part of each layer's rank to use."
        )
    layers = _factorised(check_model(small))
    for layer in layers:
        for half in (layer.down, layer.up):
            if kernel_view(half).quantized:
                raise ValueError(
                    f"Layer '{layer.name}' is quantised "
                    f"({half.quantization_mode}). Expected float halves: "
                    "choose the rank first, `finalize_ranks`, and quantise "
                    "then."
                )
    for layer in layers:
        layer.active_rank = math.ceil(share * layer.rank - 1e-9) or 1
    above = surgery.models_above(surgery.owners(small), layers)
    training.forget_compiled(above)


def finalize_ranks(small: keras.Model) -> keras.Model:
    """Drops the codes that `set_rank` left out, for good and in place.

    The layers become plain `LowRank` ones of the ranks in use, which train at
    these alone.

    Returns:
        `small` itself, with fewer weights.

    Raises:
        ValueError: A model without `LowRank` layers, or with adapters.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    >>> small = ks.compress_model(model, 0.5)
    >>> ks.set_rank(small, 0.5)
    >>> finalize_ranks(small).count_params()
    1088
    """
    require_plain(small)
    swaps = {}
    for old in _factorised(small):
        view = kernel_view(old)
        swaps[old] = low_rank_layer(view, *view.pair())
        swaps[old].trainable = old.trainable
    put_low_rank(small, swaps, plain_config(small, swaps))
    return small


def _factorised(model):
    """The `LowRank` layers of a model; a ValueError without any."""
    found = [x for x in all_layers(model) if isinstance(x, LowRank)]
    if not found:
        raise ValueError(
            f"Model '{model.name}' has no LowRank layers. Expected one that "
            "`compress_model` returned."
        )
    return found
