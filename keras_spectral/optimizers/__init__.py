"""Optimizers that Keras lacks.

- `IVON` trains a Gaussian over every weight.
- `WithRates` gives variables learning rates of their own.
- `predict_mean` averages predictions over samples of IVON's posterior.
"""

from keras_spectral.optimizers.ivon import IVON
from keras_spectral.optimizers.predict import predict_mean
from keras_spectral.optimizers.with_rates import WithRates

__all__ = ["IVON", "WithRates", "predict_mean"]
