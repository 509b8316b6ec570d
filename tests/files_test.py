import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from keras_spectral._internal import files as _files
from keras_spectral._internal.files import whole_file
from keras_spectral._internal.files import write_safetensors

pytestmark = pytest.mark.once


def _mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def _write(path, text="new"):
    with whole_file(path) as part, open(part, "w") as file:
        file.write(text)


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o002, 0o664), (0o077, 0o600)):
        old = os.umask(umask)
        try:
            write_safetensors({"x": np.ones(2)}, tmp_path / f"{umask}.st")
        finally:
            os.umask(old)
        assert _mode(tmp_path / f"{umask}.st") == mode


def test_an_existing_file_keeps_its_mode(tmp_path):
    path = tmp_path / "x.safetensors"
    path.touch()
    for mode in (0o664, 0o600):
        path.chmod(mode)
        write_safetensors({"x": np.ones(2)}, path)
        assert _mode(path) == mode


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "x", tmp_path / "link"
    link.symlink_to(target)
    for text in ("one", "two"):  # to nothing at first
        _write(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert os.listdir(tmp_path / "there") == ["x"]


def test_a_killed_process_leaves_its_part_for_one_save(tmp_path):
    path = tmp_path / "x"
    code = f"""
    import os, runpy, signal
    whole_file = runpy.run_path({_files.__file__!r})["whole_file"]
    with whole_file({str(path)!r}) as part:
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    _write(path)
    assert os.listdir(tmp_path) == ["x"]


def test_parts_of_living_processes_and_other_files_stay(tmp_path):
    path = tmp_path / "x"
    start = _files._part_start(path)
    kept = [f"{start}{os.getppid()}-0.part", str(tmp_path / "y.part")]
    gone = f"{start}{os.getpid()}-0.part"  # of an earlier process of our number
    for name in (*kept, gone):
        open(name, "w").close()
    with whole_file(path) as part:
        _write(path)
        assert os.path.exists(part)
    assert not os.path.exists(gone)
    assert all(os.path.exists(name) for name in kept)


def test_names_may_be_as_long_as_the_system_takes(tmp_path):
    path = tmp_path / ("\u6e2c" * 84 + ".st")  # 255 bytes
    _write(path)
    assert os.listdir(tmp_path) == [path.name]


def test_parts_of_other_containers_stay(tmp_path, monkeypatch):
    """Their processes have numbers of their own, under one host's name."""
    path = tmp_path / "x"
    monkeypatch.setattr(os, "readlink", lambda link: "pid:[1]")
    start = _files._part_start(path)
    monkeypatch.undo()
    monkeypatch.setattr(_files, "_is_alive", lambda pid: False)
    part = f"{start}4000000-0.part"
    open(part, "w").close()
    _write(path)
    assert os.path.exists(part)


def test_a_failure_leaves_the_old_file_and_no_part(tmp_path):
    path = tmp_path / "x"
    _write(path, "old")
    for error in (ValueError("broken"), KeyboardInterrupt()):
        with pytest.raises(type(error)), whole_file(path):
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_errors_name_the_path_that_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nodir/x: there is no folder"):
        _write("nodir/x")
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        _write(tmp_path)

    def fail(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(_files, "_flush", fail)
    with pytest.raises(PermissionError, match="write x: Permission") as caught:
        _write("x")
    assert ".part" not in str(caught.value)


def test_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x"
    _write(path, "old")

    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(_files, "_flush", fail)
    with pytest.raises(OSError, match="space left") as caught:
        _write(path)
    assert str(path) in str(caught.value) and path.read_text() == "old"
