"""The files of an adapter's folder: read without trust, written whole."""

import contextlib
import json
import os
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from keras_spectral._internal.checks import check_path
from keras_spectral._internal.files import whole_file
from keras_spectral.saving.reading import check_finite

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
CARD = "README.md"
_PICKLE = "adapter_model.bin"
_WIDTHS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_folder(
    folder: str | os.PathLike,
) -> tuple[dict, dict[str, np.ndarray]]:
    """The configuration and the float32 tensors of an adapter's folder.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: A file is damaged, or the tensors are pickled.
    """
    home = pathlib.Path(check_path(folder, "folder"))
    if not home.is_dir():
        raise FileNotFoundError(
            f"There is no folder {home}. Expected one on this machine with "
            f"{CONFIG} and {TENSORS}. An adapter of the Hugging Face Hub is "
            "fetched by `huggingface_hub.snapshot_download(name)`, which "
            "returns its folder."
        )
    if not (home / CONFIG).is_file():
        raise FileNotFoundError(
            f"There is no {CONFIG} in {home}. Expected a folder that HF PEFT's "
            "`save_pretrained` or `ks.save_peft` has written."
        )
    return _read_config(home / CONFIG), _read_tensors(home)


def write_folder(
    folder: str | os.PathLike,
    config: dict,
    tensors: dict[str, np.ndarray],
    card: str,
) -> None:
    """Writes an adapter's files, all or none, into a folder that it makes.

    A card that is there is somebody's own by now, and stays.
    """
    home = pathlib.Path(folder)
    if not home.parent.is_dir():
        raise FileNotFoundError(
            f"Cannot write {home}: there is no folder {home.parent}. Make it "
            "first (`os.makedirs`)."
        )
    is_new = not home.exists()
    written = [CONFIG, TENSORS]
    if not (home / CARD).exists():
        written.append(CARD)
    home.mkdir(exist_ok=True)
    try:
        with contextlib.ExitStack() as files:
            parts = {
                name: files.enter_context(whole_file(home / name))
                for name in written
            }
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            if CARD in parts:
                pathlib.Path(parts[CARD]).write_text(card, "utf-8")
            pathlib.Path(parts[CONFIG]).write_text(text, "utf-8")
            # PEFT and transformers look for the format.
            metadata = {"format": "pt"}
            safetensors.numpy.save_file(tensors, parts[TENSORS], metadata)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                home.rmdir()
        raise


def _read_config(path):
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no readable JSON ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds a {type(config).__name__}. Expected an object with "
            "the fields of a PEFT configuration."
        )
    return config


def _read_tensors(home):
    path = home / TENSORS
    if not path.is_file() and (home / _PICKLE).exists():
        raise ValueError(
            f"{home} has its tensors in {_PICKLE}, a pickle, which can run any "
            f"code when it is read. Expected {TENSORS}. If you trust it, load "
            "the folder by HF PEFT and write it again by "
            "`model.save_pretrained(folder)`, whose files are safetensors."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no {TENSORS} in {home}.")
    try:
        content = path.read_bytes()
        parts = dict(safetensors.deserialize(content))
        tensors = {name: _array(name, part) for name, part in parts.items()}
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). It may be "
            "damaged: fetch or write it again."
        ) from error
    check_finite(tensors, path)
    return tensors


def _array(name, part):
    """A tensor of the file as float32."""
    kind = part["dtype"]
    if kind not in _WIDTHS:
        raise ValueError(
            f"tensor '{name}' is of type {kind}, expected one of "
            f"{sorted(_WIDTHS)}"
        )
    values = np.frombuffer(part["data"], _WIDTHS[kind])
    if kind == "BF16":  # the upper half of a float32
        values = (values.astype("<u4") << 16).view("<f4")
    return values.astype("float32").reshape(part["shape"])
