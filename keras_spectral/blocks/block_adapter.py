"""The base of adapters of a whole transformer block."""

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._internal.layer_tools import take_signature
from keras_spectral._internal.twin import rerouted
from keras_spectral.blocks.kinds import BlockView
from keras_spectral.blocks.kinds import require_kind
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.adapter import Stack
from keras_spectral.layers.host import Host


class Run:
    """One call of a block, as the adapter's parts see it.

    Attributes:
        inputs: The block's input (batch, tokens, width).
        padding: 1.0 for tokens that count (batch, tokens), or None.
        training: Whether the adapter is being trained.
    """

    def __init__(self, inputs, padding, training):
        self.inputs = inputs
        self.padding = padding
        self.training = training

    def mean(self, values):
        """The mean over tokens that count of values (batch, tokens, n)."""
        values = ops.cast(values, "float32")
        middle = list(range(1, len(values.shape) - 1))
        if self.padding is None or len(middle) != 1:
            return ops.mean(values, axis=middle)
        weights = self.padding[..., None]
        total = ops.maximum(ops.sum(weights, axis=1), 1.0)
        return ops.sum(values * weights, axis=1) / total


class BlockHost(Host):
    """Runs a block with what its members put inside of it.

    It runs a twin of the block, some of whose pieces run through code of the
    members, those of the later around those of the earlier. The block itself
    stays as it is, so several threads can run it, and what is inside can be
    wrapped as well.
    """

    opens_base = True

    def __init__(self, layer, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        take_signature(self, layer)

    def call(self, *args, training=None, **kwargs):
        def run(members):
            return self._run(members, args, kwargs, training)

        return self.run_members(run, training)

    def _run(self, members, args, kwargs, training):
        # Blocks disagree on the name of their input.
        inputs = (*args, *kwargs.values())[0]
        runs, detours = [], []
        for member in members:
            padding = member.view.padding(args, kwargs)
            trains = is_training(training) and member.trainable
            run = Run(inputs, padding, trains)
            member.begin(run)
            runs.append((member, run))
            detours += member.detours(run)
        outputs = rerouted(self.layer, detours)(*args, **kwargs)
        for member, run in runs:
            outputs = member.end(outputs, run)
        return outputs


class BlockAdapter(AdapterLayer, BlockHost):
    """Base class of adapters around a transformer block.

    A method supplies its weights (`build_adapter`) and names, by `detours`,
    the pieces of the block (a projection, the attention itself, the end of
    the feed-forward net) that run through code of its own; `self.view` is a
    `BlockView`, `self.amount` what it is multiplied by. Blocks cannot be
    merged, because what is added is no change of a kernel.

    Args:
        layer: The base: a block of a kind in `blocks/kinds.py`, or of one
            that `register_block` was given.
        adapter_name: The adapter's name.
        **kwargs: Keras layer arguments.

    Call arguments:
        inputs: What the block takes; further arguments go to the block.
        training: Boolean.

    Input shape: the block's. Output shape: the block's.

    Raises:
        ValueError: The base is of no known kind, or an adapter already.
    """

    default_target = "blocks"
    merges = False

    @classmethod
    def check_base(cls, layer):
        require_kind(layer)

    @classmethod
    def view_of(cls, layer):
        return BlockView(layer)

    def begin(self, run):
        """Computes what comes before the block."""

    def detours(self, run):
        """The detours inside of the block, see `rerouted`."""
        raise NotImplementedError

    def end(self, outputs, run):
        """What the adapter returns for the block's outputs."""
        return outputs

    def check_mergeable(self):
        raise ValueError(
            f"Layer '{self.name}' is a {type(self).__name__} and cannot be "
            "merged: what it adds to the block does not change a kernel. "
            "Keep the adapter; `unwrap_model` drops it."
        )


@keras.saving.register_keras_serializable("keras_spectral")
class BlockStack(Stack, BlockHost):
    """Several adapters around one block."""


BlockAdapter.stack = BlockStack
