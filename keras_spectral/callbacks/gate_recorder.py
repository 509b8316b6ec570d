"""GateRecorder: what the gates of UniPELT blocks do during training."""

import json
import os
from typing import Any

import keras

from keras_spectral._internal.checks import check_path
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.files import whole_file
from keras_spectral.blocks import UniPELTBlock
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import require_adapters


class GateRecorder(keras.callbacks.Callback):
    """Records mean and deviation of every UniPELT gate, block by block.

    At the end of each epoch the logs of `fit` gain `gate/PART`, the mean over
    all blocks and all examples of the epoch. `records` is a list of
    `{"step": n, "gates": {path: {part: [mean, deviation]}}}`, one for each
    epoch or for `every` so many steps; `plots.plot_gate_history` draws it.
    Validation counts as well where it comes within the time recorded.

    Args:
        path: A JSON file that holds `records`, written again each time.
        every: Training steps between records; None is once an epoch. On JAX
            each record reads the state back from the device.

    Raises:
        ValueError: At the start of training, if the model has no
            UniPELTBlock; `every` is no whole number above 0.

    Example:

    >>> import numpy as np
    >>> import keras_spectral as ks
    >>> x = keras.Input((4, 8))
    >>> attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    >>> model = keras.Model(x, attention(x, x))
    >>> model = ks.wrap_model(model, "unipelt", lora=2, bottleneck=0)
    >>> model.compile("sgd", "mse")
    >>> recorder = ks.callbacks.GateRecorder()
    >>> data = np.ones((2, 4, 8)), np.ones((2, 4, 8))
    >>> history = model.fit(*data, verbose=0, callbacks=[recorder]).history
    >>> sorted(history)
    ['gate/lora_query', 'gate/lora_value', 'gate/prefix', 'loss']
    >>> recorder.records[0]["step"], list(recorder.records[0]["gates"])
    (1, ['attention'])
    """

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        every: int | None = None,
    ):
        super().__init__()
        if every is not None:
            every = check_rank(every, "every")
        self.path = path if path is None else check_path(path)
        self.every = every
        self.records: list[dict[str, Any]] = []
        self.step = 0

    def on_train_begin(self, logs=None):
        self._reset()

    def on_train_batch_end(self, batch, logs=None):
        # With several steps an execution, `batch` is the last one's index.
        self.step += batch + 1 - self._batches
        self._batches = batch + 1
        if self.every and self.step - self._last >= self.every:
            self._sync()
            self._record()

    def on_epoch_begin(self, epoch, logs=None):
        self._batches = 0
        self._last = self.step

    def on_test_begin(self, logs=None):
        self._record()

    def on_test_end(self, logs=None):
        self._reset()

    def on_epoch_end(self, epoch, logs=None):
        self._record()
        if logs is not None:
            for part, mean in self._means().items():
                logs[f"gate/{part}"] = mean

    def _record(self):
        if self.step == self._last:
            return
        gates = {
            place.path: {
                name: list(pair)
                for name, pair in place.layer.gate_statistics().items()
            }
            for place in adapter_places(self.model, UniPELTBlock)
        }
        self.records.append({"step": self.step, "gates": gates})
        self._last = self.step
        self._reset()
        if self.path is not None:
            with whole_file(self.path) as part, open(part, "w") as file:
                json.dump(self.records, file, indent=1)

    def _means(self):
        """The mean of each part over the blocks of the last record."""
        values: dict[str, list[float]] = {}
        for parts in self.records[-1]["gates"].values():
            for name, (mean, _) in parts.items():
                values.setdefault(name, []).append(mean)
        return {name: sum(v) / len(v) for name, v in values.items()}

    def _reset(self):
        for block in require_adapters(self.model, UniPELTBlock):
            block.reset_gates()

    def _sync(self):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
