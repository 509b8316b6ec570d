"""Helpers, and what reads or changes Keras's and Python's internals."""
