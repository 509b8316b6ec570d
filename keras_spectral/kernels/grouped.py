"""Grouped convolutions that run as many small ones where that is faster."""

import functools

import keras
from keras import ops

from keras_spectral._internal.twin import twin

# More groups take longer to compile than they save.
_MOST_APART = 64


def runs_apart(groups: int) -> bool:
    """Whether so many groups run as convolutions of their own.

    On a CPU the gradient of a grouped convolution takes JAX and TensorFlow
    10 to 50 times as long as that of the small ones, its output up to 5
    times; PyTorch and GPUs have code for it.
    """
    if groups == 1 or groups > _MOST_APART:
        return False
    return keras.backend.backend() != "torch" and _on_cpu()


@functools.cache
def _on_cpu():
    devices = keras.distribution.list_devices()
    return all(name.lower().startswith("cpu") for name in devices)


def in_groups(convolve, inputs, kernel, groups: int, data_format: str):
    """`convolve(inputs, kernel)` in groups, at once or one by one.

    Args:
        convolve: Function of inputs and a kernel, which counts the groups by
            their channels.
        inputs: Tensor of channels first or last.
        kernel: Tensor (.., channels of a group, filters).
        groups: How many.
        data_format: `"channels_first"` or `"channels_last"`.
    """
    if not runs_apart(groups):
        return convolve(inputs, kernel)
    axis = 1 if data_format == "channels_first" else -1
    parts = ops.split(inputs, groups, axis), ops.split(kernel, groups, -1)
    return ops.concatenate([convolve(x, k) for x, k in zip(*parts)], axis)


class _Grouped:
    """A Keras convolution whose groups run apart where that is faster."""

    def call(self, inputs):
        if not runs_apart(self.groups):
            return super().call(inputs)
        run = super().call

        def convolve(x, kernel):
            names = (n for n in ("kernel", "_kernel") if n in vars(self))
            one = twin(
                self,
                groups=1,
                use_bias=False,
                activation=None,
                **dict.fromkeys(names, kernel),
            )
            return run.__func__(one, x)

        outputs = in_groups(
            convolve, inputs, self.kernel, self.groups, self.data_format
        )
        if self.use_bias:
            ones = (1,) * self.rank
            last = self.data_format == "channels_last"
            shape = (1, *ones, -1) if last else (1, -1, *ones)
            outputs = outputs + ops.reshape(self.bias, shape)
        activation = self.activation
        return outputs if activation is None else activation(outputs)


@keras.saving.register_keras_serializable("keras_spectral")
class GroupedConv1D(_Grouped, keras.layers.Conv1D):
    """`keras.layers.Conv1D`, each group run by itself where that is faster."""


@keras.saving.register_keras_serializable("keras_spectral")
class GroupedConv2D(_Grouped, keras.layers.Conv2D):
    """`keras.layers.Conv2D`, each group run by itself where that is faster."""


@keras.saving.register_keras_serializable("keras_spectral")
class GroupedConv3D(_Grouped, keras.layers.Conv3D):
    """`keras.layers.Conv3D`, each group run by itself where that is faster."""
