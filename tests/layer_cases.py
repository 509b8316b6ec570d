"""One base layer of every kind, with an input, and a numpy way to apply it."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers

from keras_spectral.kernels import kernel_view


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], keras.layers.Layer]
    shape: tuple[int, ...]  # of one batch
    max_rank: int
    size: int  # n_in + n_out
    tokens: int = 0  # vocabulary, for inputs that are ids

    def inputs(self):
        rng = np.random.default_rng(0)
        if self.tokens:
            return rng.integers(0, self.tokens, self.shape).astype("int32")
        return rng.normal(size=self.shape).astype("float32")


def _case(name, make, shape, n_in, n_out, max_rank=None, tokens=0):
    max_rank = max_rank or min(n_in, n_out)
    return Case(name, make, shape, max_rank, n_in + n_out, tokens)


def _einsum(name, equation, output, kernel_in, kernel_out, shape, bias=None):
    def make():
        return layers.EinsumDense(
            equation, output, bias_axes=bias, activation="tanh"
        )

    return _case(f"einsum_{name}", make, shape, kernel_in, kernel_out)


DENSE = [
    _case("dense", lambda: layers.Dense(6, "gelu"), (2, 5), 5, 6),
    _case("dense_3d", lambda: layers.Dense(6), (2, 3, 5), 5, 6),
    _case(
        "dense_no_bias", lambda: layers.Dense(4, use_bias=False), (2, 5), 5, 4
    ),
    _case(
        "dense_layer_activation",
        lambda: layers.Dense(6, activation=layers.LeakyReLU(0.1)),
        (2, 5),
        5,
        6,
    ),
]
EINSUM = [
    _einsum("heads", "abc,cde->abde", (3, 2, 4), 6, 8, (2, 3, 6), "de"),
    _einsum("merge", "abcd,cde->abe", (3, 6), 8, 6, (2, 3, 2, 4), "e"),
    _einsum("plain", "abc,cd->abd", (3, 5), 6, 5, (2, 3, 6), "d"),
    _einsum("kernel_last", "abc,dce->abde", (3, 2, 4), 6, 8, (2, 3, 6)),
    _einsum(
        "three_free", "abc,cdef->abdef", (3, 2, 2, 3), 6, 12, (2, 3, 6), "def"
    ),
    _einsum("out_first", "abcd,ecd->abe", (3, 5), 8, 5, (2, 3, 2, 4)),
    _einsum("ellipsis", "...x,xy->...y", (5,), 6, 5, (2, 3, 6), "y"),
    _einsum("middle", "abc,bd->adc", (5, 4), 3, 5, (2, 3, 4)),
    _einsum("batched", "abc,bcd->abd", (3, 5), 12, 5, (2, 3, 4), "d"),
    _einsum("gemma_qkv", "bsd,kdh->bskh", (3, 2, 4), 6, 8, (2, 3, 6)),
    _einsum("up", "bkm,mvh->bkvh", (3, 2, 4), 6, 8, (2, 3, 6), "vh"),
]


def _conv(name, make, shape, n_in, n_out, max_rank=None):
    return _case(f"conv_{name}", make, shape, n_in, n_out, max_rank)


CONV = [
    _conv(
        "1d", lambda: layers.Conv1D(4, 3, activation="relu"), (2, 7, 3), 9, 4
    ),
    _conv(
        "1d_causal",
        lambda: layers.Conv1D(4, 3, padding="causal", dilation_rate=2),
        (2, 7, 3),
        9,
        4,
    ),
    _conv(
        "2d", lambda: layers.Conv2D(4, 3, padding="same"), (2, 6, 5, 3), 27, 4
    ),
    _conv("2d_strided", lambda: layers.Conv2D(4, 3, 2), (2, 7, 6, 3), 27, 4),
    _conv(
        "2d_dilated",
        lambda: layers.Conv2D(4, (3, 2), dilation_rate=2, use_bias=False),
        (2, 7, 6, 3),
        18,
        4,
    ),
    _conv("2d_1x1", lambda: layers.Conv2D(5, 1), (2, 4, 4, 3), 3, 5),
    _conv("3d", lambda: layers.Conv3D(4, 2, 2), (2, 4, 4, 4, 2), 16, 4),
    _conv(
        "separable",
        lambda: layers.SeparableConv2D(5, 3, depth_multiplier=2),
        (2, 6, 6, 3),
        6,
        5,
    ),
    _conv(
        "transpose",
        lambda: layers.Conv2DTranspose(4, 3, 2, padding="same"),
        (2, 4, 4, 3),
        3,
        36,
    ),
    _conv(
        "transpose_1d", lambda: layers.Conv1DTranspose(4, 3), (2, 5, 3), 3, 12
    ),
]
if keras.backend.backend() != "tensorflow":
    # TensorFlow has no channels-first and no trainable grouped convolution
    # on a CPU: the plain layers fail there as well.
    CONV += [
        _conv(
            "2d_channels_first",
            lambda: layers.Conv2D(4, 3, data_format="channels_first"),
            (2, 3, 6, 5),
            27,
            4,
        ),
        _conv(
            "transpose_channels_first",
            lambda: layers.Conv2DTranspose(
                4, 3, 2, data_format="channels_first"
            ),
            (2, 3, 4, 4),
            3,
            36,
        ),
    ]
GROUPED = [
    _conv(
        "2d_groups",
        lambda: layers.Conv2D(6, 3, groups=2, activation="tanh"),
        (2, 6, 5, 4),
        36,
        6,
        max_rank=3,
    ),
    _conv(
        "1d_groups",
        lambda: layers.Conv1D(6, 3, groups=2, padding="causal"),
        (2, 6, 4),
        12,
        6,
        max_rank=3,
    ),
]
EMBEDDING = [
    _case(
        "embedding",
        lambda: layers.Embedding(9, 5, mask_zero=True),
        (2, 4),
        9,
        5,
        tokens=9,
    )
]
NORMS = [
    _case("norm_layer", layers.LayerNormalization, (2, 3, 5), 1, 5),
    _case("norm_batch", layers.BatchNormalization, (2, 4, 3, 5), 1, 5),
    _case("norm_group", lambda: layers.GroupNormalization(2), (2, 4, 6), 1, 6),
    _case("norm_rms", layers.RMSNormalization, (2, 3, 5), 1, 5),
]
ALL = DENSE + EINSUM + CONV + GROUPED + EMBEDDING
PLAIN_CONV = [c for c in CONV if "separable" not in c.name]
PLAIN_CONV = [c for c in PLAIN_CONV if "transpose" not in c.name] + GROUPED


def columns(layer):
    """How many columns a built layer's kernel has as a matrix."""
    return kernel_view(layer).n_out


def rows(layer):
    """How many rows it has."""
    return kernel_view(layer).n_in


def named(*names):
    """The cases of these names."""
    return [case for case in ALL if case.name in names]


# For most methods, and where each case is compiled: one for each view, and
# for each way of one.
ONE_PER_VIEW = named(
    "dense",
    "einsum_kernel_last",
    "einsum_batched",
    "conv_2d_strided",
    "conv_2d_groups",
    "conv_separable",
    "conv_transpose",
    "embedding",
)


def simplest(cases):
    """A Dense if it is among some cases, else one that runs everywhere."""
    known = [case for case in ONE_PER_VIEW if case in cases]
    return (known or list(cases))[0]


def on_this_backend(cases):
    """PyTorch, which compiles nothing, runs all; the others one per view."""
    everywhere = keras.backend.backend() == "torch"
    known = [*ONE_PER_VIEW, NORMS[0]]
    return [case for case in cases if everywhere or case in known]
