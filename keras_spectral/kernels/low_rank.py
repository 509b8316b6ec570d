"""LowRank: two thin layers in the place of one, and their view."""

import keras
from keras import ops

from keras_spectral._internal.checks import check_layer
from keras_spectral._internal.twin import twin
from keras_spectral.kernels.view import KernelView

# What says how many codes a layer makes.
_RANK_ARGUMENTS = ("units", "filters", "output_dim", "output_shape")


@keras.saving.register_keras_serializable("keras_spectral")
class LowRank(keras.layers.Layer):
    """A factorised layer: `y = up(down(x))`, two plain Keras layers.

    `down` gives the codes (no bias, no activation), `up` makes the output of
    them and has the original's bias and activation. Of a Dense (n_in x
    n_out) at rank r that is Dense(r) and Dense(n_out), r (n_in + n_out)
    weights; of a k x k convolution a k x k convolution with r filters and a
    1x1, or with s slices of its input a grouped one with s r filters.

    `compress_model` and `finalize_transfer` make them; they are built, saved
    and loaded as any Keras layer.

    Args:
        down: The layer from inputs to codes.
        up: The layer from codes to outputs.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What `down` takes.

    Input shape: that of `down`. Output shape: that of `up`.

    Raises:
        ValueError: `down` or `up` is no layer; the input does not fit `down`,
            or its codes `up`.

    Example:

    >>> layer = LowRank(
    ...     keras.layers.Dense(2, use_bias=False), keras.layers.Dense(8)
    ... )
    >>> outputs = layer(keras.ops.ones((3, 16)))
    >>> [tuple(weight.shape) for weight in layer.weights]
    [(16, 2), (2, 8), (8,)]
    """

    def __init__(self, down, up, **kwargs):
        super().__init__(**kwargs)
        self.down = check_layer(down, "down")
        self.up = check_layer(up, "up")
        self.supports_masking = up.supports_masking

    def build(self, input_shape):
        if not self.down.built:
            self.down.build(input_shape)
        if not self.up.built:
            self.up.build(self.down.compute_output_shape(input_shape))
        self.built = True

    def call(self, inputs):
        return self.up(self.down(inputs))

    def compute_output_shape(self, input_shape):
        codes = self.down.compute_output_shape(input_shape)
        return tuple(self.up.compute_output_shape(codes))

    def compute_mask(self, inputs, mask=None):
        return self.down.compute_mask(inputs, mask)

    @property
    def kernel(self):
        """The product of two Dense kernels; some models read it."""
        return ops.matmul(self.down.kernel, self.up.kernel)

    @property
    def bias(self):
        """The bias of `up`, None without one."""
        return getattr(self.up, "bias", None)

    @property
    def activation(self):
        """The activation of `up`."""
        return getattr(self.up, "activation", None)

    def get_config(self):
        layers = {"down": self.down, "up": self.up}
        save = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            **{name: save(layer) for name, layer in layers.items()},
        }

    @classmethod
    def from_config(cls, config):
        load = keras.saving.deserialize_keras_object
        parts = {name: load(config[name]) for name in ("down", "up")}
        return cls(**{**config, **parts})


class LowRankView(KernelView):
    """Both halves as one matrix `K`, their product; it cannot be assigned."""

    kernel_name = None

    def __init__(self, layer, down, up):
        self._down, self._up = down, up
        super().__init__(layer)
        self.groups = up.groups
        # A sliced convolution has groups in its first half only.
        self._sliced = down.groups > up.groups
        self.fan_in = self.n_in // up.groups
        self.max_rank = min(self.fan_in, self.n_out // up.groups)

    def bare(self):
        return twin(self.layer, up=self._up.bare(), activity_regularizer=None)

    def matrix(self):
        return ops.matmul(self._down.matrix(), self._up.matrix())

    def check_assignable(self):
        raise ValueError(
            f"Layer '{self.layer.name}' is factorised: its kernel has no room "
            "for a correction. Keep the adapter, or use `finalize_transfer`, "
            "which gives the pair the adapter's columns as well."
        )

    def down(self, inputs, a):
        codes = self._down.down(inputs, a)
        return ops.sum(codes, axis=-2) if self._sliced else codes

    def up(self, codes, b):
        return self._up.up(codes, b)

    def bias(self, outputs):
        return self._up.bias(outputs)

    def spread(self, row, outputs):
        return self._up.spread(row, outputs)

    def spread_inputs(self, row, inputs):
        return self._down.spread_inputs(row, inputs)

    @property
    def columns_are_outputs(self):
        return self._up.columns_are_outputs

    @property
    def rows_are_inputs(self):
        return self._down.rows_are_inputs

    def trials(self, rng):
        return self._down.trials(rng)

    def pair(self):
        """The factors (parts, rows, rank) and (parts, rank, columns)."""
        a = self._down.parts(self._down.matrix())
        b = self._up.parts(self._up.matrix())
        return a, ops.reshape(b, (a.shape[0], a.shape[-1], -1))

    def thin_layers(self, rank, slices=1):
        config = self.layer.down.get_config()
        name = next(n for n in _RANK_ARGUMENTS if n in config)
        if name == "output_shape":
            config[name] = (*config[name][:-1], rank)
        else:
            config[name] = rank * self._down.groups
        down, up = self.layer.down, self.layer.up
        return [
            type(down).from_config(config),
            type(up).from_config(up.get_config()),
        ]

    @property
    def quantized(self):
        return False

    def _sizes(self):
        return self._down.n_in, self._up.n_out
