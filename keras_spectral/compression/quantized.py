"""Weights of few bits: codebooks, and training with rounded kernels."""

import keras

from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.compression.choice import kernel_places
from keras_spectral.compression.quantized_layer import Clustered
from keras_spectral.compression.quantized_layer import FakeQuantized
from keras_spectral.compression.quantized_layer import QuantizedKernel
from keras_spectral.compression.saved import copy_model
from keras_spectral.model.hosts import put
from keras_spectral.model.paths import places
from keras_spectral.model.select import Target


def cluster_weights(
    model: keras.Model,
    bits: int = 4,
    *,
    target: Target | None = None,
    exclude: Target | None = None,
) -> keras.Model:
    """Returns a copy of a model whose kernels take few values each.

    `K_ij = c[q_ij]`: k-means finds the codebook c of `2^bits` values, one
    for each kernel, and the numbers q. In `fit` codebooks train, and numbers
    stay; everything else trains as before. `finalize_quantized` then makes a
    plain model that holds these values. Codes of `bits` bits save bytes in a
    compressed file; products run in floating point as before. For integers
    in memory and in products there is Keras's `model.quantize("int8")`.

    Source: Han et al. 2016, arXiv 1510.00149.

    Args:
        model: A built model that can be saved; it stays as it is.
        bits: 1 to 8.
        target: Which layers, as for `wrap_model`. Defaults to all kernels but
            embeddings; halves of a `LowRank` layer count by themselves.
        exclude: Which layers not; the same forms.

    Raises:
        ValueError: A bad option; nothing matches; adapters or quantised
            kernels in the model; a kernel that something else holds as well.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden")]
    ... )
    >>> small = ks.finalize_quantized(ks.cluster_weights(model, bits=2))
    >>> kernel = keras.ops.convert_to_numpy(small.get_layer("hidden").kernel)
    >>> len(set(kernel.ravel().tolist()))
    4
    """
    check_whole(bits, "bits", 1, 9)
    return _with(Clustered, model, bits, target, exclude)


def fake_quantize(
    model: keras.Model,
    bits: int = 8,
    *,
    target: Target | None = None,
    exclude: Target | None = None,
) -> keras.Model:
    """Returns a copy of a model that trains with rounded kernels.

    `K'_ij = s_j round(K_ij / s_j)`, with a step s_j for each column, so that
    its largest weight is `2^(bits - 1) - 1` steps: quantisation-aware
    training. Kernels train on behind it, with gradients that pass as if
    nothing were rounded. `finalize_quantized` then makes a plain model that
    holds the rounded kernels. With 8 bits Keras's `model.quantize("int8")`
    has the same steps, so that it stores a finished Dense exactly; without
    training, use that alone.

    Source: Jacob et al. 2018, arXiv 1712.05877; Bengio et al. 2013, arXiv
    1308.3432.

    Args:
        model: A built model that can be saved; it stays as it is.
        bits: 2 to 8.
        target: Which layers, as for `wrap_model`. Defaults to all kernels but
            embeddings; halves of a `LowRank` layer count by themselves.
        exclude: Which layers not; the same forms.

    Raises:
        ValueError: A bad option; nothing matches; adapters or quantised
            kernels in the model; a kernel that something else holds as well.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((16,)), keras.layers.Dense(8, name="hidden")]
    ... )
    >>> trainer = ks.fake_quantize(model, bits=4)
    >>> trainer.compile("sgd", "mse")
    >>> data = keras.ops.ones((4, 16)), keras.ops.ones((4, 8))
    >>> history = trainer.fit(*data, verbose=0)
    >>> small = ks.finalize_quantized(trainer)
    """
    check_whole(bits, "bits", 2, 9)
    return _with(FakeQuantized, model, bits, target, exclude)


def finalize_quantized(model: keras.Model) -> keras.Model:
    """Turns the layers of `cluster_weights` or `fake_quantize` plain, in place.

    Returns:
        The model, whose kernels hold the values that it ran with. They are
        ordinary kernels: later training moves them freely.

    Raises:
        ValueError: The model has no such layers.

    Example: see `cluster_weights`.
    """
    found = []
    if isinstance(model, keras.Model):
        found = [
            place.layer
            for place in places(model)
            if isinstance(place.layer, QuantizedKernel)
        ]
    if not found:
        raise ValueError(
            f"Received {model!r}. Expected a model that `cluster_weights` or "
            "`fake_quantize` has returned."
        )
    with all_or_nothing() as snapshot:
        snapshot.keep_values(layer.view.variable() for layer in found)
        for layer in found:
            layer.view.variable().assign(layer.quantized_kernel())
        put(model, {layer: layer.layer for layer in found}, snapshot)
        for layer in found:
            layer.view.variable().trainable = layer.layer.trainable
    return model


def _with(kind, model, bits, target, exclude):
    chosen = {id(p.layer) for p in kernel_places(model, target, exclude)}
    numbers = [i for i, p in enumerate(places(model)) if id(p.layer) in chosen]
    copy = copy_model(model)
    copies = [place.layer for place in places(copy)]
    swaps = {}
    for layer in (copies[i] for i in numbers):
        swaps[layer] = kind(layer, bits)
        swaps[layer].build(layer.get_build_config()["input_shape"])
        if not layer.trainable:
            swaps[layer].trainable = False
    with all_or_nothing() as snapshot:
        put(copy, swaps, snapshot)
    return copy
