"""TunedNorm: a trained change of a norm's scale and shift."""

import keras
from keras import ops

from keras_spectral.kernels.norm import NormView
from keras_spectral.kernels.norm import is_norm
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter


@register_method("tuned_norm")
class TunedNorm(KernelAdapter):
    """Trains a norm's weights: `y = normalised * (gamma + dg) + beta + db`.

    Both changes start at zero, and have the shapes of the norm's own weights;
    a norm without a shift has dg alone. Merges exactly.

    `wrap_model(..., trainable="norms")` puts copies of whole norms beside
    adapters of other methods, which is the same thing.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Zhao et al. 2023, arXiv 2312.11420.

    Args:
        layer: The base: a LayerNormalization, BatchNormalization,
            GroupNormalization, RMSNormalization, or another layer whose class
            is called a norm, with a `gamma` or `scale`. Averages of a batch
            norm stay as they are.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A base that is no norm, or has no scale.

    Example:

    >>> layer = TunedNorm(keras.layers.LayerNormalization())
    >>> outputs = layer(keras.ops.ones((2, 4)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(4,), (4,)]
    """

    default_target = "norms"
    trains = "scales and shifts of norms, beside the frozen ones"
    one_direction = True
    needs_outputs = True

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        super().__init__(layer, **kwargs)

    @classmethod
    def check_base(cls, layer):
        if not is_norm(layer):
            raise ValueError(
                f"Layer '{layer.name}' is a {type(layer).__name__}. Expected a "
                "norm with a scale, such as a LayerNormalization."
            )

    @classmethod
    def view_of(cls, layer):
        return NormView(layer)

    def build_adapter(self):
        self.gamma_delta = self.add_weight(
            name="gamma_delta",
            shape=self.view.variable().shape,
            initializer="zeros",
        )
        self.beta_delta = None
        if self.view.bias_of() is not None:
            self.beta_delta = self.add_weight(
                name="beta_delta",
                shape=self.view.bias_of().shape,
                initializer="zeros",
            )

    def change(self, inputs, outputs, training=None, **kwargs):
        scale, shift = self.view.variable(), self.view.bias_of()
        scale = ops.cast(scale, "float32") + self.gamma_delta
        if shift is not None:
            shift = ops.cast(shift, "float32") + self.beta_delta
        changed = self.view.with_weights(scale, shift)(inputs)
        return changed - outputs

    def delta_matrix(self):
        return ops.reshape(self.gamma_delta, (1, self.view.n_out))

    def bias_change(self):
        if self.beta_delta is None:
            return None
        return ops.convert_to_tensor(self.beta_delta)
