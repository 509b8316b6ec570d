"""Safetensors files that are written whole or not at all."""

import os
import pathlib
import tempfile

import numpy as np
import safetensors.numpy


def write_safetensors(
    tensors: dict[str, np.ndarray],
    path: str | os.PathLike,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes beside the target first, so an old file survives a failure."""
    path = pathlib.Path(path)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        safetensors.numpy.save_file(tensors, part, metadata)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
