"""Parameter-efficient fine-tuning and compression for Keras 3."""

from keras_spectral.layers import AdapterLayer
from keras_spectral.layers import ConvLoRA
from keras_spectral.layers import LoRADense
from keras_spectral.saving import load_adapters
from keras_spectral.saving import save_adapters
from keras_spectral.summary import adapter_summary
from keras_spectral.wrap import adapters_disabled
from keras_spectral.wrap import merge_model
from keras_spectral.wrap import unwrap_model
from keras_spectral.wrap import unwrapped
from keras_spectral.wrap import wrap_model

__version__ = "0.1.0"

__all__ = [
    "AdapterLayer",
    "ConvLoRA",
    "LoRADense",
    "adapter_summary",
    "adapters_disabled",
    "load_adapters",
    "merge_model",
    "save_adapters",
    "unwrap_model",
    "unwrapped",
    "wrap_model",
]
