"""One adapter per file, on the base in `adapter.py`."""

from keras_spectral.layers.adapter import METHODS
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.conv_lora import ConvLoRA
from keras_spectral.layers.lora import LoRADense

__all__ = ["METHODS", "AdapterLayer", "ConvLoRA", "LoRADense"]
