"""MeanWeights: IVON's means wherever a model is looked at."""

import keras

from keras_spectral.optimizers import IVON


class MeanWeights(keras.callbacks.Callback):
    """Puts IVON's means in for validation, checkpoints and the end.

    While a model trains with IVON, its weights are samples. This puts their
    means in before validation and at the end of each epoch, so that
    callbacks behind it in the list (checkpoints) save them; each epoch
    begins with a fresh sample. After training the model holds the means.

    Raises:
        ValueError: At the start of training, if the optimizer is not IVON.

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
        optimizer = getattr(self.model, "optimizer", None)
        if not isinstance(optimizer, IVON):
            raise ValueError(
                f"Model '{self.model.name}' is compiled with "
                f"{type(optimizer).__name__}. Expected IVON."
            )

    def on_epoch_begin(self, epoch, logs=None):
        if self.model.optimizer.built:
            self.model.optimizer.sample()

    def on_test_begin(self, logs=None):
        self.model.optimizer.use_mean()

    def on_epoch_end(self, epoch, logs=None):
        self.model.optimizer.use_mean()
