"""SSF: a trained factor and a trained shift for each output."""

import keras
from keras import ops

from keras_spectral._internal.checks import check_flag
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.norm import NormView
from keras_spectral.kernels.norm import is_norm
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter


@register_method("ssf")
class SSF(KernelAdapter):
    """Scales and shifts a layer's outputs: `y = base(x) * g + h`.

    The factors g (n_out) start at one and the shifts h (n_out) at zero, so
    the adapted layer starts as the base. It trains 2 n_out numbers and merges
    exactly, into the kernel's columns and the bias, or into a norm's scale
    and shift: it costs nothing at inference.

    Its authors put one after every operation of a vision transformer: every
    linear layer and every norm, as `target=["all-linear", "norms"]` does.
    Outputs are changed before the base's activation. The same at the end of
    blocks is `RED`.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Lian et al. 2022, arXiv 2210.08823, equations 2 and 4.

    Args:
        layer: The base: any layer with a column for each output, which
            transposed convolutions do not have, or a norm with a scale.
        shift: Whether outputs are shifted as well. A base without a bias has
            no room for that, and cannot be merged then.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a base that no view covers, a transposed
            convolution or a ReversibleEmbedding. `merge_model` of shifts into
            a base without a bias, or with one whose numbers columns share.

    Example:

    >>> layer = SSF(keras.layers.Dense(3))
    >>> outputs = layer(keras.ops.ones((2, 4)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(3,), (3,)]
    """

    default_target = "all-linear"
    trains = "a factor and a shift for each output"
    one_direction = True
    scales_columns = True
    reads_kernel = True
    needs_outputs = True

    def __init__(self, layer: keras.layers.Layer, shift: bool = True, **kwargs):
        super().__init__(layer, **kwargs)
        self.shift = check_flag(shift, "shift")

    @classmethod
    def check_base(cls, layer):
        if not is_norm(layer):
            super().check_base(layer)

    @classmethod
    def view_of(cls, layer):
        return NormView(layer) if is_norm(layer) else kernel_view(layer)

    def build_adapter(self):
        shape = (self.view.n_out,)
        self.gains = self.add_weight(
            name="gains", shape=shape, initializer="ones"
        )
        if self.shift:
            self.shifts = self.add_weight(
                name="shifts", shape=shape, initializer="zeros"
            )

    def change(self, inputs, outputs, training=None, **kwargs):
        change = outputs * self.view.spread(self.gains - 1, outputs)
        if self.shift:
            change = change + self.view.spread(self.shifts, outputs)
        return change

    def check_mergeable(self):
        if self.shift and self.view.bias_of() is None:
            raise ValueError(
                f"Layer '{self.name}' has no bias to take the shifts of its "
                "SSF. Expected a base with one, or `shift=False`: keep the "
                "adapter, or exclude such layers."
            )

    def delta_matrix(self):
        kernel = self.view.matrix()
        return kernel * ops.cast(self.gains - 1, kernel.dtype)

    def bias_change(self):
        change = self.view.scaled_bias(self.gains - 1)
        if self.shift and change is not None:
            change = change + self.view.on_bias(
                ops.convert_to_tensor(self.shifts)
            )
        return change
