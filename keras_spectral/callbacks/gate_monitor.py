"""GateMonitor: how many spectral gates are open, epoch by epoch."""

import keras

from keras_spectral._internal.checks import check_number
from keras_spectral.layers import ConditionalSpectralDense
from keras_spectral.layers import GatedSpectralDense
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import require_adapters

_GATED = (GatedSpectralDense, ConditionalSpectralDense)


class GateMonitor(keras.callbacks.Callback):
    """Puts the number of active gates into the logs of `fit`.

    At the end of each epoch the logs gain `active_gates`, the sum over all
    layers, and `active_gates/PATH` for each layer: for GatedSpectralDense
    the gates larger than `threshold`, for ConditionalSpectralDense the mean
    number of open gates an example in that epoch. Give it before callbacks
    that read the logs, such as `CSVLogger`.

    Args:
        threshold: Size from which a fixed gate counts as active, at least 0.

    Raises:
        ValueError: A bad threshold; at the start of training, if the model
            has no gates.

    Example:

    >>> import numpy as np
    >>> import keras_spectral as ks
    >>> layer = ks.GatedSpectralDense(keras.layers.Dense(4, name="hidden"))
    >>> model = keras.Sequential([keras.Input((3,)), layer])
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(
    ...     np.ones((2, 3)), np.ones((2, 4)), verbose=0,
    ...     callbacks=[ks.callbacks.GateMonitor()],
    ... ).history
    >>> sorted(history)
    ['active_gates', 'active_gates/hidden', 'loss']
    """

    def __init__(self, threshold: float = 0.01):
        super().__init__()
        self.threshold = check_number(threshold, "threshold", 0)

    def on_train_begin(self, logs=None):
        require_adapters(self.model, *_GATED)

    def on_epoch_begin(self, epoch, logs=None):
        for place in adapter_places(self.model, ConditionalSpectralDense):
            place.layer.reset_gates()

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        gated = adapter_places(self.model, *_GATED)
        counts = {place.path: self._count(place.layer) for place in gated}
        logs["active_gates"] = sum(counts.values())
        for path, count in counts.items():
            logs[f"active_gates/{path}"] = count

    def _count(self, adapter):
        if isinstance(adapter, GatedSpectralDense):
            return adapter.active_gates(self.threshold)
        return adapter.active_gates()
