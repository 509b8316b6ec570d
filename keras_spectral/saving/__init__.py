"""Adapter files."""

from keras_spectral.saving.adapter_file import load_adapters
from keras_spectral.saving.adapter_file import save_adapters

__all__ = ["load_adapters", "save_adapters"]
