"""The layer that `dlrt` trains: a kernel as U S V^T of a changing rank."""

import keras
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.linalg import truncated_svd
from keras_spectral.compression.integrator import grown_basis
from keras_spectral.compression.integrator import truncated
from keras_spectral.compression.integrator import turned_core
from keras_spectral.kernels import kernel_view


@keras.saving.register_keras_serializable("keras_spectral")
class DynamicLowRank(keras.layers.Wrapper):
    """A linear layer with kernel `U S V^T`, whose factors `dlrt` trains.

    It starts as the truncated SVD of the layer's kernel.

    Args:
        layer: The layer; its kernel is frozen, its bias trains as before.
        rank: The largest rank, and the one at the start.
        adaptive: Whether the rank changes, for which bases are twice as wide.

    Call arguments:
        inputs: What the layer takes.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int,
        adaptive: bool = True,
        **kwargs,
    ):
        super().__init__(layer, **{"name": layer.name, **kwargs})
        self.max_rank = check_rank(rank)
        self.adaptive = adaptive
        self.supports_masking = layer.supports_masking
        self.probing = False

    def build(self, input_shape=None):
        super().build(input_shape)
        self.view = view = kernel_view(self.layer)
        view.variable().trainable = False
        rank = self.max_rank
        width = 2 * rank if self.adaptive else rank
        rows, columns = min(width, view.n_in), min(width, view.n_out)
        self.u = self._buffer("u", (view.n_in, rows))
        self.s = self._buffer("s", (rows, columns))
        self.v = self._buffer("v", (view.n_out, columns))
        self.k_step = self._buffer("k_step", (view.n_in, columns))
        self.l_step = self._buffer("l_step", (view.n_out, rows))
        self.rank = self._buffer("rank", (), "int32")
        self._start()

    def _buffer(self, name, shape, dtype="float32"):
        return self.add_weight(
            shape=shape,
            initializer="zeros",
            dtype=dtype,
            trainable=False,
            name=name,
        )

    def _start(self):
        u, s, v = truncated_svd(self.view.finite_matrix(), self.max_rank)
        for buffer, value in ((self.u, u), (self.s, ops.diag(s)), (self.v, v)):
            value = ops.cast(value, "float32")
            widths = [(0, b - n) for b, n in zip(buffer.shape, value.shape)]
            buffer.assign(ops.pad(value, widths))
        self.rank.assign(self.max_rank)

    def call(self, inputs):
        view, right = self.view, ops.transpose(self.v)
        codes = view.down(inputs, self._cast(self.u))
        outputs = view.up(ops.matmul(codes, self._cast(self.s)), right)
        if self.probing:
            probed = view.down(inputs, self._cast(self.k_step))
            outputs = outputs + view.up(probed, right)
            outputs = outputs + view.up(codes, ops.transpose(self.l_step))
        bias = view.bias(outputs)
        outputs = outputs if bias is None else outputs + bias
        activation = getattr(self.layer, "activation", None)
        return outputs if activation is None else activation(outputs)

    def _cast(self, factor):
        return ops.cast(factor, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs, mask=None):
        return self.layer.compute_mask(inputs, mask)

    def step_bases(self, k_gradient, l_gradient, rate):
        """K and L steps; then the kernel as it is, in the new bases.

        Args:
            k_gradient: That of the loss by `U S`, with V fixed.
            l_gradient: That by `V S^T`, with U fixed.
            rate: The learning rate.
        """
        u, s, v = (ops.convert_to_tensor(x) for x in (self.u, self.s, self.v))
        k = ops.matmul(u, s) - rate * k_gradient
        left = ops.matmul(v, ops.transpose(s)) - rate * l_gradient
        if self.adaptive:
            basis_u = grown_basis(k, u, self.rank)
            basis_v = grown_basis(left, v, self.rank)
        else:
            (basis_u, _), (basis_v, _) = ops.qr(k), ops.qr(left)
        self.s.assign(turned_core(basis_u, u, s, v, basis_v))
        self.u.assign(basis_u)
        self.v.assign(basis_v)

    def step_core(self, gradient, rate, theta):
        """S step, and with an adaptive rank the truncation."""
        core = self.s - rate * gradient
        if not self.adaptive:
            self.s.assign(core)
            return
        u, s, v, rank = truncated(self.u, core, self.v, theta, self.max_rank)
        self.u.assign(u)
        self.s.assign(s)
        self.v.assign(v)
        self.rank.assign(rank)

    def pair(self):
        """The kernel as numpy arrays A (n_in x r) and B (r x n_out)."""
        u, s, v = map(ops.convert_to_numpy, (self.u, self.s, self.v))
        r = number_in(self.rank)
        return u[:, :r] @ s[:r, :r], v[:, :r].T

    def get_config(self):
        options = {"rank": self.max_rank, "adaptive": self.adaptive}
        return {**super().get_config(), **options}
