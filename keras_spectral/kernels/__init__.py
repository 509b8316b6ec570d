"""Every linear layer seen as one matrix, with thin factors on its own input.

`kernel_view(layer)` is the one entry. A new kind of layer is one new view in
this folder and one line in `_VIEWS`, and every method works on it.
"""

import keras

from keras_spectral._internal.checks import check_layer
from keras_spectral.kernels.conv import ConvTransposeView
from keras_spectral.kernels.conv import ConvView
from keras_spectral.kernels.conv import SeparableConvView
from keras_spectral.kernels.dense import DenseView
from keras_spectral.kernels.dense import EinsumDenseView
from keras_spectral.kernels.embedding import EmbeddingView
from keras_spectral.kernels.embedding import ReversibleEmbeddingView
from keras_spectral.kernels.low_rank import LowRank
from keras_spectral.kernels.low_rank import LowRankView
from keras_spectral.kernels.probe import check_view
from keras_spectral.kernels.view import KernelView

__all__ = ["KernelView", "LowRank", "kernel_view", "view_class_of"]

_DEPTHWISE = (
    "a depthwise kernel keeps channels apart (k x k numbers a channel), so "
    "there is no matrix over channels to give a low rank. Train the layer "
    "itself (`trainable=`), or exclude it."
)
_REFUSED = {
    keras.layers.DepthwiseConv1D: _DEPTHWISE,
    keras.layers.DepthwiseConv2D: _DEPTHWISE,
}
# The first match counts, so a subclass stands before its parent.
_VIEWS = {
    keras.layers.ReversibleEmbedding: ReversibleEmbeddingView,
    keras.layers.Dense: DenseView,
    keras.layers.EinsumDense: EinsumDenseView,
    keras.layers.SeparableConv1D: SeparableConvView,
    keras.layers.SeparableConv2D: SeparableConvView,
    keras.layers.Conv1DTranspose: ConvTransposeView,
    keras.layers.Conv2DTranspose: ConvTransposeView,
    keras.layers.Conv3DTranspose: ConvTransposeView,
    keras.layers.Conv1D: ConvView,
    keras.layers.Conv2D: ConvView,
    keras.layers.Conv3D: ConvView,
    keras.layers.Embedding: EmbeddingView,
    LowRank: LowRankView,
}


def kernel_view(layer: keras.layers.Layer) -> KernelView:
    """Returns the view of a built linear layer's kernel as a matrix.

    Args:
        layer: A built Dense, EinsumDense, Conv1D/2D/3D, SeparableConv1D/2D,
            Conv1D/2D/3DTranspose, Embedding, ReversibleEmbedding or LowRank
            layer.

    Raises:
        ValueError: The layer is unbuilt, is of a kind whose kernel has no
            useful low-rank form, has Keras's own LoRA switched on, a kernel
            without numbers, or computes something else than its class does.
    """
    kind, view_class = _kind_of(layer)
    if not layer.built:
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) has no kernel "
            "yet. Expected a built layer. Call the model on a batch or use "
            "`build(input_shape)` first."
        )
    if getattr(layer, "lora_enabled", False):
        raise ValueError(
            f"Layer '{layer.name}' already runs Keras's own LoRA "
            "(`enable_lora`). Expected a plain layer; build the model "
            "without `lora_rank` or `enable_lora`."
        )
    halves = ()
    if view_class is LowRankView:
        halves = map(kernel_view, (layer.down, layer.up))
    view = view_class(layer, *halves)
    if not view.max_rank:
        raise ValueError(
            f"The kernel of layer '{layer.name}' ({type(layer).__name__}) is "
            f"{view.n_in} x {view.n_out} and holds no numbers. Expected at "
            "least 1 x 1: exclude the layer, or check the model's input."
        )
    check_view(view, kind)
    return view


def view_class_of(layer: keras.layers.Layer) -> type[KernelView]:
    """Returns the view class for a layer, or raises a ValueError with why."""
    return _kind_of(layer)[1]


def _kind_of(layer):
    """The class of layers in `_VIEWS` that a layer is of, and its view."""
    check_layer(layer)
    for kind, reason in _REFUSED.items():
        if isinstance(layer, kind):
            raise ValueError(
                f"Layer '{layer.name}' is a {type(layer).__name__}: {reason}"
            )
    for kind, view_class in _VIEWS.items():
        if isinstance(layer, kind):
            return kind, view_class
    names = sorted({kind.__name__ for kind in _VIEWS})
    raise ValueError(
        f"Layer '{layer.name}' is a {type(layer).__name__}, which holds no "
        f"kernel that an adapter can use. Expected one of: {', '.join(names)}."
    )
