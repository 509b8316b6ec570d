"""Views of embedding tables."""

import math

import keras
from keras import ops

from keras_spectral._backend import thin_product
from keras_spectral.kernels.view import KernelView


class EmbeddingView(KernelView):
    """An embedding table: A is indexed by token id."""

    kernel_name = "embeddings"
    rows_are_inputs = False

    def down(self, inputs, a):
        return ops.take(a, ops.cast(inputs, "int32"), axis=0)

    def input_rows(self, inputs):
        return ops.one_hot(ops.reshape(inputs, (-1,)), self.n_in)

    def up(self, codes, b):
        return thin_product(codes, b)

    def positions(self, input_shape):
        return math.prod(size or 1 for size in input_shape[1:])

    def flops(self, input_shape, rank=None, slices=1):
        # Tables are looked up; the second half of a pair multiplies.
        return 2 * (rank or 0) * self.n_out * self.positions(input_shape)

    def trials(self, rng):
        return [(ops.convert_to_tensor(rng.integers(0, self.n_in, (2, 3))), {})]

    def thin_layers(self, rank, slices=1):
        dtype = self.layer.dtype_policy
        options = self._options("input_dim", "mask_zero")
        return [
            keras.layers.Embedding(
                output_dim=rank, dtype=dtype, name="down", **options
            ),
            keras.layers.Dense(
                self.layer.output_dim, use_bias=False, dtype=dtype, name="up"
            ),
        ]

    def _sizes(self):
        return self.layer.input_dim, self.layer.output_dim

    def _probe(self, numbers=None):
        ids = ops.arange(self.n_in) if numbers is None else numbers
        return ops.cast(self.layer(ops.convert_to_tensor(ids)), "float32")


class ReversibleEmbeddingView(EmbeddingView):
    """A table that is also the output projection: `x K^T` in reverse."""

    def thin_layers(self, rank, slices=1):
        raise ValueError(
            f"Layer '{self.layer.name}' is a ReversibleEmbedding, which runs "
            "in two directions. Expected a layer that a pair can replace: "
            "exclude it."
        )

    def trials(self, rng):
        trials = super().trials(rng)
        if self.layer.tie_weights:
            inputs = rng.normal(size=(2, 3, self.n_out))
            inputs = ops.cast(inputs, self.layer.compute_dtype)
            trials.append((inputs, {"reverse": True}))
        return trials

    def apply(self, inputs, a, b, reverse=False):
        if not reverse:
            return super().apply(inputs, a, b)
        if not self.layer.tie_weights:
            return ops.zeros((), inputs.dtype)
        codes = thin_product(inputs, ops.transpose(b))
        return thin_product(codes, ops.transpose(a))
