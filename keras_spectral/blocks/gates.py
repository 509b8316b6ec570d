"""Gates of a UniPELT block: how much each part takes part, per example."""

import keras
from keras import ops

from keras_spectral._internal.checks import derived_seed
from keras_spectral.blocks.block_adapter import Run
from keras_spectral.blocks.parts import dense
from keras_spectral.blocks.parts import dense_weights

_HIDDEN = 64
_SMALL = 1e-6


class SigmoidGates:
    """A gate for each part from that part's own input z.

    `g = mean over tokens of sigmoid(z w + c)`
    """

    def __init__(self, block, sizes: dict[str, int]):
        self.weights = {
            name: _dense_weights(block, f"gate_{name}", size, 1)
            for name, size in sizes.items()
        }

    def begin(self, run: Run) -> dict:
        """Gates that are known before the block runs, by part."""
        return {}

    def gate(self, name, z, run: Run):
        """The gate (batch,) of a part with input z (batch, tokens, size)."""
        values = dense(ops.cast(z, "float32"), *self.weights[name])
        return run.mean(ops.sigmoid(values))[:, 0]


class SoftmaxGates:
    """Shares of the parts, from the mean of the block's input.

    `shares = softmax(Dense(relu(Dense(mean)))) / temperature)`, equal while
    the first `warmup_steps` training steps last.
    """

    def __init__(self, block, sizes: dict[str, int]):
        self.block = block
        self.names = list(sizes)
        width = block.view.width
        if len(sizes) == 1:  # has all of the sum, without a network
            return
        self.first = _dense_weights(block, "gate_hidden", width, _HIDDEN)
        self.last = _dense_weights(block, "gate_logits", _HIDDEN, len(sizes))

    def begin(self, run):
        if len(self.names) == 1:
            return {self.names[0]: ops.ones((ops.shape(run.inputs)[0],))}
        hidden = ops.relu(dense(run.mean(run.inputs), *self.first))
        logits = dense(hidden, *self.last) / self.block.temperature
        shares = ops.softmax(logits)
        warm = ops.convert_to_tensor(self.block.step) > self.block.warmup_steps
        equal = ops.ones_like(shares) / len(self.names)
        shares = ops.where(warm, shares, equal)
        return dict(zip(self.names, ops.unstack(shares, len(self.names), 1)))


class GumbelGates:
    """Whole parts that are on or off, the same for all examples.

    `on if logit > 0`; while training, on if
    `sigmoid((logit + logistic noise) / temperature) > 1/2`, with the gradient
    of that sigmoid (straight through).
    """

    def __init__(self, block, sizes: dict[str, int]):
        self.block = block
        self.names = list(sizes)
        self.logits = block.add_weight(
            name="gate_logits",
            shape=(len(sizes),),
            initializer=keras.initializers.Constant(1.0),
        )

    def begin(self, run):
        logits = ops.convert_to_tensor(self.logits)
        gates = ops.cast(logits > 0, "float32")
        if run.training:
            uniform = keras.random.uniform(
                logits.shape, _SMALL, 1 - _SMALL, seed=self.block.seed_generator
            )
            noise = ops.log(uniform) - ops.log(1 - uniform)
            soft = ops.sigmoid((logits + noise) / self.block.temperature)
            hard = ops.cast(soft > 0.5, "float32")
            gates = soft + ops.stop_gradient(hard - soft)
        batch = ops.shape(run.inputs)[0]
        return {
            name: ops.broadcast_to(gates[i], (batch,))
            for i, name in enumerate(self.names)
        }

    def probabilities(self):
        """How probable each part is, (parts,)."""
        return ops.sigmoid(ops.convert_to_tensor(self.logits))


def _dense_weights(block, name, n_in, n_out):
    seed = derived_seed(block.seed, f"{name}_kernel")
    start = keras.initializers.RandomNormal(0.0, block.init_stddev, seed)
    return dense_weights(block, name, n_in, n_out, start)


GATES = {
    "sigmoid": SigmoidGates,
    "softmax": SoftmaxGates,
    "gumbel": GumbelGates,
}


def entropy(gates):
    """Mean over examples of `-sum p log p` of gates (batch, parts)."""
    return ops.mean(-ops.sum(gates * ops.log(gates + _SMALL), axis=-1))


def absolute(gates):
    """Mean over examples of `sum |p|` of gates (batch, parts)."""
    return ops.mean(ops.sum(ops.abs(gates), axis=-1))
