"""What touches Keras's and Python's insides."""
