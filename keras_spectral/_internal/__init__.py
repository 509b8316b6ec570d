"""Helpers, and whatever touches Keras's and Python's insides."""
