"""LoRA on layers that run many experts at once."""

import inspect

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import is_small
from keras_spectral._internal.products import with_pairs
from keras_spectral._internal.twin import twin
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.multi_kernel import MultiKernelLoRA


@register_method("lora_experts")
class LoRAExperts(MultiKernelLoRA):
    """LoRA on fused experts: `y_e = .. (K_e + s A_e B_e) ..` for each expert.

    A layer that runs many experts at once holds kernels of three dimensions,
    (experts, n_in, n_out). Each of these gets a pair for each expert, A
    (experts x n_in x rank) uniform in +-sqrt(1/n_in) and B (experts x rank x
    n_out) zero, so that the adapted layer starts as the base. The pairs run
    beside the kernels inside of the layer's own `call`, expert by expert, and
    never form a kernel. `s = alpha / rank`; no dropout. Merges exactly.

    Use it on KerasHub's mixtures of experts, whose experts are no Dense
    layers: Mixtral, Qwen-MoE, Qwen3-MoE, GPT-OSS, Gemma 4.

    Source: Hu et al. 2021, arXiv 2106.09685; on experts: HF PEFT's
    `target_parameters`.

    Args:
        layer: The base: a layer called Expert(s) or ExpertBank whose kernels
            of three dimensions are multiplied by `ops.einsum`, called so.
        rank: Columns of each A, 1 to min(n_in, n_out).
        alpha: Strength of the update, not 0. Defaults to `rank`, so `s = 1`.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a rank above a kernel's smaller dimension; a
            layer without such kernels, or one that uses them otherwise.

    Example:

    >>> from keras import ops
    >>> class Experts(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.up = self.add_weight(shape=(4, shape[-1], 6))
    ...     def call(self, x):
    ...         return ops.einsum("th,ehm->etm", x, self.up)
    >>> layer = LoRAExperts(Experts(), rank=2)
    >>> outputs = layer(keras.ops.ones((3, 5)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(4, 5, 2), (4, 2, 6)]
    """

    default_target = "experts"
    trains = "a thin pair for each kernel of each expert"

    @classmethod
    def check_base(cls, layer):
        if not is_expert_layer(layer):
            raise ValueError(
                f"Layer '{layer.name}' is a {type(layer).__name__}. Expected a "
                "layer of fused experts, whose kernels have three dimensions."
            )

    def kernels(self):
        return expert_kernels(self.layer)

    def running(self, pairs):
        return with_pairs(self.layer, pairs) if pairs else twin(self.layer)

    def build_adapter(self):
        if not self.kernels():
            raise ValueError(
                f"Layer '{self.name}' ({type(self.layer).__name__}) holds no "
                "kernel of three dimensions."
            )
        super().build_adapter()
        self._probe()

    def _probe(self):
        """Raises unless thin products do what changed kernels would."""
        kernels, rng = self.kernels(), np.random.default_rng(0)
        if any(np.prod(k.shape) > 2**22 for k in kernels.values()):
            return  # as large as a real model's: its kind is known by then
        first = next(iter(kernels.values()))
        dtype = self.layer.compute_dtype
        shapes = {"x": (3, first.shape[1]), "weights": (3, first.shape[0])}
        needed = [
            p
            for p in inspect.signature(self.layer.call).parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        inputs = [
            ops.cast(rng.normal(size=shape), dtype)
            for shape in [*shapes.values()][: len(needed)]
        ]
        pairs, whole = {}, {}
        for name, kernel in kernels.items():
            e, n_in, n_out = kernel.shape
            a, b = rng.normal(size=(e, n_in, 1)), rng.normal(size=(e, 1, n_out))
            pairs[name] = ops.cast(a, dtype), ops.cast(b, dtype)
            change = ops.cast(a @ b, dtype)
            whole[name] = ops.cast(kernel, dtype) + change
        found = ops.convert_to_numpy(
            ops.cast(with_pairs(self.layer, pairs)(*inputs), "float32")
        )
        expected = ops.convert_to_numpy(
            ops.cast(twin(self.layer, **whole)(*inputs), "float32")
        )
        allowed = (0.1 if is_small(dtype) else 1e-3) * np.abs(expected).max()
        if np.abs(found - expected).max() > allowed:
            raise ValueError(
                f"Layer '{self.name}' ({type(self.layer).__name__}) uses its "
                "kernels in a way that LoRAExperts does not know. Expected "
                "`ops.einsum(equation, x, kernel)` in its `call`."
            )


def is_expert_layer(layer: keras.layers.Layer) -> bool:
    """Whether a layer is, by its class's name, a bank of experts."""
    kind = type(layer).__name__
    named = kind.endswith(("Expert", "Experts", "ExpertBank"))
    return named and (not layer.built or bool(expert_kernels(layer)))


def expert_kernels(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """A layer's own weights of three dimensions, by attribute."""
    return {
        name: value
        for name, value in vars(layer).items()
        if isinstance(value, keras.Variable) and len(value.shape) == 3
    }
