"""LowRank: two thin layers in the place of one, and their view."""

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._internal.checks import check_layer
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.layouts import replicate
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
    and loaded as any Keras layer. `set_rank` makes them use the first codes
    alone, and `nest_ranks` draws how many for each training step.

    Args:
        down: The layer from inputs to codes.
        up: The layer from codes to outputs.
        active_rank: How many codes are in use, None for all.
        lowest: The smallest share of them that a training step draws; with
            None it draws none.
        whole: The share of training steps with all of them.
        seed: Integer seed of what is drawn.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What `down` takes.
        training: Boolean, whether a rank is drawn.

    Input shape: that of `down`. Output shape: that of `up`.

    Attributes:
        rank: How many codes there are, of each group.

    Raises:
        ValueError: `down` or `up` is no layer; the input does not fit `down`,
            or its codes `up`; a bad option.

    Example:

    >>> layer = LowRank(
    ...     keras.layers.Dense(2, use_bias=False), keras.layers.Dense(8)
    ... )
    >>> outputs = layer(keras.ops.ones((3, 16)))
    >>> [tuple(weight.shape) for weight in layer.weights]
    [(16, 2), (2, 8), (8,)]
    """

    def __init__(
        self,
        down: keras.layers.Layer,
        up: keras.layers.Layer,
        active_rank: int | None = None,
        lowest: float | None = None,
        whole: float = 0.5,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.down = check_layer(down, "down")
        self.up = check_layer(up, "up")
        self.supports_masking = up.supports_masking
        if active_rank is not None:
            check_rank(active_rank, "active_rank")
        self.active_rank = active_rank
        self.lowest, self.whole = lowest, check_number(whole, "whole", 0, 1)
        self.seed = check_seed(seed)
        if lowest is not None:
            check_number(lowest, "lowest", 0, 1)
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        for half in (self.down, self.up):
            # A rule for the whole layer's kernel fits its path as well.
            axes = 2 + len(getattr(half, "kernel_size", ()))
            if isinstance(half, keras.layers.EinsumDense):
                axes = len(half.equation.split(",")[1].split("->")[0].strip())
            for name in ("kernel", "pointwise_kernel", "embeddings"):
                replicate(f"{self.path}/{half.name}/{name}", axes)
        if not self.down.built:
            self.down.build(input_shape)
        if not self.up.built:
            self.up.build(self.down.compute_output_shape(input_shape))
        config = self.down.get_config()
        codes = next(config[n] for n in _RANK_ARGUMENTS if n in config)
        codes = codes if isinstance(codes, int) else codes[-1]
        self.rank = codes // getattr(self.down, "groups", 1)
        self.built = True

    def call(self, inputs, training=None):
        down, up = self._halves()
        codes = down(inputs)
        if self.lowest is not None and is_training(training):
            codes = codes * self._drawn(codes)
        return up(codes)

    def _halves(self):
        """Both layers, or twins of them that make and take fewer codes."""
        rank = self.active_rank
        if rank is None or rank >= self.rank:
            return self.down, self.up
        parts = getattr(self.down, "groups", 1)
        shared = parts // getattr(self.up, "groups", 1)
        axis = _input_axis(self.up)
        return (
            _with_codes(self.down, -1, parts, rank),
            _with_codes(self.up, axis, shared, rank),
        )

    def _drawn(self, codes):
        """Ones for the codes of a training step, zeros for the others."""
        # All layers draw the same numbers, by generators of one seed.
        draw = keras.random.uniform((), seed=self.seed_generator)
        share = (draw - self.whole) / (1 - self.whole)
        share = self.lowest + (1 - self.lowest) * share
        rank = self.rank
        if self.active_rank is not None:
            rank = min(rank, self.active_rank)
        kept = ops.where(draw < self.whole, 1.0, share) * rank
        mask = ops.arange(rank, dtype="float32") < ops.maximum(kept, 1.0)
        mask = ops.tile(mask, getattr(self.down, "groups", 1))
        if getattr(self.down, "data_format", None) == "channels_first":
            mask = ops.reshape(mask, (-1, *[1] * (len(codes.shape) - 2)))
        return ops.cast(mask, codes.dtype)

    def compute_output_shape(self, input_shape):
        codes = self.down.compute_output_shape(input_shape)
        return tuple(self.up.compute_output_shape(codes))

    def compute_mask(self, inputs, mask=None):
        return self.down.compute_mask(inputs, mask)

    @property
    def kernel(self):
        """The product of two Dense kernels; some models read it."""
        down, up = self._halves()
        return ops.matmul(down.kernel, up.kernel)

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
        options = ("active_rank", "lowest", "whole", "seed")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in options},
            **{name: save(layer) for name, layer in layers.items()},
        }

    @classmethod
    def from_config(cls, config):
        load = keras.saving.deserialize_keras_object
        parts = {name: load(config[name]) for name in ("down", "up")}
        return cls(**{**config, **parts})


def _input_axis(layer):
    """The axis of a half's kernel with a row for each code that it takes."""
    if not hasattr(layer, "kernel_size"):
        return 0
    return -1 if hasattr(layer, "output_padding") else -2


def _with_codes(layer, axis, parts, rank):
    """A twin with the first codes of each part along an axis alone."""
    names = ("kernel", "pointwise_kernel", "embeddings")
    name = next(n for n in names if getattr(layer, n, None) is not None)
    kernel = ops.convert_to_tensor(getattr(layer, name))
    kernel = ops.moveaxis(kernel, axis, 0)
    kernel = ops.reshape(kernel, (parts, -1, *kernel.shape[1:]))[:, :rank]
    kernel = ops.reshape(kernel, (parts * rank, *kernel.shape[2:]))
    kernel = ops.cast(ops.moveaxis(kernel, 0, axis), layer.compute_dtype)
    names = [n for n in (name, f"_{name}") if n in vars(layer)]
    return twin(layer, _input_spec=None, **dict.fromkeys(names, kernel))


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
        return ops.matmul(self._kept(self._down, 1), self._kept(self._up, 0))

    def _kept(self, view, axis):
        """A half's matrix, its columns or rows of the codes in use."""
        matrix, rank = view.matrix(), self.layer.active_rank
        if rank is None or rank >= self.layer.rank:
            return matrix
        numbers = [
            part * self.layer.rank + i
            for part in range(self._down.groups)
            for i in range(rank)
        ]
        return ops.take(matrix, numbers, axis=axis)

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
        b, rank = ops.reshape(b, (*a.shape[::2], -1)), self.layer.active_rank
        return a[..., :rank], b[:, :rank]

    def thin_layers(self, rank, slices=1):
        config = self.layer.down.get_config()
        name = next(n for n in _RANK_ARGUMENTS if n in config)
        if name == "output_shape":
            config[name] = (*config[name][:-1], rank)
        else:
            config[name] = rank * self._down.groups
        up = self.layer.up
        down = type(self.layer.down).from_config(config)
        self._down.copy_rest(down)
        return [down, type(up).from_config(up.get_config())]

    @property
    def quantized(self):
        return False

    def _sizes(self):
        return self._down.n_in, self._up.n_out
