"""What must see the training loop."""

from keras_spectral.callbacks.gate_monitor import GateMonitor

__all__ = ["GateMonitor"]
