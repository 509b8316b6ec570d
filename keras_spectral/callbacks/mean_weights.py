"""MeanWeights: IVON's means for validation and checkpoints."""

import keras

from keras_spectral.optimizers.predict import ivon_of


class MeanWeights(keras.callbacks.Callback):
    """Puts IVON's means in for validation, checkpoints and the end.

    While a model trains with IVON, its weights are samples. This puts their
    means in before validation and at the end of each epoch, so that
    callbacks behind it in the list (checkpoints) save them; each epoch
    begins with a fresh sample. After training the model holds the means.

    Raises:
        ValueError: At the start of training, if the optimizer is not IVON,
            alone or inside of a LossScaleOptimizer.

    Example:

    >>> import keras_spectral as ks
    >>> layer = keras.layers.Dense(1)
    >>> model = keras.Sequential([keras.Input((2,)), layer])
    >>> model.compile(ks.optimizers.IVON(0.1, ess=100), "mse")
    >>> data = keras.ops.ones((4, 2)), keras.ops.ones((4, 1))
    >>> history = model.fit(
    ...     *data, verbose=0, callbacks=[ks.callbacks.MeanWeights()])
    >>> mean, _ = model.optimizer.posterior(layer.kernel)
    >>> bool((keras.ops.convert_to_numpy(layer.kernel) == mean).all())
    True
    """

    def on_train_begin(self, logs=None):
        ivon_of(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        optimizer = ivon_of(self.model)
        if optimizer.built:
            optimizer.sample()

    def on_test_begin(self, logs=None):
        ivon_of(self.model).use_mean()

    def on_epoch_end(self, epoch, logs=None):
        ivon_of(self.model).use_mean()
