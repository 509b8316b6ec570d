"""TransferMonitor: how far low-rank pairs have taken over, epoch by epoch."""

import warnings
from typing import Any

import keras

from keras_spectral._internal.evaluate import evaluate
from keras_spectral.layers import DecayingLoRA
from keras_spectral.model.contexts import adapters_alone
from keras_spectral.model.hosts import require_adapters

_NO_STEPS = (
    " No step was counted: the `call` of your own model has to take `training` "
    "and, on JAX, to pass it to its layers."
)


class TransferMonitor(keras.callbacks.Callback):
    """Evaluates the pairs of DecayingLoRA without their originals.

    At the end of each epoch the logs of `fit` gain `decay`, the mean factor
    of the originals, and with `validation_data` the loss and every metric of
    the pairs alone as `val_adapter_loss`, `val_adapter_accuracy` and so on,
    and, where `fit` has no validation data of its own, of original and pair
    together as `val_loss` and so on. At the end of training it warns if the
    factor never moved. `plots.plot_transfer` draws the curves.

    Args:
        validation_data: What `model.evaluate` takes as first argument, or a
            tuple `(x, y)` or `(x, y, sample_weight)`.

    Raises:
        ValueError: At the start of training, if the model has no
            DecayingLoRA.

    Example:

    >>> import numpy as np
    >>> import keras_spectral as ks
    >>> layer = ks.DecayingLoRA(keras.layers.Dense(4), rank=2, end_step=2)
    >>> model = keras.Sequential([keras.Input((3,)), layer])
    >>> model.compile("sgd", "mse")
    >>> data = np.ones((2, 3)), np.ones((2, 4))
    >>> history = model.fit(
    ...     *data, epochs=3, verbose=0,
    ...     callbacks=[ks.callbacks.TransferMonitor(data)],
    ... ).history
    >>> sorted(history), history["decay"]
    (['decay', 'loss', 'val_adapter_loss', 'val_loss'], [0.5, 0.0, 0.0])
    """

    def __init__(self, validation_data: Any = None):
        super().__init__()
        self.validation_data = validation_data

    def on_train_begin(self, logs=None):
        self._start = self._decay()

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        logs["decay"] = self._decay()
        if self.validation_data is None:
            return
        if not any(name.startswith("val_") for name in logs):
            logs.update(self._evaluate("val_"))
        with adapters_alone(self.model):
            logs.update(self._evaluate("val_adapter_"))

    def on_train_end(self, logs=None):
        adapters = self._adapters()
        ended = all(a.decay_factor() <= a.min_decay for a in adapters)
        if self._decay() == self._start and not ended:
            begin = min(adapter.start_step for adapter in adapters)
            steps = int(adapters[0].step)
            warnings.warn(
                "The originals of DecayingLoRA did not fade: their factor is "
                f"still {self._start:g} after {steps} training steps, and the "
                f"decay begins at start_step={begin}."
                + ("" if steps else _NO_STEPS),
                stacklevel=2,
            )

    def _adapters(self):
        return require_adapters(self.model, DecayingLoRA)

    def _decay(self):
        factors = [adapter.decay_factor() for adapter in self._adapters()]
        return sum(factors) / len(factors)

    def _evaluate(self, prefix):
        results = evaluate(self.model, self.validation_data)
        return {prefix + name: value for name, value in results.items()}
