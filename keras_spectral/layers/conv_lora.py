"""ConvLoRA: LoRA of a convolution, in two factorisations."""

import keras
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.low_rank_pair import LowRankAdapter

_CONVS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


@register_method("conv_lora")
class ConvLoRA(LowRankAdapter):
    """Low-rank adaptation of a convolution: `y = base(x) + s * D * x`.

    `factorization="channel"` makes the correction D a k x .. x k convolution
    to `rank` channels followed by a 1x1, which costs little to run and is
    what HF PEFT stores: `rank * (k..k c_in + c_out)` weights.

    `factorization="loralib"` is that of microsoft/LoRA: with A
    (rank k x c_in k) and B (c_out/groups k x rank k), D is the row-major
    view of B A as (c_out, c_in/groups, k, k). It is no product of
    convolutions, so the layer runs one convolution with the summed kernel:
    `rank k^2 (c_in + c_out/groups)` weights. Square Conv2D kernels only, no
    dropout, as in its source.

    Use it on convolutional networks under a domain shift; "loralib" spends
    more weights at the same rank and reaches full spatial patterns.

    Source: Hu et al. 2021, arXiv 2106.09685, and its repository's Conv2d.

    Args:
        layer: The base: Conv1D, Conv2D or Conv3D, groups allowed.
        rank: Inner channels; for groups, in each group. At most the smaller
            of n_in and n_out (per group); for "loralib" of c_in and
            c_out/groups.
        alpha: Strength of the update; `s = alpha / rank`. Defaults to `rank`.
        dropout: Share of inputs dropped before A while training, 0 <= p < 1.
        scaling: `"standard"` (alpha/rank) or `"rslora"` (alpha/sqrt(rank)).
        initializer: `"kaiming"` (A uniform in +-sqrt(1/fan_in), B zero) or
            `"pissa"` (first singular triplets, see `LoRADense`; "channel"
            only).
        factorization: `"channel"` or `"loralib"`.
        seed: Integer seed of A's start and of dropout.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether dropout is active.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option or combination; a rank that is too large; a
            base that is no convolution, or not square for "loralib".

    Example:

    >>> conv = keras.layers.Conv2D(16, 3, padding="same")
    >>> layer = ConvLoRA(conv, rank=2)
    >>> tuple(layer(keras.ops.ones((1, 8, 8, 4))).shape)
    (1, 8, 8, 16)
    """

    default_target = "conv"
    trains = "a thin pair of convolutions"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        scaling: str = "standard",
        initializer: str = "kaiming",
        factorization: str = "channel",
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.set_lora_options(rank, alpha, dropout, scaling, initializer, seed)
        check_choice(factorization, "factorization", ("channel", "loralib"))
        _check_loralib(layer, factorization, initializer, dropout)
        self.factorization = factorization

    @classmethod
    def check_base(cls, layer):
        super().check_base(layer)
        if not isinstance(layer, _CONVS):
            raise ValueError(
                f"Layer '{layer.name}' is a {type(layer).__name__}. ConvLoRA "
                "expects Conv1D, Conv2D or Conv3D; LoRADense covers the others."
            )

    @property
    def is_low_rank(self):
        return self.factorization == "channel"

    def build_adapter(self):
        if self.factorization == "channel":
            self.pair = self.lora_pair()
            return
        size, _, c_in, c_out = self.layer.kernel.shape
        c_in, c_out = c_in * self.layer.groups, c_out // self.layer.groups
        if self.rank > min(c_in, c_out):
            raise ValueError(
                f"Received rank={self.rank} for layer '{self.name}' with "
                f"{c_in} channels in and {c_out} out per group. Expected at "
                f"most {min(c_in, c_out)}; use `overrides` or `exclude`."
            )
        bound = (c_in * size) ** -0.5
        self.lora_a = self.add_weight(
            name="lora_a",
            shape=(self.rank * size, c_in * size),
            initializer=keras.initializers.RandomUniform(
                -bound, bound, derived_seed(self.seed, "lora_a")
            ),
        )
        self.lora_b = self.add_weight(
            name="lora_b",
            shape=(c_out * size, self.rank * size),
            initializer="zeros",
        )

    @property
    def forms_kernel(self):
        return self.factorization == "loralib"

    def factors(self):
        return self.pair.factors()

    def kernel_change(self):
        size, _, c_in, c_out = self.layer.kernel.shape
        product = ops.matmul(self.lora_b * self.adapter_scale, self.lora_a)
        return loralib_kernel(product, size, c_in, c_out)


def loralib_kernel(product, size, c_in, c_out):
    """B A viewed row by row as (c_out, c_in, k, k), as a Keras kernel."""
    kernel = ops.reshape(product, (c_out, c_in, size, size))
    return ops.transpose(kernel, (2, 3, 1, 0))


def _check_loralib(layer, factorization, initializer, dropout):
    if factorization == "channel":
        return
    square = len(set(layer.kernel_size)) == 1
    if not isinstance(layer, keras.layers.Conv2D) or not square:
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}, kernel "
            f"{tuple(layer.kernel_size)}) does not fit "
            "factorization='loralib', which needs a square Conv2D kernel. "
            "Use factorization='channel'."
        )
    if initializer != "kaiming" or dropout:
        raise ValueError(
            f"Received initializer={initializer!r}, dropout={dropout} with "
            "factorization='loralib'. Expected 'kaiming' and 0; "
            "factorization='channel' has both."
        )
