"""Callbacks: they change or record adapters while a model trains."""

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
