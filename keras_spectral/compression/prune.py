"""Models with fewer weights: zeros, zeros in a pattern, fewer channels."""

import re

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_number
from keras_spectral.compression.channels import without_channels
from keras_spectral.compression.choice import kernel_places
from keras_spectral.compression.masks import hold
from keras_spectral.compression.own_numbers import in_kernel_shape
from keras_spectral.compression.own_numbers import own_numbers
from keras_spectral.compression.saved import copy_model
from keras_spectral.compression.sparsity import most_important
from keras_spectral.compression.sparsity import n_of_m_mask
from keras_spectral.kernels import kernel_view
from keras_spectral.model.paths import places
from keras_spectral.model.select import Target

_EXPECTED = "'magnitude', 'channels' or a pattern such as '2:4'"


def prune_model(
    model: keras.Model,
    share: float | None = None,
    method: str = "magnitude",
    *,
    scope: str = "layer",
    target: Target | None = None,
    exclude: Target | None = None,
) -> keras.Model:
    """Returns a copy of a model without its least important weights.

    - `"magnitude"`: the smallest weights are zero,
      `K_ij [ |K_ij| is among the largest ]`. The zeros stay in later
      training, by a constraint of the kernel (see `keep_zeros`);
    - `"2:4"`, or any `"n:m"`: the n largest of each m weights stay that
      follow one another in a column, zeros elsewhere, held likewise;
    - `"channels"`: units and filters with the smallest L1 norms are removed,
      from the layer, from batch norms behind it, and from the inputs of the
      layers that follow. What is left is a smaller, faster model of the same
      plain layers.

    Zeros save bytes in compressed files alone, and time on hardware that
    skips them. Train it further by `fit`; several rounds with a growing share
    lose least. A pruned model may be wrapped (its base is frozen); after
    `merge_model` call `keep_zeros`, which takes out what the adapter has
    filled in. Both halves of a `LowRank` layer are pruned, each by itself.

    Source: magnitude: Han et al. 2015, arXiv 1506.02626; channels: Li et al.
    2017, arXiv 1608.08710.

    Args:
        model: A built model that can be saved; for `"channels"` a sequential
            or functional one. It stays as it is.
        share: Of weights or channels to remove, above 0 and below 1. None for
            patterns, which say it themselves.
        method: `"magnitude"`, `"channels"` or a pattern.
        scope: For `"magnitude"`: `"layer"`, the share of each kernel, or
            `"model"`, that of all together.
        target: Which layers, as for `wrap_model`. Defaults to all kernels but
            embeddings, and of channels to all that can be removed.
        exclude: Which layers not; the same forms.

    Raises:
        ValueError: A bad option; nothing to prune; adapters or quantised
            kernels in the model; a kernel that something else holds as well;
            channels whose consumers are not known, or that are outputs.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(8, name="hidden"),
    ...      keras.layers.Dense(2, name="head")]
    ... )
    >>> sparse = ks.prune_model(model, 0.75, target="hidden")
    >>> int(keras.ops.sum(sparse.get_layer("hidden").kernel != 0))
    16
    >>> ks.prune_model(model, 0.5, "channels").get_layer("hidden").units
    4
    """
    pattern = _pattern(method)
    _check_share(share, method, pattern)
    check_choice(scope, "scope", ("layer", "model"))
    if method == "channels":
        return without_channels(model, share, target, exclude)
    chosen = kernel_places(model, target, exclude)
    wanted = {id(place.layer) for place in chosen}
    layers = [place.layer for place in places(model)]
    numbers = [i for i, layer in enumerate(layers) if id(layer) in wanted]
    copy = copy_model(model)
    copies = [place.layer for place in places(copy)]
    views = [kernel_view(copies[i]) for i in numbers]
    kernels = [own_numbers(view) for view in views]
    if pattern is not None:
        masks = [n_of_m_mask(kernel, *pattern) for kernel in kernels]
    else:
        masks = _magnitude_masks(kernels, share, scope)
    for view, mask in zip(views, masks):
        mask = ops.convert_to_numpy(in_kernel_shape(view, mask)) != 0
        hold(view, mask)
    return copy


def _magnitude_masks(kernels, share, scope):
    scores = [np.abs(kernel) for kernel in kernels]
    if scope == "layer":
        return [most_important(x, share) for x in scores]
    sizes = np.cumsum([x.size for x in scores])
    kept = most_important(np.concatenate([x.ravel() for x in scores]), share)
    parts = np.split(kept, sizes[:-1])
    return [part.reshape(x.shape) for part, x in zip(parts, scores)]


def _pattern(method):
    """n and m of a pattern, None for the other methods."""
    found = re.fullmatch(r"(\d+):(\d+)", method) if _is_text(method) else None
    if found is None and method not in ("magnitude", "channels"):
        raise ValueError(f"Received method={method!r}. Expected {_EXPECTED}.")
    pattern = tuple(map(int, found.groups())) if found else None
    if pattern and not 0 < pattern[0] < pattern[1]:
        raise ValueError(
            f"Received method={method!r}. Expected n:m with n weights of m "
            "that stay, 0 < n < m, such as '2:4'."
        )
    return pattern


def _is_text(method):
    return isinstance(method, str)


def _check_share(share, method, pattern):
    if pattern is None:
        if not 0 < check_number(share, "share", 0, 1):
            raise ValueError("Received share=0. Expected a number above 0.")
    elif share is not None:
        raise ValueError(
            f"Received share={share!r} with method={method!r}, which "
            "fixes how many weights stay. Expected share=None."
        )
