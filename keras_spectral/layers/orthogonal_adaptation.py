"""Orthogonal adaptation: adapters whose changes are orthogonal."""

import keras
import numpy as np

from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import check_whole
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter
from keras_spectral.layers.low_rank_pair import LowRankPair


@register_method("orthogonal_adaptation")
class OrthogonalAdaptation(LowRankAdapter):
    """LoRA in an input subspace of its own: `y = base(x) + s * x A B`.

    A (n_in x rank) is frozen: columns `index * rank` to `(index + 1) * rank`
    of a random orthonormal basis that `seed` alone determines. B (rank x
    n_out) trains and starts at zero, so the adapted layer starts as the base.
    Adapters of one seed and of different indices see orthogonal parts of the
    input, `A_i^T A_j = 0`: what one has learned the others do not disturb
    when all are on, or merged.

    Use it for many subjects or tasks that are trained apart and used at once.

    Start with a learning rate of 0.01 (Adam; `benchmarks/study.py`).

    Source: Po et al. 2023, arXiv 2312.02432, section 4.2.

    Args:
        layer: The base layer; any kind that LoRADense takes.
        rank: Columns of A, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        index: Which part of the basis, from 0: another one for each adapter.
        seed: Integer seed of the basis, the same for all.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            an index that the basis has no columns for; a base that no view
            covers.

    Example:

    >>> layer = OrthogonalAdaptation(keras.layers.Dense(64), rank=4, index=1)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(4, 64)]
    """

    trains = "the second factor of a thin pair, the first being its own part"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        index: int = 0,
        seed: int = 0,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        self.index = check_whole(index, "index")
        self.seed = check_seed(seed)
        if self.seed is None:
            raise ValueError(
                "Received seed=None. Expected a number, the same for all "
                "adapters that have to be orthogonal."
            )

    def build_adapter(self):
        rows = self.view.n_in // self.view.groups
        last = (self.index + 1) * self.rank
        if last > rows:
            raise ValueError(
                f"Received index={self.index}, rank={self.rank} for layer "
                f"'{self.name}', whose inputs have {rows} dimensions: that is "
                f"room for {rows // self.rank} adapters of this rank. Expected "
                "a smaller index or rank, or exclude the layer."
            )

        def start(shape, dtype=None):
            basis = _basis(rows, last, self.seed)[:, -self.rank :]
            return np.tile(basis, (self.view.groups, 1)).astype("float32")

        self.pair = LowRankPair(
            self, self.view, self.rank, a_start=start, trains="b"
        )

    def factors(self):
        return self.pair.factors()


def _basis(rows, columns, seed):
    """The first columns of an orthonormal basis; more do not change them."""
    drawn = np.random.default_rng(seed).normal(size=(columns, rows))
    q, r = np.linalg.qr(drawn.T)
    return q * np.sign(np.diag(r))
