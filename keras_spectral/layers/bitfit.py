"""BitFit: trained biases, or shifts of norms, beside the frozen ones."""

import keras
from keras import ops

from keras_spectral.kernels import LowRank
from keras_spectral.kernels.norm import along_axes
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter


@register_method("bitfit")
class BitFit(KernelAdapter):
    """Trains biases alone: `y = activation(base(x) + db)`.

    The change db has the shape of the base's `bias`, or of a norm's `beta`,
    and starts at zero. It is what is left of fine-tuning if one keeps all
    kernels: n_out numbers for each layer. Merges exactly.

    `wrap_model(..., trainable="biases")` puts it beside adapters of other
    methods.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Ben Zaken et al. 2021, arXiv 2106.10199.

    Args:
        layer: The base: any layer that adds a `bias` last, or a norm with a
            `beta`.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A base without bias, or a recurrent cell.

    Example:

    >>> layer = BitFit(keras.layers.Dense(3))
    >>> outputs = layer(keras.ops.ones((2, 4)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(3,)]
    """

    default_target = "biases"
    trains = "biases, beside the frozen ones"
    one_direction = True
    only_bias = True

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        super().__init__(layer, **kwargs)

    @classmethod
    def check_base(cls, layer):
        if not _will_have_bias(layer):
            raise ValueError(
                f"Layer '{layer.name}' ({type(layer).__name__}) has no bias. "
                "Expected a layer that adds a `bias` last, or a norm with a "
                "`beta`."
            )

    @classmethod
    def view_of(cls, layer):
        try:
            return super().view_of(layer)
        except ValueError:
            return None

    def build_adapter(self):
        self.check_base(self.layer)
        self.bias_delta = self.add_weight(
            name="bias_delta",
            shape=self._bias().shape,
            initializer="zeros",
        )

    def change(self, inputs, outputs, training=None, **kwargs):
        layer = self.layer
        last = layer.up if isinstance(layer, LowRank) else layer
        change = ops.cast(self.bias_delta, outputs.dtype)
        change = along_axes(last, change, outputs)
        return ops.broadcast_to(change, ops.shape(outputs))

    def bias_change(self):
        return ops.convert_to_tensor(self.bias_delta)

    def delta_matrix(self):
        return ops.zeros((), "float32")


def _will_have_bias(layer):
    if hasattr(layer, "state_size"):  # a recurrent cell, whose bias is inside
        return False
    if layer.built:
        return bias_name(layer) is not None
    options = ("use_bias", "bias_axes", "center")
    return any(getattr(layer, name, None) for name in options)


def bias_name(layer: keras.layers.Layer) -> str | None:
    """The attribute that holds a layer's bias, None without one."""
    for name in ("bias", "beta"):
        if isinstance(getattr(layer, name, None), keras.Variable):
            return name
    return None
