"""DyLoRADense: a LoRA whose ranks are nested, to be cut after training."""

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._backend import number_in
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter
from keras_spectral.layers.low_rank_pair import LowRankPair


@register_method("dylora")
class DyLoRADense(LowRankAdapter):
    """Dynamic low-rank adapter: one training for every rank up to `rank`.

    `y = base(x) + (alpha / b) x A[:, :b] B[:b, :]`

    Each training step draws a rank b from 1 to `rank` and uses the first b
    columns of A and rows of B, so that the first ones carry most. Afterwards
    `truncate(b)` chooses any rank for inference and merging, without
    training again; `search_rank` finds the smallest that is good enough.

    With `frozen=True` a step of rank b trains the b-th pair alone, which
    leaves what lower ranks do as it was.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Valipour et al. 2023, arXiv 2210.07558, algorithm 1.

    Args:
        layer: The base layer: any kind that LoRADense takes.
        rank: The largest rank, columns of A.
        alpha: Strength of the correction, not 0. Defaults to `rank`.
        frozen: Whether a step trains only the last of its pairs.
        seed: Integer seed of the start and of the ranks drawn.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether a rank is drawn.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            a base that no view covers.

    Example:

    >>> layer = DyLoRADense(keras.layers.Dense(64), rank=8)
    >>> outputs = layer(keras.ops.ones((2, 32)), training=True)
    >>> layer.truncate(2)
    >>> layer.active_rank()
    2
    """

    trains = "a thin pair whose ranks are nested"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        frozen: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        self.frozen = check_flag(frozen, "frozen")
        self.seed = check_seed(seed)
        self.seed_generator = keras.random.SeedGenerator(
            derived_seed(seed, "ranks")
        )

    def build_adapter(self):
        LowRankPair(self, self.view, self.rank, seed=self.seed)
        self.active = self.add_weight(
            name="active",
            shape=(),
            initializer=keras.initializers.Constant(self.rank),
            trainable=False,
            dtype="int32",
        )

    def initial_scale(self):
        return self.alpha

    def factors_of_step(self, training):
        draws = is_training(training) and self.trainable
        return self._draw() if draws else self.factors()

    def factors(self):
        return self._first(self.active)

    def truncate(self, rank: int) -> None:
        """Uses the first `rank` pairs from now on; larger ranks come back.

        Training draws ranks up to this one.

        Raises:
            ValueError: Not a whole number from 1 to the largest rank.
        """
        check_rank(rank)
        if rank > self.rank:
            raise ValueError(
                f"Received rank={rank} for layer '{self.name}', which has "
                f"{self.rank} pairs. Expected at most as many."
            )
        self.active.assign(int(rank))

    def active_rank(self) -> int:
        """The rank in use."""
        return number_in(self.active)

    def _draw(self):
        """The pairs of this training step, from a rank drawn for it."""
        share = keras.random.uniform((), seed=self.seed_generator)
        active = ops.cast(self.active, "float32")
        rank = ops.minimum(ops.floor(share * active) + 1, active)
        a, b = self._first(rank)
        if not self.frozen:
            return a, b
        last = ops.equal(ops.arange(1, self.rank + 1), ops.cast(rank, "int32"))
        return (
            ops.where(last, a, ops.stop_gradient(a)),
            ops.where(last[:, None], b, ops.stop_gradient(b)),
        )

    def _first(self, rank):
        """A and the first `rank` rows of B, over the rank."""
        rank = ops.cast(rank, "float32")
        used = ops.arange(self.rank, dtype="float32") < rank
        shares = ops.cast(used, "float32") / rank
        a = ops.convert_to_tensor(self.lora_a)
        return a, self.lora_b * shares[:, None]
