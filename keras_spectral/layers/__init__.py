"""One adapter per file, on the bases in `adapter.py`, `kernel_adapter.py`."""

from keras_spectral.layers.adalora import AdaLoRADense
from keras_spectral.layers.adapter import METHODS
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.bitfit import BitFit
from keras_spectral.layers.boft import BOFTDense
from keras_spectral.layers.conditional_spectral import ConditionalSpectralDense
from keras_spectral.layers.conv_lora import ConvLoRA
from keras_spectral.layers.decaying_lora import DecayingLoRA
from keras_spectral.layers.deep_lora import DeepLoRADense
from keras_spectral.layers.dora import DoRADense
from keras_spectral.layers.dylora import DyLoRADense
from keras_spectral.layers.gated_spectral import GatedSpectralDense
from keras_spectral.layers.glora import GLoRADense
from keras_spectral.layers.ia3 import IA3
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.lidb import LiDBDense
from keras_spectral.layers.loha import LoHaDense
from keras_spectral.layers.lokr import LoKrDense
from keras_spectral.layers.lora import LoRADense
from keras_spectral.layers.lora_experts import LoRAExperts
from keras_spectral.layers.lora_fa import LoRAFADense
from keras_spectral.layers.lora_recurrent import LoRARecurrent
from keras_spectral.layers.oft import OFTDense
from keras_spectral.layers.orthogonal_adaptation import OrthogonalAdaptation
from keras_spectral.layers.spectral import SpectralDense
from keras_spectral.layers.ssf import SSF
from keras_spectral.layers.tuned_norm import TunedNorm
from keras_spectral.layers.vera import VeRADense

__all__ = [
    "IA3",
    "METHODS",
    "SSF",
    "AdaLoRADense",
    "AdapterLayer",
    "BOFTDense",
    "BitFit",
    "ConditionalSpectralDense",
    "ConvLoRA",
    "DecayingLoRA",
    "DeepLoRADense",
    "DoRADense",
    "DyLoRADense",
    "GLoRADense",
    "GatedSpectralDense",
    "KernelAdapter",
    "LiDBDense",
    "LoHaDense",
    "LoKrDense",
    "LoRADense",
    "LoRAExperts",
    "LoRAFADense",
    "LoRARecurrent",
    "OFTDense",
    "OrthogonalAdaptation",
    "SpectralDense",
    "TunedNorm",
    "VeRADense",
]
