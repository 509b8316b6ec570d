"""ConditionalSpectralDense: spectral gates chosen by the input itself."""

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._backend import over_replicas
from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.gate_network import GateNetwork
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.sharing import Sharing
from keras_spectral.layers.spectral import add_triplets
from keras_spectral.layers.spectral import check_columns_exist


@register_method("conditional_spectral")
class ConditionalSpectralDense(Sharing, KernelAdapter):
    """Spectral gates that open or close for each example.

    `y = base(x) + alpha * x U diag(S g) V^T` with the kernel's first r
    singular triplets and gates g (r), 0 or 1, of each example:

    - context: the example's codes x U at its first token, or their mean over
      its (unmasked) tokens, scaled to unit mean square: z (r);
    - a hypernetwork that all layers of one `wrap_model` share, with an
      embedding e of this layer: `logits = MLP([z, e])`;
    - training: `p = sigmoid((logits + Gumbel noise) / temperature)`, gates
      open where p > 1/2, with the gradient of p (straight through);
    - inference: open where `logits > 0`, no noise.

    `l0` times the expected number of open gates an example joins the loss:
    a logit l opens with probability `1 - exp(-exp(l))`. Gates start closed,
    so that the adapted model starts as the base; while training, a quarter
    is open by chance. The hypernetwork and the embeddings are all that
    trains.

    It cannot be merged, because each example has a kernel of its own;
    `freeze_gates` turns it into a GatedSpectralDense, which can.

    Start with a learning rate of 0.1 (Adam, the highest tried in
    `benchmarks/study.py`, whose two epochs it does not learn much in: it ends
    where the head alone does).

    Source: input-conditional spectral gates are of this project;
    straight-through concrete gates: Maddison et al. 2017, arXiv 1611.00712.

    Args:
        layer: The base layer; any kind that LoRADense takes, but none whose
            table is used in both directions (ReversibleEmbedding).
        rank: r, how many directions; equal for all layers that share a
            hypernetwork.
        alpha: How much an open gate stretches its direction, not 0.
        context: `"first"` (token) or `"mean"` (over tokens or pixels).
        temperature: Softness of the gates' gradient, above 0.
        l0: Weight of the expected number of open gates, at least 0.
        hidden: Width of the hypernetwork.
        embedding: Size of the layer embedding.
        network: A `GateNetwork` to share. `wrap_model` makes one; by hand,
            None gives the layer one of its own.
        seed: Integer seed of starts and noise.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes, examples first.
        training: Boolean, whether gates are drawn.
        mask: Boolean (batch, tokens), True for tokens that count.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; `rank` above min(n_in, n_out); sizes unlike
            the network's; a base that no view covers.

    Example:

    >>> layer = ConditionalSpectralDense(keras.layers.Dense(64), rank=4)
    >>> outputs = layer(keras.ops.ones((2, 10, 32)))
    >>> [round(float(share), 2) for share in layer.mean_gates()]
    [0.0, 0.0, 0.0, 0.0]
    """

    default_target = "all-linear"
    trains = "a shared net that gates directions by the input"
    shared_argument = "network"
    shared_kind = GateNetwork
    shared_sizes = ("rank", "hidden", "embedding")
    one_direction = True
    merges = False  # each example has a kernel of its own

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float = 0.1,
        context: str = "first",
        temperature: float = 1.0,
        l0: float = 1e-3,
        hidden: int = 32,
        embedding: int = 8,
        network: GateNetwork | None = None,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        for name, value in (
            ("rank", rank),
            ("hidden", hidden),
            ("embedding", embedding),
        ):
            setattr(self, name, check_rank(value, name))
        self.alpha = check_alpha(alpha)
        self.context = check_choice(context, "context", ("first", "mean"))
        self.temperature = check_number(temperature, "temperature", 1e-6)
        self.l0 = check_number(l0, "l0", 0)
        self.seed = check_seed(seed)
        self.set_shared(network)
        self.seed_generator = keras.random.SeedGenerator(
            derived_seed(seed, "noise")
        )

    @classmethod
    def make_shared(cls, adapters):
        first = adapters[0]
        return GateNetwork(
            first.rank,
            first.hidden,
            first.embedding,
            first.seed,
            name="gate_network",
            dtype="float32",
        )

    def triplets_needed(self, view):
        check_columns_exist(self, view, range(self.rank))
        return self.rank

    def build_adapter(self):
        add_triplets(self, range(self.triplets_needed(self.view)))
        self.build_shared()
        self.layer_embedding = self.add_weight(
            name="layer_embedding",
            shape=(self.embedding,),
            initializer=keras.initializers.RandomNormal(
                seed=derived_seed(self.seed, "layer_embedding")
            ),
        )
        # Running sums since `reset_gates`, for reports and `freeze_gates`.
        self.open_counts, self.example_count = (
            self.add_weight(
                name=name,
                shape=shape,
                initializer="zeros",
                trainable=False,
            )
            for name, shape in (
                ("open_counts", (self.rank,)),
                ("example_count", ()),
            )
        )

    def initial_scale(self):
        return self.alpha

    def added(self, total, inputs, outputs, training, mask, **kwargs):
        codes = self.view.down(inputs, ops.cast(self.u, self.compute_dtype))
        gates = self._gates(codes, mask, training)
        strength = gates * (self.s * self.amount)
        strength = ops.where(ops.not_equal(self.amount, 0.0), strength, 0.0)
        middle = [1] * (len(codes.shape) - 2)
        strength = ops.reshape(strength, (-1, *middle, self.rank))
        codes = codes * ops.cast(strength, codes.dtype)
        v = ops.cast(ops.transpose(self.v), self.compute_dtype)
        change = ops.cast(self.view.up(codes, v), total.dtype)
        return total + self.in_rows(change)

    def _gates(self, codes, mask, training):
        """Gates (batch, rank) of codes (batch, ..., rank)."""
        context = self._context(ops.cast(codes, "float32"), mask)
        size = ops.mean(ops.square(context), axis=-1, keepdims=True)
        context = context / ops.sqrt(size + 1e-6)
        embedding = ops.broadcast_to(
            self.layer_embedding, (ops.shape(context)[0], self.embedding)
        )
        logits = self.network(ops.concatenate([context, embedding], axis=-1))
        gates = ops.cast(logits > 0, "float32")
        if is_training(training) and self.trainable:
            gates = self._draw(logits)
            if self.l0:
                opening = 1 - ops.exp(-ops.exp(logits))
                expected = ops.mean(ops.sum(opening, axis=-1))
                self.add_loss(self.l0 * expected)
        self._count(ops.stop_gradient(gates))
        return gates

    def _draw(self, logits):
        uniform = keras.random.uniform(
            ops.shape(logits), 1e-6, 1 - 1e-6, seed=self.seed_generator
        )
        noise = -ops.log(-ops.log(uniform))
        soft = ops.sigmoid((logits + noise) / self.temperature)
        hard = ops.cast(soft > 0.5, soft.dtype)
        return soft + ops.stop_gradient(hard - soft)

    def _context(self, codes, mask):
        middle = list(range(1, len(codes.shape) - 1))
        if not middle:
            return codes
        if self.context == "first":
            for _ in middle:
                codes = codes[:, 0]
            return codes
        if mask is None or len(mask.shape) != len(middle) + 1:
            return ops.mean(codes, axis=middle)
        weights = ops.cast(mask, codes.dtype)[..., None]
        total = ops.maximum(ops.sum(weights, axis=middle), 1.0)
        return ops.sum(codes * weights, axis=middle) / total

    def _count(self, gates):
        on = ops.not_equal(self.adapter_strength, 0)
        examples = ops.cast(ops.shape(gates)[0], "float32")
        opened, examples = over_replicas([ops.sum(gates, axis=0), examples])
        self.open_counts.assign_add(ops.where(on, opened, 0.0))
        self.example_count.assign_add(ops.where(on, examples, 0.0))

    def mean_gates(self):
        """Share of examples that opened each gate since `reset_gates`."""
        opened, count = (
            ops.convert_to_numpy(x)
            for x in (self.open_counts, self.example_count)
        )
        return opened / max(count, 1.0)

    def active_gates(self) -> float:
        """Mean number of open gates an example since `reset_gates`."""
        return float(ops.sum(self.mean_gates()))

    def reset_gates(self):
        """Forgets which gates were open."""
        self.open_counts.assign(ops.zeros(self.rank))
        self.example_count.assign(0.0)

    def check_mergeable(self):
        raise ValueError(
            f"Layer '{self.name}' has no fixed correction and cannot be "
            "merged: its gates depend on the input, so each example has a "
            "kernel of its own. Fix them first with "
            "`freeze_gates(model, dataset)`."
        )

    def delta_matrix(self):
        """The mean change over the examples seen since `reset_gates`."""
        strength = self.s * self.mean_gates() * self.adapter_scale
        return ops.matmul(self.u * strength, ops.transpose(self.v))
