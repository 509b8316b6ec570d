"""Adapters of a whole backbone."""

from keras_spectral.backbones.soft_prompt import SoftPrompt

__all__ = ["SoftPrompt"]
