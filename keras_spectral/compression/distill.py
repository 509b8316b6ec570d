"""Training a compressed model towards the one it was made from."""

import keras

from keras_spectral.checks import check_number


def distiller(
    small: keras.Model,
    original: keras.Model,
    temperature: float = 2.0,
    label_weight: float = 0.5,
) -> keras.Model:
    """A model whose `fit` teaches a compressed model its original's outputs.

    The loss is `label_weight` times that of `compile` and the rest times
    `T^2 KL(softmax(z / T) || softmax(z' / T))`, with the logits z of the
    original and z' of the compressed model, at temperature T. Compile it and
    fit it as any model; the compressed one is trained in place.

    Source: Hinton et al. 2015, arXiv 1503.02531, by Keras's own
    `keras.distillation`.

    Args:
        small: What `compress_model` returned.
        original: The model it was made from. It is frozen: its weights stay,
            and its `trainable` becomes False.
        temperature: T, above 0; a higher one softens the original's outputs.
        label_weight: Weight of the labels' own loss, 0 to below 1.

    Returns:
        A `keras.distillation.Distiller`.

    Raises:
        ValueError: A bad option, or this Keras has no `keras.distillation`.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((32,)), keras.layers.Dense(32, name="hidden"),
    ...      keras.layers.Dense(4, name="logits")]
    ... )
    >>> small = ks.compress_model(model, 0.5, recover="train")
    >>> teacher = distiller(small, model)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> teacher.compile("adam", loss)
    >>> data = keras.ops.ones((8, 32)), keras.ops.ones((8,), "int32")
    >>> history = teacher.fit(*data, verbose=0)
    """
    check_number(temperature, "temperature", 1e-6)
    check_number(label_weight, "label_weight", 0, 1)
    if not hasattr(keras, "distillation"):
        raise ValueError(
            f"Keras {keras.__version__} has no `keras.distillation`. Expected "
            "a newer one, or train the compressed model on labels alone."
        )
    # Given by name, Keras 3.15 feeds the divergence logits for shares.
    loss = keras.distillation.LogitsDistillation(
        temperature, keras.losses.KLDivergence()
    )
    return keras.distillation.Distiller(
        original, small, loss, student_loss_weight=label_weight
    )
