"""GateMonitor: how many spectral gates are open, epoch by epoch."""

import keras

from keras_spectral.layers import ConditionalSpectralDense
from keras_spectral.layers import GatedSpectralDense
from keras_spectral.wrap import adapter_places


class GateMonitor(keras.callbacks.Callback):
    """Puts the number of active gates into the logs of `fit`.

    At the end of each epoch the logs gain `active_gates`, the sum over all
    layers, and `active_gates/PATH` for each layer: for GatedSpectralDense
    the gates larger than `threshold`, for ConditionalSpectralDense the mean
    number of open gates an example in that epoch. Give it before callbacks
    that read the logs, such as `CSVLogger`.

    Args:
        threshold: Size from which a fixed gate counts as active.
        per_layer: Whether each layer has its entry.

    Raises:
        ValueError: At the start of training, if the model has no gates.

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

    def __init__(self, threshold: float = 0.01, per_layer: bool = True):
        super().__init__()
        self.threshold = threshold
        self.per_layer = per_layer

    def on_train_begin(self, logs=None):
        if not self._gated():
            raise ValueError(
                f"Model '{self.model.name}' has no gated adapters. Expected "
                'one wrapped with "gated_spectral" or "conditional_spectral".'
            )

    def on_epoch_begin(self, epoch, logs=None):
        for place in self._gated():
            if isinstance(place.layer, ConditionalSpectralDense):
                place.layer.reset_gates()

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        counts = {p.path: self._count(p.layer) for p in self._gated()}
        logs["active_gates"] = sum(counts.values())
        if self.per_layer:
            for path, count in counts.items():
                logs[f"active_gates/{path}"] = count

    def _gated(self):
        kinds = (GatedSpectralDense, ConditionalSpectralDense)
        found = adapter_places(self.model)
        return [place for place in found if isinstance(place.layer, kinds)]

    def _count(self, adapter):
        if isinstance(adapter, GatedSpectralDense):
            return adapter.active_gates(self.threshold)
        return adapter.active_gates()
