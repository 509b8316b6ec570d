"""AdaLoRADense: a LoRA in the form of an SVD, whose rank can be taken away."""

import warnings

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.budgeted import Budgeted
from keras_spectral.layers.low_rank_pair import LowRankAdapter
from keras_spectral.layers.low_rank_pair import LowRankPair

_STDDEV = 0.02
_SMALL = 1e-5
_WARNED: list[str] = []


@register_method("adalora")
class AdaLoRADense(Budgeted, LowRankAdapter):
    """Low-rank adaptation by triplets: `y = base(x) + s * x (A * E) B`.

    A (n_in x rank) and B (rank x n_out) start normal with deviation 0.02, E
    (rank) at zero, so the adapted layer starts as the base. `s` is
    `alpha / (rank + 1e-5)`. A triplet (column of A, number of E, row of B) is
    switched off by setting its E to zero: `callbacks.RankBudget` does that to
    the least important ones of all layers together, so that some layers end
    with many and others with few. `compact_ranks` then drops what is off.

    While training, `orthogonality` times the mean over the model's layers of
    `||A^T A - I||_F` and `||B B^T - I||_F` joins the loss, which keeps
    triplets apart from each other.

    Use it where a budget of weights has to be spread over a model. Without
    `RankBudget` it is a LoRA with `rank` more weights, and the first one of a
    process that trains so warns.

    Start with a learning rate of 0.01 (Adam; `benchmarks/study.py`).

    Source: Zhang et al. 2023, arXiv 2303.10512, equations 3 and 5.

    Args:
        layer: The base layer; any kind that LoRADense takes.
        rank: Triplets at the start, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`.
        orthogonality: Weight of the penalty, at least 0.
        dropout: Share of inputs dropped before A while training, 0 <= p < 1.
        seed: Integer seed of the starts and of dropout.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether dropout and the penalty are active.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above the kernel's smaller dimension;
            dropout on an Embedding; a base that no view covers.

    Example:

    >>> layer = AdaLoRADense(keras.layers.Dense(64), rank=4)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(32, 4), (4, 64), (4,)]
    """

    trains = "triplets A, E, B, whose rank can be taken away"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 12,
        alpha: float | None = None,
        orthogonality: float = 0.1,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_rank(rank, alpha)
        self.orthogonality = check_number(orthogonality, "orthogonality", 0)
        self.set_dropout(dropout, seed)
        self._layers_of_model = 1

    @classmethod
    def connect(cls, adapters):
        for adapter in adapters:
            adapter._layers_of_model = len(adapters)
            if adapter.built:
                adapter.layer_share.assign(1 / len(adapters))

    def build_adapter(self):
        starts = [_normal(self.seed, name) for name in "ab"]
        LowRankPair(self, self.view, self.rank, *starts)
        self.lora_e = self.add_weight(
            name="lora_e", shape=(self.rank,), initializer="zeros"
        )
        share = keras.initializers.Constant(1 / self._layers_of_model)
        self.layer_share = self.add_weight(
            name="layer_share", shape=(), initializer=share, trainable=False
        )

    def initial_scale(self):
        return self.alpha / (self.rank + _SMALL)

    def factors_of_step(self, training):
        trains = is_training(training) and self.trainable
        if trains and self.budget is None:
            _warn_once(self.name)
        if trains and self.orthogonality:
            self.add_loss(self.orthogonality * self.penalty())
        return self.factors()

    def factors(self):
        return self.lora_a * self.lora_e, self.lora_b

    def direction_weights(self):
        return self.lora_e, [(self.lora_a, 0), (self.lora_b, 1)]

    def penalty(self):
        """This layer's share of the mean distance from orthonormality."""
        a, b = map(ops.convert_to_tensor, (self.lora_a, self.lora_b))
        grams = ops.matmul(ops.transpose(a), a), ops.matmul(b, ops.transpose(b))
        size = sum(ops.norm(gram - ops.eye(self.rank)) for gram in grams)
        return self.layer_share * size / 2


def _normal(seed, name):
    seed = derived_seed(seed, f"lora_{name}")
    return keras.initializers.RandomNormal(0.0, _STDDEV, seed)


def _warn_once(name):
    """Says, once in a process, that nothing takes triplets away."""
    if _WARNED:
        return
    _WARNED.append(name)
    warnings.warn(
        f"The AdaLoRADense '{name}' trains without RankBudget, so no triplet "
        "is ever taken away: it is a LoRA with a few more weights. Expected "
        "`fit(..., callbacks=[ks.callbacks.RankBudget(target_rank)])`, or "
        "method 'lora'.",
        stacklevel=2,
    )
