"""LoRA on recurrent layers."""

import keras
from keras import ops

from keras_spectral._internal.twin import twin
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.multi_kernel import MultiKernelLoRA

_RECURRENT = (keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)


@register_method("lora_recurrent")
class LoRARecurrent(MultiKernelLoRA):
    """LoRA on a recurrent layer: `K + s A B`, and the same beside `K_r`.

    The kernel of an LSTM, GRU or SimpleRNN (n_in x gates * units) and its
    recurrent kernel (units x gates * units) get a pair each, A uniform in
    +-sqrt(1/n_in) and B zero, so that the adapted layer starts as the base.
    As every time step uses the kernels, a call makes the changed ones once,
    before the steps; cuDNN's fast path gets them too. `s = alpha / rank`.
    Merges exactly.

    In a Bidirectional it goes to the layers inside: target these by path,
    `".*/forward_lstm"` and `".*/backward_lstm"`, or by class.

    Source: Hu et al. 2021, arXiv 2106.09685, applied to Hochreiter and
    Schmidhuber 1997 and Cho et al. 2014.

    Args:
        layer: The base: an LSTM, GRU or SimpleRNN.
        rank: Columns of each A, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes; further arguments go to the base.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above a kernel's smaller dimension; a
            layer of another kind.

    Example:

    >>> layer = LoRARecurrent(keras.layers.GRU(6), rank=2)
    >>> outputs = layer(keras.ops.ones((2, 3, 5)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(5, 2), (2, 18), (6, 2), (2, 18)]
    """

    default_target = "recurrent"
    trains = "a thin pair for the kernel and for the recurrent kernel"

    @classmethod
    def check_base(cls, layer):
        if not isinstance(layer, _RECURRENT):
            raise ValueError(
                f"Layer '{layer.name}' is a {type(layer).__name__}. Expected "
                "an LSTM, GRU or SimpleRNN; in a Bidirectional the layers "
                "inside."
            )

    def kernels(self):
        cell = self.layer.cell
        names = ("kernel", "recurrent_kernel")
        return {name: getattr(cell, name) for name in names}

    def running(self, pairs):
        cell, changed = self.layer.cell, {}
        dtype = cell.compute_dtype
        for name, (a, b) in pairs.items():
            kernel = ops.cast(getattr(cell, name), dtype)
            changed[name] = kernel + ops.cast(ops.matmul(a, b), dtype)
        return twin(self.layer, cell=twin(cell, **changed))
