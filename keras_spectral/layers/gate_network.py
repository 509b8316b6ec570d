"""GateNetwork: the hypernetwork of the input-conditional gates."""

import keras
from keras import ops

from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed

# Logits start here: every gate closed at inference, and while training a
# gate is open with probability 1 - exp(-exp(-1.25)) = 1/4.
_CLOSED = -1.25


@keras.saving.register_keras_serializable("keras_spectral")
class GateNetwork(keras.layers.Layer):
    """The hypernetwork that all ConditionalSpectralDense layers share.

    `logits = relu([z, e] W1 + b1) W2 + b2` of a context z (rank numbers)
    and a layer embedding e (embedding numbers).

    Args:
        rank: Size of the context, and number of logits.
        hidden: Width of the hidden layer.
        embedding: Size of the layer embeddings.
        seed: Integer seed of the weights' start.
        **kwargs: Keras layer arguments.

    Raises:
        ValueError: A size that is no whole number above 0, or a bad seed.
    """

    def __init__(
        self,
        rank: int,
        hidden: int = 32,
        embedding: int = 8,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.rank = check_rank(rank)
        self.hidden = check_rank(hidden, "hidden")
        self.embedding = check_rank(embedding, "embedding")
        self.seed = check_seed(seed)

    def build(self):
        start = keras.initializers.GlorotUniform(
            derived_seed(self.seed, "hidden_kernel")
        )
        small = keras.initializers.RandomNormal(
            stddev=0.01, seed=derived_seed(self.seed, "logit_kernel")
        )
        closed = keras.initializers.Constant(_CLOSED)
        size = self.rank + self.embedding
        for name, shape, initializer in (
            ("hidden_kernel", (size, self.hidden), start),
            ("hidden_bias", (self.hidden,), "zeros"),
            ("logit_kernel", (self.hidden, self.rank), small),
            ("logit_bias", (self.rank,), closed),
        ):
            variable = self.add_weight(
                name=name,
                shape=shape,
                initializer=initializer,
            )
            setattr(self, name, variable)

    def call(self, inputs):
        hidden = ops.matmul(inputs, self.hidden_kernel) + self.hidden_bias
        return ops.matmul(ops.relu(hidden), self.logit_kernel) + self.logit_bias

    def get_config(self):
        names = ("rank", "hidden", "embedding", "seed")
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **own}
