"""IA3: a trained factor for each output, or for each input."""

import re

import keras
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.kernel_adapter import KernelAdapter

# The second layer of a feed-forward net, as KerasHub's models call it. Names
# that others have as well count below a block or a net of a known name.
FEED_FORWARD_OUTPUT = re.compile(
    r"(.*/)?(.*_)?(feedforward_output_dense|ffw_linear|down_proj"
    r"|mlp_dense_2|mlp_output_dense|dense_4h_to_h)"
    r"|(.*/)?mlp/(dense_2|fc2)"
    r"|(.*/)?encoder_block_\d+/dense_2"
    r"|(.*/)?transformer_(en|de)coder_layer_\d+/output_projector"
)


@register_method("ia3")
class IA3(KernelAdapter):
    """Scales a layer's outputs or inputs: `y = base(x) * l`, `base(x * l)`.

    The factors l start at one, so the adapted layer starts as the base: n_out
    of them with `side="output"`, which scale the bias as well, or n_in with
    `side="input"`. It merges exactly: into the kernel's columns and the bias,
    or into its rows.

    Its authors scale the outputs of key and value projections and the inputs
    of the feed-forward net's second layer; so do the defaults here (preset
    `"key-value-ffn"`; a fused projection is scaled as a whole). The layer is
    known by its name, as KerasHub gives it: elsewhere say
    `target=` and `overrides={regex: {"side": "input"}}`.

    Outputs are scaled before the base's activation, like all changes here.
    The authors' factors come after it, which is the same in the projections
    that they scale: these have none.

    Start with a learning rate of 0.1 (Adam; `benchmarks/study.py` tried no
    higher one).

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.

    Args:
        layer: The base: any layer with a column for each output, which
            transposed convolutions do not have.
        side: `"output"` or `"input"`. None is `"input"` in what is by its
            name the second layer of a feed-forward net, else `"output"`.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a base that no view covers, a transposed
            convolution or a ReversibleEmbedding; with `side="input"` an
            Embedding, a SeparableConv or a convolution with a kernel larger
            than 1, whose rows are no inputs. `merge_model` of a bias whose
            numbers several columns share (an EinsumDense's `bias_axes`).

    Example:

    >>> layer = IA3(keras.layers.Dense(3))
    >>> outputs = layer(keras.ops.ones((2, 4)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(3,)]
    """

    default_target = "key-value-ffn"
    trains = "a factor for each output, or for each input"
    one_direction = True
    scales_columns = True
    reads_kernel = True

    def __init__(
        self, layer: keras.layers.Layer, side: str | None = None, **kwargs
    ):
        super().__init__(layer, **kwargs)
        check_choice(side, "side", (None, "output", "input"))
        known = FEED_FORWARD_OUTPUT.fullmatch(layer.path or layer.name)
        self.side = side or ("input" if known else "output")

    @property
    def changes_inputs(self):
        return self.side == "input"

    @property
    def needs_outputs(self):
        return self.side == "output"

    def build_adapter(self):
        view = self.view
        size = view.n_in if self.changes_inputs else view.n_out
        self.gains = self.add_weight(
            name="gains", shape=(size,), initializer="ones"
        )

    def change(self, inputs, outputs, training=None, **kwargs):
        return outputs * self.view.spread(self.gains - 1, outputs)

    def input_change(self, inputs):
        return inputs * self.view.spread_inputs(self.gains - 1, inputs)

    def delta_matrix(self):
        kernel = self.view.matrix()
        change = ops.cast(self.gains - 1, kernel.dtype)
        return kernel * (change[:, None] if self.changes_inputs else change)

    def bias_change(self):
        if self.changes_inputs:
            return None
        return self.view.scaled_bias(self.gains - 1)
