"""Files that are written whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import numpy as np
import safetensors.numpy


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """A path to write to, beside the target, which it then replaces.

    An old file survives a failure.
    """
    path = pathlib.Path(path)
    handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def write_safetensors(
    tensors: dict[str, np.ndarray],
    path: str | os.PathLike,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file."""
    with whole_file(path) as part:
        safetensors.numpy.save_file(tensors, part, metadata)
