"""AdaLoRADense: a LoRA in the form of an SVD, whose rank can be taken away."""

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral.checks import check_number
from keras_spectral.checks import derived_seed
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.lora import check_max_rank
from keras_spectral.layers.lora import set_rank_and_alpha

_STDDEV = 0.02
_SMALL = 1e-5


@register_method("adalora")
class AdaLoRADense(AdapterLayer):
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
    `RankBudget` it is a LoRA with `rank` more weights.

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
    [(32, 4), (4,), (4, 64)]
    """

    trains = "triplets A, E, B, whose rank can be taken away"

    def __init__(
        self,
        layer,
        rank=12,
        alpha=None,
        orthogonality=0.1,
        dropout=0.0,
        seed=None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        set_rank_and_alpha(self, rank, alpha)
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
        check_max_rank(self)
        view, rank = self.view, self.rank
        self.lora_a, self.lora_e, self.lora_b = (
            self.add_weight(name=f"lora_{name}", shape=shape, initializer=start)
            for name, shape, start in (
                ("a", (view.n_in, rank), _normal(self.seed, "a")),
                ("e", (rank,), "zeros"),
                ("b", (rank, view.n_out), _normal(self.seed, "b")),
            )
        )
        share = keras.initializers.Constant(1 / self._layers_of_model)
        self.layer_share = self.add_weight(
            name="layer_share", shape=(), initializer=share, trainable=False
        )

    def initial_scale(self):
        return self.alpha / (self.rank + _SMALL)

    def call(self, inputs, training=None, **kwargs):
        if self.orthogonality and is_training(training):
            self.add_loss(self.orthogonality * self.penalty())
        return super().call(inputs, training=training, **kwargs)

    def factors(self):
        return self.lora_a * self.lora_e, self.lora_b

    def penalty(self):
        """This layer's share of the mean distance from orthonormality."""
        a, b = map(ops.convert_to_tensor, (self.lora_a, self.lora_b))
        grams = ops.matmul(ops.transpose(a), a), ops.matmul(b, ops.transpose(b))
        size = sum(ops.norm(gram - ops.eye(self.rank)) for gram in grams)
        return self.layer_share * size / 2

    def active_rank(self) -> int:
        """How many triplets are on."""
        e = ops.convert_to_numpy(self.lora_e)
        return int((e != 0).sum())


def _normal(seed, name):
    seed = derived_seed(seed, f"lora_{name}")
    return keras.initializers.RandomNormal(0.0, _STDDEV, seed)
