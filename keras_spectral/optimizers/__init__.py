"""Optimizers that Keras lacks."""

from keras_spectral.optimizers.ivon import IVON
from keras_spectral.optimizers.predict import predict_mean
from keras_spectral.optimizers.with_rates import WithRates

__all__ = ["IVON", "WithRates", "predict_mean"]
