"""Deep LoRA: a product of three factors, whole or compressed."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.kernels.spectra import leading_triplets
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.low_rank_pair import check_fits
from keras_spectral.layers.starts import LOADED


@register_method("deep_lora")
class DeepLoRADense(KernelAdapter):
    """Deep low-rank adaptation: `y = base(x) + x W3 W2 W1`.

    W3 (n_in x width), W2 (width x width) and W1 (width x n_out) start as
    `eps` times orthogonal matrices. So the adapted layer starts next to the
    base, `eps^3` away, and training finds a change of a low rank by itself:
    the fewer examples, the lower. With the default width that is more than
    the kernel's own weights.

    With `rank` it is compressed: `y = base(x) + x L V3 V2 V1 R`, with
    L (n_in x rank), R (rank x n_out) and three V (rank x rank) that start as
    `eps` times the identity. L and R span the directions in which the first
    steps would move the whole factors: half of them are the first singular
    vectors of the kernel's gradient, half what the factors' start makes of
    those of the other side. So training goes nearly the same way with
    `3 rank^2` weights a layer. The gradients are given to `wrap_model`:

        gradients = ks.kernel_gradients(model, dataset, target)
        ks.wrap_model(model, "deep_lora", target, rank=8, gradients=gradients)

    L and R are frozen. With `outer_rate` they train too, and their gradients
    are multiplied by it, which makes it a learning rate's factor under SGD.
    Adam and its like divide by the gradient's size: under them any
    `outer_rate` above 0 does the same, and
    `ks.optimizers.WithRates(optimizer, {".*outer_.*": 0.01})` is what gives L
    and R a rate of their own.

    Use it with few examples, where a LoRA of any rank overfits.

    Start compressed ones with a learning rate of 0.03 (Adam, the highest tried;
    `benchmarks/study.py`).

    Source: Yaras et al. 2024, arXiv 2406.04112.

    Args:
        layer: The base layer; any kind that LoRADense takes.
        rank: None, or the even rank of the compressed form, at most
            min(n_in, n_out).
        width: Columns of W3; by default the larger of n_in and n_out. Not
            with `rank`.
        eps: Size of the start, not 0.
        outer_rate: How fast L and R train, at least 0, where 0 freezes them.
            With `rank` alone.
        seed: Integer seed of the starts.
        start_data: The kernel's gradient as a matrix (n_in x n_out).
            `wrap_model` sees to it.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank that is odd, above the kernel's
            smaller dimension, or without gradients; gradients without a rank,
            or of another shape; a base that no view covers.

    Example:

    >>> layer = DeepLoRADense(keras.layers.Dense(6))
    >>> outputs = layer(keras.ops.ones((2, 5)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(5, 6), (6, 6), (6, 6)]
    """

    trains = "three factors of the change"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int | None = None,
        width: int | None = None,
        eps: float = 1e-3,
        outer_rate: float = 0.0,
        seed: int | None = None,
        start_data: Any = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.rank = None if rank is None else check_rank(rank)
        self.width = None if width is None else check_rank(width, "width")
        self.eps = check_alpha(eps, "eps")
        self.outer_rate = check_number(outer_rate, "outer_rate", 0)
        self.seed = check_seed(seed)
        self.start_data = LOADED if isinstance(start_data, str) else start_data
        _check_form(self)

    def options(self):
        data = None if self.start_data is None else LOADED
        return {**super().options(), "start_data": data}

    def build_adapter(self):
        n_in, n_out = self.view.n_in, self.view.n_out
        if self.rank is None:
            width = self.width or max(n_in, n_out)
            shapes = (n_in, width), (width, width), (width, n_out)
        else:
            check_fits(self, self.rank)
            _check_shape(self)
            shapes = [(self.rank, self.rank)] * 3
            sides = (n_in, self.rank), (self.rank, n_out)
            starts = self.made_late(self._outer, lambda a, b: a, lambda a, b: b)
            for name, shape, values in zip("ab", sides, starts):
                self._add(f"outer_{name}", shape, values, self.outer_rate > 0)
        for name, shape in zip(("deep_3", "deep_2", "deep_1"), shapes):
            self._add(name, shape, self._inner(name), True)

    @property
    def is_low_rank(self):
        return self.rank is not None

    def factors(self):
        inner = ops.matmul(self.deep_3, self.deep_2)
        if self.rank is None:
            return inner, self.deep_1
        a, b = (self._slowed(x) for x in (self.outer_a, self.outer_b))
        return a, ops.matmul(ops.matmul(inner, self.deep_1), b)

    def _slowed(self, weight):
        """A weight as it is, its gradient times `outer_rate`."""
        still = ops.stop_gradient(ops.convert_to_tensor(weight))
        return still + self.outer_rate * (weight - still)

    def _add(self, name, shape, start, trains):
        weight = self.add_weight(shape, start, trainable=trains, name=name)
        setattr(self, name, weight)

    def _inner(self, name):
        seed = derived_seed(self.seed, name)
        if self.rank is None:
            return keras.initializers.Orthogonal(self.eps, seed)
        return keras.initializers.Identity(self.eps)

    def _outer(self):
        """L and R; each block of a grouped convolution has its own."""
        view, data = self.view, self.start_data
        data = np.zeros((view.n_in, view.n_out)) if data is LOADED else data
        blocks = view.blocks(ops.convert_to_tensor(data, "float32"))
        seed = derived_seed(self.seed, "outer")
        draw = keras.initializers.Orthogonal(seed=seed)
        start = draw(blocks.shape[1:], "float32")
        start = ops.tile(start[None], (view.groups, 1, 1))
        left, right = deep_lora_factors(blocks, start, self.rank)
        return view.joined(left, ops.swapaxes(right, -1, -2))


def deep_lora_factors(gradient, start, rank: int):
    """The outer factors of the compressed form.

    The whole factors' first step has the rank `rank`: its directions are the
    first `rank / 2` singular vectors of the gradient, on the one side, and on
    the other what the start, `W3 W2 W1 / eps^3`, makes of those of the other
    side. That is the same space as the null vectors of the authors' code
    leave, without a singular value decomposition of whole factors.

    Args:
        gradient: Tensor (..., n_in, n_out), the kernel's.
        start: Tensor of that shape, a product of orthogonal matrices: its
            columns are orthonormal, or its rows where they are fewer.
        rank: An even number.

    Returns:
        Left (..., n_in, rank) and right (..., n_out, rank). Of the larger
        side it is orthonormal, of both for a square kernel; the other is what
        the start makes of it.
    """
    u, _, v = leading_triplets(gradient, rank // 2)
    back = ops.swapaxes(start, -1, -2)
    if start.shape[-1] >= start.shape[-2]:
        both = ops.concatenate([ops.matmul(back, u), v], axis=-1)
        right = ops.linalg.qr(both)[0]
        return ops.matmul(start, right), right
    both = ops.concatenate([ops.matmul(start, v), u], axis=-1)
    left = ops.linalg.qr(both)[0]
    return left, ops.matmul(back, left)


def _check_shape(adapter):
    """Raises a ValueError for the gradient of another kernel."""
    data, view = adapter.start_data, adapter.view
    if data is not LOADED and np.shape(data) != (view.n_in, view.n_out):
        raise ValueError(
            f"Received a gradient of shape {np.shape(data)} for layer "
            f"'{adapter.name}', whose kernel is {view.n_in} x {view.n_out}. "
            "Expected that of this kernel, from `kernel_gradients`."
        )


def _check_form(adapter):
    """Raises a ValueError for options of the other form."""
    rank, data = adapter.rank, adapter.start_data
    if rank is not None and rank % 2:
        raise ValueError(
            f"Received rank={rank}. Expected an even number, for two halves."
        )
    if (rank is None) != (data is None):
        raise ValueError(
            f"Received rank={rank} for layer '{adapter.name}' "
            f"with{'out' * (data is None)} a gradient. Expected both, "
            "`wrap_model(..., rank=8, gradients=kernel_gradients(model, "
            "dataset))`, or neither."
        )
    if rank is None and adapter.outer_rate or rank and adapter.width:
        raise ValueError(
            f"Received rank={rank}, width={adapter.width} and outer_rate="
            f"{adapter.outer_rate}. Expected `outer_rate` with a rank alone, "
            "`width` without one."
        )
