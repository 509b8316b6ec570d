"""LiDB: a tiny trained pair between frozen orthogonal factors."""

import math

import keras
from keras import ops

from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter


@register_method("lidb")
class LiDBDense(LowRankAdapter):
    """Lightweight pair: `y = base(x) + s * x (F A) (B G)`.

    F (n_in x down) has orthonormal columns and G (up x n_out) orthonormal
    rows, both random and frozen; A (down x rank) and B (rank x up) train,
    `rank * (down + up)` numbers whatever the layer's size. B starts at zero,
    so the adapted layer starts as the base, A uniform in +-sqrt(1/down).

    Files hold F and G as well, as the backends draw other numbers.

    Use it where very many adapters have to be kept in memory or predicted by
    a network.

    Start with a learning rate of 0.03 (Adam; `benchmarks/study.py`).

    Source: Ruiz et al. 2023, arXiv 2307.06949, section 4.1.

    Args:
        layer: The base layer; any kind that LoRADense takes.
        rank: Columns of A, at least 1.
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        down: Columns of F, at most n_in.
        up: Rows of G, at most n_out.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; `down` or `up` above the kernel's sides, or
            `rank` above both; a base that no view covers.

    Example:

    >>> layer = LiDBDense(keras.layers.Dense(64), down=20, up=10)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(20, 1), (1, 10)]
    """

    trains = "a tiny pair between frozen orthogonal factors"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 1,
        alpha: float | None = None,
        down: int = 100,
        up: int = 50,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        self.down = check_rank(down, "down")
        self.up = check_rank(up, "up")
        self.seed = check_seed(seed)

    def build_adapter(self):
        view, rank = self.view, self.rank
        limits = {"down": view.n_in, "up": view.n_out // view.groups}
        limits["down"] //= view.groups
        for name, limit in limits.items():
            if not rank <= getattr(self, name) <= limit:
                raise ValueError(
                    f"Received {name}={getattr(self, name)}, rank={rank} for "
                    f"layer '{self.name}', whose kernel is {view.n_in} x "
                    f"{view.n_out}. Expected {rank} to {limit}; give this "
                    "layer its own with `overrides`, or exclude it."
                )
        bound = math.sqrt(1 / self.down)
        self.lidb_a = self.add_weight(
            name="lidb_a",
            shape=(self.down, rank),
            initializer=keras.initializers.RandomUniform(
                -bound, bound, derived_seed(self.seed, "lidb_a")
            ),
        )
        self.lidb_b = self.add_weight(
            name="lidb_b", shape=(rank, self.up), initializer="zeros"
        )
        self.outer_a = self._frozen("outer_a", (view.n_in, self.down))
        self.outer_b = self._frozen("outer_b", (self.up, view.n_out))

    def _frozen(self, name, shape):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=keras.initializers.Orthogonal(
                seed=derived_seed(self.seed, name)
            ),
            trainable=False,
        )

    def factors(self):
        a = ops.matmul(self.outer_a, self.lidb_a)
        return a, ops.matmul(self.lidb_b, self.outer_b)
