"""Views of embedding tables."""

from keras import ops

from keras_spectral.kernels.view import KernelView


class EmbeddingView(KernelView):
    """An embedding table: A is indexed by token id."""

    kernel_name = "embeddings"

    def down(self, inputs, a):
        return ops.take(a, ops.cast(inputs, "int32"), axis=0)

    def up(self, codes, b):
        return ops.matmul(codes, b)

    def _sizes(self):
        return self.layer.input_dim, self.layer.output_dim

    def _probe(self):
        table = self.layer(ops.arange(self.n_in))
        return ops.cast(table, "float32")


class ReversibleEmbeddingView(EmbeddingView):
    """A table that is also the output projection: `x K^T` in reverse."""

    def apply(self, inputs, a, b, reverse=False):
        if not reverse:
            return super().apply(inputs, a, b)
        if not self.layer.tie_weights:
            return ops.zeros((), inputs.dtype)
        return ops.matmul(
            ops.matmul(inputs, ops.transpose(b)), ops.transpose(a)
        )
