"""Adapters of other libraries: HF PEFT's folders, KerasHub's LoRA files."""

from keras_spectral.exchange.keras_lora import load_keras_lora
from keras_spectral.exchange.reading import load_peft
from keras_spectral.exchange.writing import save_peft

__all__ = ["load_keras_lora", "load_peft", "save_peft"]
