"""matplotlib pictures; each function returns the figure."""

from keras_spectral.plots.compression import plot_learning
from keras_spectral.plots.compression import plot_sensitivity
from keras_spectral.plots.parts import plot_gate_bars
from keras_spectral.plots.parts import plot_gate_histogram
from keras_spectral.plots.parts import plot_gate_history
from keras_spectral.plots.parts import plot_gate_map
from keras_spectral.plots.ranks import plot_posterior
from keras_spectral.plots.ranks import plot_rank_history
from keras_spectral.plots.ranks import plot_rank_map
from keras_spectral.plots.spectra import plot_gates
from keras_spectral.plots.spectra import plot_spectrum
from keras_spectral.plots.transfer import plot_transfer

__all__ = [
    "plot_gate_bars",
    "plot_gate_histogram",
    "plot_gate_history",
    "plot_gate_map",
    "plot_gates",
    "plot_learning",
    "plot_posterior",
    "plot_rank_history",
    "plot_rank_map",
    "plot_sensitivity",
    "plot_spectrum",
    "plot_transfer",
]
