"""The base of adapters that live on a whole transformer block."""

from keras import ops

from keras_spectral import surgery
from keras_spectral._backend import is_training
from keras_spectral._internal.twin import rerouted
from keras_spectral.blocks.kinds import BlockView
from keras_spectral.blocks.kinds import require_kind
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.host import Host


class Run:
    """One call of a block, as the adapter's parts see it.

    Attributes:
        inputs: The block's input (batch, tokens, width).
        padding: 1.0 for tokens that count (batch, tokens), or None.
        training: Whether the block is being trained.
    """

    def __init__(self, inputs, padding, training):
        self.inputs = inputs
        self.padding = padding
        self.training = is_training(training)

    def mean(self, values):
        """The mean over tokens that count of values (batch, tokens, n)."""
        values = ops.cast(values, "float32")
        middle = list(range(1, len(values.shape) - 1))
        if self.padding is None or len(middle) != 1:
            return ops.mean(values, axis=middle)
        weights = self.padding[..., None]
        total = ops.maximum(ops.sum(weights, axis=1), 1.0)
        return ops.sum(values * weights, axis=1) / total


class BlockAdapter(AdapterLayer):
    """Base class of adapters around a transformer block.

    The adapter runs a twin of the block, some of whose pieces (a projection,
    the attention itself, the end of the feed-forward net) run through code
    of the adapter: `detours` names them. The block itself stays as it is, so
    several threads can run it, and what is inside can be wrapped as well.

    A method supplies its weights (`build_adapter`) and `detours`;
    `self.view` is a `BlockView`. Blocks cannot be merged, because what is
    added is no change of a kernel.

    Args:
        layer: The base: a block of a kind in `blocks/kinds.py`, or of one
            that `register_block` was told of.
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
    opens_base = True

    def __init__(self, layer, **kwargs):
        super().__init__(layer, **kwargs)
        surgery.take_signature(self, layer)

    @classmethod
    def check_base(cls, layer):
        require_kind(layer)

    @classmethod
    def view_of(cls, layer):
        return BlockView(layer)

    def call(self, *args, training=None, **kwargs):
        # Blocks disagree on the name of their input.
        inputs = (*args, *kwargs.values())[0]
        run = Run(inputs, self.view.padding(args, kwargs), training)
        self.begin(run)
        block = rerouted(self.layer, self.detours(run))
        return self.end(block(*args, **kwargs), run)

    def begin(self, run):
        """What comes before the block."""

    def detours(self, run):
        """What runs differently inside of the block, see `rerouted`."""
        raise NotImplementedError

    def end(self, outputs, run):
        """What the adapter returns for the block's outputs."""
        return outputs

    def freeze_base(self):
        """Keeps the block's weights from training, adapters inside excepted."""
        _freeze(self.layer)

    def factors(self):
        raise ValueError(
            f"Layer '{self.name}' is a {type(self).__name__} and cannot be "
            "merged: what it adds to the block is no change of a kernel. "
            "Keep the adapter; `unwrap_model` drops it."
        )

    def merged_matrix(self):
        return self.factors()

    def delta_matrix(self):
        return self.factors()


def _freeze(layer):
    if isinstance(layer, Host):
        return
    surgery.set_trainable(layer, False, False)
    for child in surgery.sublayers(layer):
        _freeze(child)
