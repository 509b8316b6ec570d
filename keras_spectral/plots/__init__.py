"""Pictures by matplotlib; each function returns the figure.

- `plot_gate_bars`: mean and deviation of the gates of UniPELT blocks.
- `plot_gate_histogram`: how often gates have which value.
- `plot_gate_history`: mean gates over training steps.
- `plot_gate_map`: mean gates as a heat map, blocks x parts.
- `plot_gates`: spectral gates as a heat map, layers x directions.
- `plot_learning`: ranks and distortion over `learn_compression`.
- `plot_posterior`: how wide IVON's posterior is.
- `plot_rank_history`: the rank of each layer over epochs.
- `plot_rank_map`: final ranks as a heat map, layers x projections.
- `plot_sensitivity`: what pruning each layer alone does to a metric.
- `plot_spectrum`: a layer's singular values before and after.
- `plot_transfer`: how a pair takes over from its original.
"""

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
