"""An unfinished `learn_compression`, kept in a file."""

import json
import os

import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from keras_spectral._internal.files import write_safetensors
from keras_spectral.compression.pulled import Pulled

_FORMAT = "keras_spectral.learn_compression.1"


def save_state(
    path: str | os.PathLike, pulled: Pulled, history: list, settings: str
) -> None:
    """Writes all that the next round starts from."""
    tensors = {
        name: np.array(_plain(variable), order="C")
        for name, variable in _variables(pulled).items()
    }
    metadata = {
        "format": _FORMAT,
        "settings": settings,
        "history": json.dumps(history),
    }
    write_safetensors(tensors, path, metadata)


def load_state(
    path: str | os.PathLike, pulled: Pulled, settings: str
) -> list[dict]:
    """Fills the variables from a file; returns the history of its rounds.

    Raises:
        ValueError: It is of other settings or another model, or damaged. No
            variable has changed.
    """
    variables = _variables(pulled)
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        history = json.loads(metadata.get("history", "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            f"Checkpoint {os.fspath(path)} cannot be read: {error} Expected "
            "one that `learn_compression` wrote: remove it to start again."
        ) from error
    shapes = {name: tuple(v.shape) for name, v in variables.items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if (
        metadata.get("format") != _FORMAT
        or metadata.get("settings") != settings
        or found != shapes
    ):
        raise ValueError(
            f"Checkpoint {os.fspath(path)} is of another run: it says "
            f"{metadata.get('settings')}, and this one is {settings}. Expected "
            "the same model, compressions and mu: remove the file to start "
            "again, or name another one."
        )
    for name, variable in variables.items():
        variable.assign(ops.cast(tensors[name], variable.dtype))
    return history


def _variables(pulled):
    groups = {
        "model": pulled.variables,
        "optimizer": pulled.optimizer.variables,
    }
    return {
        f"{group}.{i}": variable
        for group, variables in groups.items()
        for i, variable in enumerate(variables)
        if "int" in variable.dtype or "float" in variable.dtype
    }


def _plain(variable):
    value = ops.convert_to_numpy(variable)
    return value.astype("float32") if value.dtype.kind == "V" else value
