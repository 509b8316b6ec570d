"""Callbacks that change or record adapters while a model trains.

- `AdapterCheckpoint` saves the adapters of the best epoch, or of each one.
- `GateMonitor` puts the number of active spectral gates into the logs.
- `GateRecorder` records mean and deviation of every UniPELT gate.
- `MeanWeights` puts IVON's means in for validation and checkpoints.
- `RankBudget` takes the least important directions of layers away.
- `TransferMonitor` evaluates pairs of DecayingLoRA without the originals.
"""

from keras_spectral.callbacks.adapter_checkpoint import AdapterCheckpoint
from keras_spectral.callbacks.gate_monitor import GateMonitor
from keras_spectral.callbacks.gate_recorder import GateRecorder
from keras_spectral.callbacks.mean_weights import MeanWeights
from keras_spectral.callbacks.rank_budget import RankBudget
from keras_spectral.callbacks.transfer_monitor import TransferMonitor

__all__ = [
    "AdapterCheckpoint",
    "GateMonitor",
    "GateRecorder",
    "MeanWeights",
    "RankBudget",
    "TransferMonitor",
]
