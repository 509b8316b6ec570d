"""Adapter files."""

from keras_spectral.saving.adapter_file import load_adapters
from keras_spectral.saving.adapter_file import save_adapters
from keras_spectral.saving.fuse import fuse_adapters

__all__ = ["fuse_adapters", "load_adapters", "save_adapters"]
