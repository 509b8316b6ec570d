"""GatedSpectralDense: one trained gate for each singular direction."""

import keras
from keras import ops

from keras_spectral._backend import eagerly
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.budgeted import Budgeted
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.spectral import add_triplets
from keras_spectral.layers.spectral import check_columns_exist


@register_method("gated_spectral")
class GatedSpectralDense(Budgeted, KernelAdapter):
    """Gated spectral adapter: stretches the kernel's leading directions.

    `K' = K + U_k diag(S_k g) V_k^T`, which is the kernel with its first k
    singular values S_i turned into `S_i (1 + g_i)`. The gates g (k) start
    at zero and are all that trains: k weights a layer. `l1 * sum |g|` joins
    the loss, so that gates which do not help stay closed.

    Use it where an adapter must be tiny, on all linear layers at once, and
    to see which directions a task needs. Merges exactly.

    Start with a learning rate of 0.03 (Adam; `benchmarks/study.py`).

    Source: the gates are of this project; singular value scaling after SVDiff,
    arXiv 2303.11305.

    Args:
        layer: The base layer: any kind that LoRADense takes.
        rank: As for LoRADense: it gives the default of `directions`.
        directions: k, how many gates. Defaults to `2 * rank`, the rank that
            a spectral update of `rank` can have, or as many as there are.
        l1: Weight of the sum of gate sizes in the loss, at least 0.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean; changes nothing here.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; more directions than min(n_in, n_out); a
            base that no view covers.

    Example:

    >>> layer = GatedSpectralDense(keras.layers.Dense(64), directions=4)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> _ = layer.gates.assign([0.5, 0.0, -0.2, 0.001])
    >>> layer.active_gates(threshold=0.01)
    2
    """

    default_target = "all-linear"
    trains = "a gate for each leading singular direction"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        directions: int | None = None,
        l1: float = 1e-4,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        if directions is not None:
            directions = check_rank(directions, "directions")
        self.rank = check_rank(rank)
        self.directions = directions
        self.l1 = check_number(l1, "l1", 0)

    def triplets_needed(self, view):
        known = min(view.n_in, view.n_out)
        count = self.directions or min(2 * self.rank, known)
        check_columns_exist(self, view, range(count))
        return count

    def build_adapter(self):
        self.directions = self.triplets_needed(self.view)
        add_triplets(self, range(self.directions))
        with eagerly():  # it holds a tensor
            l1 = keras.regularizers.L1(self.l1) if self.l1 else None
        self.gates = self.add_weight(
            name="gates",
            shape=(self.directions,),
            initializer="zeros",
            regularizer=l1,
        )

    def factors(self):
        return self.u, (self.s * self.gates)[:, None] * ops.transpose(self.v)

    def direction_weights(self):
        return self.gates, []

    def active_gates(self, threshold: float = 0.01) -> int:
        """How many gates are larger than `threshold` in size."""
        check_number(threshold, "threshold", 0)
        return int(ops.sum(ops.abs(self.gates) > threshold))

    def prune_gates(self, threshold: float = 0.01) -> int:
        """Sets all other gates to zero.

        Returns:
            How many gates stay.
        """
        check_number(threshold, "threshold", 0)
        gates = ops.convert_to_tensor(self.gates)
        keep = ops.abs(gates) > threshold
        self.gates.assign(ops.where(keep, gates, 0.0))
        return int(ops.sum(keep))
