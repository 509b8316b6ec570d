"""AdapterCheckpoint: keeps the best adapters of a training."""

import os
import string
from typing import Any

import keras

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_path
from keras_spectral._internal.files import check_folder
from keras_spectral.model.hosts import require_adapters
from keras_spectral.saving import load_adapters
from keras_spectral.saving import save_adapters


class AdapterCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves the adapters, and what trains beside them, when they are best.

    A `keras.callbacks.ModelCheckpoint` that writes the small file of
    `save_adapters` at the end of an epoch, by default only if `monitor` is
    better than ever. Put it behind `MeanWeights` in the list of callbacks,
    so that it saves IVON's means.

    Args:
        path: The file. `{epoch:02d}` and `{val_loss:.2f}` stand for the
            epoch, counted from 1, and for what the logs hold.
        monitor: What is compared, a name in the logs.
        verbose: 0 or 1; 1 says when it saves.
        save_best_only: False saves every epoch.
        mode: `"min"`, `"max"`, or `"auto"`: by the name of `monitor`.
        initial_value_threshold: What the first epoch has to be better than.
        restore_best: Whether the last saved adapters are loaded again at the
            end of the training.

    Raises:
        ValueError: A bad argument; at the start of training, if the model
            has no adapters; at the end of an epoch, if they hold NaN.
        OSError: At the start of training, if the file cannot be written, as
            where its folder is missing.

    Example:

    >>> import os, tempfile
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model = ks.wrap_model(model, "lora", target="dense.*", rank=1)
    >>> model.compile("sgd", "mse")
    >>> data = keras.ops.ones((4, 2)), keras.ops.ones((4, 1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "best.safetensors")
    ...     best = ks.callbacks.AdapterCheckpoint(path, monitor="loss")
    ...     history = model.fit(*data, epochs=2, verbose=0, callbacks=[best])
    ...     os.listdir(folder)
    ['best.safetensors']
    """

    def __init__(
        self,
        path: str | os.PathLike,
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = True,
        mode: str = "auto",
        initial_value_threshold: float | None = None,
        restore_best: bool = False,
    ):
        self.path = os.fspath(check_path(path))
        _check_pattern(self.path)
        check_choice(mode, "mode", ("auto", "min", "max"))
        if not isinstance(monitor, str):
            raise ValueError(
                f"Received monitor={monitor!r}. Expected a name in the logs, "
                "such as 'val_loss'."
            )
        if initial_value_threshold is not None:
            check_number(initial_value_threshold, "initial_value_threshold")
        super().__init__(
            f"{self.path}.keras",  # Keras looks at the ending
            monitor=monitor,
            verbose=check_number(verbose, "verbose", 0, 2),
            save_best_only=check_flag(save_best_only, "save_best_only"),
            mode=mode,
            initial_value_threshold=initial_value_threshold,
        )
        self.filepath = self.path
        self.restore_best = check_flag(restore_best, "restore_best")
        self.saved: str | None = None  # the last file that was written

    def on_train_begin(self, logs: dict[str, Any] | None = None):
        require_adapters(self.model)
        folder = os.path.dirname(self.path)
        if "{" not in folder:
            check_folder(self.path)
        self.saved = None

    def on_train_end(self, logs: dict[str, Any] | None = None):
        if self.restore_best and self.saved is not None:
            load_adapters(self.model, self.saved)

    def _save_model(self, epoch, batch, logs):
        path = self._get_file_path(epoch, batch, logs or {})
        if self._should_save_model(epoch, batch, logs, path):
            save_adapters(self.model, path)
            self.saved = path


def _check_pattern(path):
    """Raises unless all in braces is a name and how it is written."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(path)]
    except ValueError as error:
        raise ValueError(
            f"Received path={path!r}: {error}. Expected a path that may hold "
            "names of the logs, such as '{epoch:02d}-{val_loss:.2f}'."
        ) from error
    if not all(field is None or field.isidentifier() for field in fields):
        raise ValueError(
            f"Received path={path!r}. Expected names of the logs in braces, "
            "such as '{epoch:02d}' or '{val_loss:.2f}'."
        )
