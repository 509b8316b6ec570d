"""VeRA: two trained vectors between frozen random factors that all share."""

import math

import keras

from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.sharing import Sharing


@keras.saving.register_keras_serializable("keras_spectral")
class VeRAPair(keras.layers.Layer):
    """The frozen random pair that all VeRADense layers of a model share.

    A (n_in x rank) is uniform in +-sqrt(6/n_in), B (rank x n_out) in
    +-sqrt(6/rank). Files hold both, as the backends draw other numbers.

    Args:
        n_in: Rows of A, as many as the widest layer has inputs.
        n_out: Columns of B, as many as the widest layer has outputs.
        rank: Columns of A.
        seed: Integer seed.
        **kwargs: Keras layer arguments.

    Raises:
        ValueError: A size that is no whole number above 0, or a bad seed.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        rank: int,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.n_in = check_rank(n_in, "n_in")
        self.n_out = check_rank(n_out, "n_out")
        self.rank = check_rank(rank)
        self.seed = check_seed(seed)

    def build(self):
        shapes = (self.n_in, self.rank), (self.rank, self.n_out)
        for name, shape in zip(("vera_a", "vera_b"), shapes):
            bound = math.sqrt(6 / shape[0])
            variable = self.add_weight(
                name=name,
                shape=shape,
                initializer=keras.initializers.RandomUniform(
                    -bound, bound, derived_seed(self.seed, name)
                ),
                trainable=False,
            )
            setattr(self, name, variable)

    def get_config(self):
        names = ("n_in", "n_out", "rank", "seed")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **own}


@register_method("vera")
class VeRADense(Sharing, KernelAdapter):
    """Vector-based random matrices: `y = base(x) + x A diag(d) B diag(v)`.

    A and B are frozen and random, and one pair serves all layers of a
    `wrap_model`: each takes A's first n_in rows and B's first n_out columns.
    What trains is d (rank), which starts at `d_initial`, and v (n_out), which
    starts at zero, so the adapted layer starts as the base. These are
    `rank + n_out` numbers a layer, whatever its inputs: ranks are large, and
    so are learning rates.

    It runs as a LoRA of that rank, and merges as one. A file holds the pair
    once.

    Use it where adapters have to be tiny, as for one of many users.

    Start with a learning rate of 0.03 (Adam; `benchmarks/study.py`).

    Source: Kopiczko et al. 2023, arXiv 2310.11454, equation 2.

    Args:
        layer: The base layer; any kind that LoRADense takes.
        rank: Columns of A, the same for all layers; it may exceed n_in.
        d_initial: Where d starts, not 0.
        dropout: Share of inputs dropped before A while training, 0 <= p < 1.
        pair: A `VeRAPair` to share. `wrap_model` makes one; by hand, None
            gives the layer one of its own.
        seed: Integer seed of the pair and of dropout.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether dropout is active.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; dropout on an Embedding; a pair of another
            rank, or too small for the layer; a base that no view covers.

    Example:

    >>> layer = VeRADense(keras.layers.Dense(64), rank=128)
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(128,), (64,)]
    """

    trains = "two vectors around a frozen pair that all layers share"
    shared_argument = "pair"
    shared_kind = VeRAPair
    shared_sizes = ("rank",)

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 256,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        pair: VeRAPair | None = None,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.rank = check_rank(rank)
        self.d_initial = check_alpha(d_initial, "d_initial")
        self.set_dropout(dropout, seed)
        self.set_shared(pair)

    @classmethod
    def make_shared(cls, adapters):
        views = [adapter.view_of(adapter.layer) for adapter in adapters]
        return VeRAPair(
            max(view.n_in for view in views),
            max(view.n_out for view in views),
            adapters[0].rank,
            adapters[0].seed,
            name="vera_pair",
            dtype="float32",
        )

    def build_adapter(self):
        self.build_shared()
        n_in, n_out = self.view.n_in, self.view.n_out
        if n_in > self.pair.n_in or n_out > self.pair.n_out:
            raise ValueError(
                f"Layer '{self.name}' has a kernel of {n_in} x {n_out}, and "
                f"the pair that it is to share serves {self.pair.n_in} x "
                f"{self.pair.n_out}. Expected a larger one: wrap all layers "
                "at once, or give this one an adapter name of its own."
            )
        self.vera_d = self.add_weight(
            name="vera_d",
            shape=(self.rank,),
            initializer=keras.initializers.Constant(self.d_initial),
        )
        self.vera_v = self.add_weight(
            name="vera_v", shape=(n_out,), initializer="zeros"
        )

    def factors(self):
        a = self.pair.vera_a[: self.view.n_in]
        b = self.pair.vera_b[:, : self.view.n_out]
        return a * self.vera_d, b * self.vera_v
