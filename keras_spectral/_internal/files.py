"""Files that are written whole or not at all."""

import contextlib
import errno
import glob
import hashlib
import os
import pathlib
import platform
import stat
import uuid
from collections.abc import Iterator

import numpy as np
import safetensors.numpy

# Parts that this process is writing now.
_WRITING: set[str] = set()


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """A path to write to, beside the target, which it then replaces.

    An old file survives a failure and keeps its mode; a new one gets the mode
    that the umask says. A link stays: what it points to is replaced. Parts
    that killed processes left of the same target are removed.

    Raises:
        FileNotFoundError: There is no such folder.
        OSError: The file cannot be written; the error names `path`.
    """
    target = pathlib.Path(os.path.realpath(path))
    check_folder(path)
    _remove_orphans(target)
    part = f"{_part_start(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}.part"
    _WRITING.add(part)
    try:
        # The system takes the umask off, unlike that of `tempfile`.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = _mode(target) or _mode(part)
        yield part
        os.chmod(part, mode)
        _flush(part)
        os.replace(part, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if isinstance(error, OSError | safetensors.SafetensorError):
            raise _named(error, part, path) from error
        raise
    finally:
        _WRITING.discard(part)


def check_folder(path: str | os.PathLike) -> None:
    """Raises unless a file can be made at a path, as far as one can see."""
    target = pathlib.Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(
            f"Cannot write {os.fspath(path)}: it is a folder. Expected the "
            "path of a file."
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {os.fspath(path)}: there is no folder "
            f"{target.parent}. Make it first (`os.makedirs`)."
        )


def write_safetensors(
    tensors: dict[str, np.ndarray],
    path: str | os.PathLike,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a safetensors file."""
    with whole_file(path) as part:
        safetensors.numpy.save_file(tensors, part, metadata)


def _part_start(target):
    """How the names of a target's parts begin where process ids are ours."""
    try:  # containers may share a name, but not their processes
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    name = os.fsencode(target.name)
    here = _short_hash(f"{platform.node()} {processes}".encode())
    return str(target.with_name(f".{_short_hash(name)}.{here}-"))


def _short_hash(content):
    return hashlib.sha256(content).hexdigest()[:16]


def _remove_orphans(target):
    """Removes parts of a target that nobody writes any more."""
    for part in glob.glob(f"{glob.escape(_part_start(target))}*.part"):
        pid = part.removeprefix(_part_start(target)).split("-")[0]
        ours = pid == str(os.getpid())
        if part not in _WRITING and (ours or not _is_alive(pid)):
            with contextlib.suppress(OSError):
                os.unlink(part)


def _is_alive(pid):
    """Whether a process runs, as far as one can tell."""
    if os.name == "nt" or not pid.isdecimal():
        return True  # on Windows a signal of 0 is no question
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _mode(path):
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return None


def _flush(path):
    """Waits until a file is on the disk, so that no name comes before it."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _named(error, part, path):
    """The error by the path that the user knows."""
    number = getattr(error, "errno", None) or _number(error)
    reason = getattr(error, "strerror", None) or str(error)
    reason = reason.replace(part, os.fspath(path))
    return OSError(number, f"Cannot write {os.fspath(path)}: {reason}")


def _number(error):
    """The system's number of an error that safetensors tells in words."""
    full = "os error 28" in str(error)
    return errno.ENOSPC if full else errno.EIO
