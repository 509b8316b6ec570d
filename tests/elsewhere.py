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
expected = inputs.pop("expected")
if len(inputs) == 1:
    (inputs,) = inputs.values()
model = keras.saving.load_model(sys.argv[1])
got = model.predict(inputs, verbose=0)
np.testing.assert_allclose(got, expected, atol=1e-6)
model.save(sys.argv[1])
print("loaded", model.count_params())
"""


def load_elsewhere(model, inputs, folder):
    """Saves a model, and checks its outputs where it is loaded again.

    Args:
        model: A model with one input, or with inputs by name.
        inputs: The array of the one, or `{name: array}`.
        folder: Where the files go.
    """
    path, data = folder / "model.keras", folder / "data.npz"
    model.save(path)
    arrays = inputs if isinstance(inputs, dict) else {"only": inputs}
    np.savez(data, expected=model.predict(inputs, verbose=0), **arrays)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, path, data],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert f"loaded {model.count_params()}" in done.stdout, done.stderr[-2000:]
