"""Optimizers that Keras lacks."""

from keras_spectral.optimizers.ivon import IVON
from keras_spectral.optimizers.predict import predict_mean

__all__ = ["IVON", "predict_mean"]
