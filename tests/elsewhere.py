"""Loads a saved model in a process of its own."""

import os
import subprocess
import sys

import numpy as np

_PROGRAM = """
import sys
import keras, numpy as np
import keras_spectral.compression
inputs = dict(np.load(sys.argv[2]))
if len(inputs) == 1:
    (inputs,) = inputs.values()
model = keras.saving.load_model(sys.argv[1])
got = model.predict(inputs, verbose=0)
model.save(sys.argv[1])
np.save(sys.argv[3], got)
"""


def outputs_elsewhere(model, inputs, folder):
    """What a model gives once it is saved and loaded again.

    Args:
        model: A model with one input, or with inputs by name.
        inputs: The array of the one, or `{name: array}`.
        folder: Where the files go.
    """
    paths = [folder / name for name in ("model.keras", "x.npz", "y.npy")]
    model.save(paths[0])
    arrays = inputs if isinstance(inputs, dict) else {"only": inputs}
    np.savez(paths[1], **arrays)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *paths],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(paths[2])
