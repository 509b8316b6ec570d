"""The L step of `learn_compression`: a model pulled towards a projection."""

import keras
import numpy as np
from keras import ops


class Pulled(keras.Model):
    """Trains a model with `mu/2 |K - T - m/mu|^2` added to its loss.

    `T` are the targets and `m` the multipliers, one of each for each kernel.
    Both and mu are variables, so that nothing is compiled again for others.

    Args:
        model: The model.
        kernels: Those of its variables that are pulled.
    """

    def __init__(self, model, kernels, **kwargs):
        super().__init__(**kwargs)
        self.model = model
        self.kernels = kernels
        self.mu = self.add_weight(name="mu", initializer="ones", **_FIXED)
        self.targets = [self._beside(k, "target") for k in kernels]
        self.multipliers = [self._beside(k, "multiplier") for k in kernels]

    def _beside(self, kernel, name):
        return self.add_weight(
            shape=kernel.shape, name=name, initializer="zeros", **_FIXED
        )

    def build(self, input_shape=None):
        self.built = True

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + self.pull()

    def pull(self):
        """What is added to the loss."""
        total = 0.0
        rows = zip(self.kernels, self.targets, self.multipliers)
        for kernel, target, multiplier in rows:
            gap = ops.cast(kernel, "float32") - target - multiplier / self.mu
            total = total + ops.sum(ops.square(gap))
        return self.mu / 2 * total

    def shifted(self, i: int) -> np.ndarray:
        """`K - m / mu`, what the i-th C step projects."""
        kernel = ops.cast(self.kernels[i], "float32")
        return ops.convert_to_numpy(kernel - self.multipliers[i] / self.mu)

    def project(self, i: int, target) -> None:
        """Takes a new target T; then `m -= mu (K - T)`."""
        target = ops.cast(target, "float32")
        gap = ops.cast(self.kernels[i], "float32") - target
        self.targets[i].assign(target)
        self.multipliers[i].assign(self.multipliers[i] - self.mu * gap)


_FIXED = {"trainable": False, "dtype": "float32"}
