"""matplotlib pictures; each function returns the figure."""

from keras_spectral.plots.spectra import plot_gates
from keras_spectral.plots.spectra import plot_spectrum
from keras_spectral.plots.transfer import plot_transfer

__all__ = ["plot_gates", "plot_spectrum", "plot_transfer"]
