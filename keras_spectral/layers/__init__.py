"""One adapter per file, on the bases in `adapter.py`, `kernel_adapter.py`."""

from keras_spectral.layers.adalora import AdaLoRADense
from keras_spectral.layers.adapter import METHODS
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.bitfit import BitFit
from keras_spectral.layers.conditional_spectral import ConditionalSpectralDense
from keras_spectral.layers.conv_lora import ConvLoRA
from keras_spectral.layers.decaying_lora import DecayingLoRA
from keras_spectral.layers.dora import DoRADense
from keras_spectral.layers.dylora import DyLoRADense
from keras_spectral.layers.gated_spectral import GatedSpectralDense
from keras_spectral.layers.ia3 import IA3
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.lora import LoRADense
from keras_spectral.layers.spectral import SpectralDense

__all__ = [
    "METHODS",
    "IA3",
    "AdaLoRADense",
    "AdapterLayer",
    "BitFit",
    "ConditionalSpectralDense",
    "ConvLoRA",
    "DecayingLoRA",
    "DoRADense",
    "DyLoRADense",
    "GatedSpectralDense",
    "KernelAdapter",
    "LoRADense",
    "SpectralDense",
]
