"""LoRA for layers that hold several kernels: experts, recurrent layers."""

import inspect
import math

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.checks import is_small
from keras_spectral._internal.layer_tools import take_signature
from keras_spectral._internal.products import with_pairs
from keras_spectral._internal.twin import twin
from keras_spectral.kernels.view import wide_dtype
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.adapter import Stack
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.host import Host
from keras_spectral.layers.kernel_host import joined

_RECURRENT = (keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN)


class MultiKernelHost(Host):
    """Runs a layer with low-rank changes of several of its kernels."""

    opens_base = True

    def __init__(self, layer, *args, **kwargs):
        super().__init__(layer, *args, **kwargs)
        take_signature(self, layer)

    def call(self, *args, training=None, **kwargs):
        if "training" in inspect.signature(self.layer.call).parameters:
            kwargs["training"] = training

        def run(members):
            pairs = [m.scaled_pairs() for m in members]
            names = pairs[0] if pairs else ()
            found = {n: joined(p[n] for p in pairs) for n in names}
            return self.members()[0].running(found)(*args, **kwargs)

        return self.run_members(run, training)

    def merge(self, members=None) -> float:
        """Folds changes into the base's kernels, as `KernelHost.merge`."""
        lost = size = 0.0
        members = self.members() if members is None else members
        merged = {}
        for name, kernel in members[0].kernels().items():
            wide = ops.cast(kernel, wide_dtype(kernel.dtype))
            change = sum(m.delta(name) * m.current_strength() for m in members)
            total = wide + ops.cast(change, wide.dtype)
            if not ops.all(ops.isfinite(total)):
                raise ValueError(
                    f"The merged kernel '{name}' of layer '{self.name}' holds "
                    "NaN or infinite values, so nothing was merged. The "
                    "training probably diverged: load an earlier adapter file."
                )
            merged[name] = kernel, total, change
        for kernel, total, change in merged.values():
            kernel.assign(ops.cast(total, kernel.dtype))
            if is_small(kernel.dtype):
                rest = ops.cast(kernel, total.dtype) - total
                lost += float(ops.sum(ops.square(rest)))
                size += float(ops.sum(ops.square(change)))
        return math.sqrt(lost / size) if size else 0.0


class MultiKernelLoRA(AdapterLayer, MultiKernelHost):
    """Base class: a pair A, B for each of a layer's kernels.

    Kernels are (.., n_in, n_out), A is (.., n_in, rank), uniform in
    +-sqrt(1/n_in), and B (.., rank, n_out), zero at the start.

    Args:
        layer: The base.
        rank: Columns of each A.
        alpha: Strength of the update, not 0. Defaults to `rank`.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).
    """

    only_bias = False

    def __init__(self, layer, rank=8, alpha=None, seed=None, **kwargs):
        super().__init__(layer, **kwargs)
        self.rank = check_rank(rank)
        self.alpha = self.rank if alpha is None else check_alpha(alpha)
        self.seed = check_seed(seed)

    def initial_scale(self):
        return self.alpha / self.rank

    @classmethod
    def view_of(cls, layer):
        return None

    def kernels(self) -> dict[str, keras.Variable]:
        """The base's kernels by their names."""
        raise NotImplementedError

    def running(self, pairs) -> keras.layers.Layer:
        """A twin of the base whose kernels have pairs beside them."""
        raise NotImplementedError

    def build_adapter(self):
        self.pairs = {}
        for name, kernel in self.kernels().items():
            *batch, n_in, n_out = kernel.shape
            if self.rank > min(n_in, n_out):
                raise ValueError(
                    f"Received rank={self.rank} for layer '{self.name}', "
                    f"whose kernel '{name}' is {n_in} x {n_out}. Expected at "
                    f"most {min(n_in, n_out)}; give this layer its own rank "
                    "with `overrides`, or exclude it."
                )
            short, bound = name.lstrip("_"), math.sqrt(1 / n_in)
            seed = derived_seed(self.seed, f"{short}_lora_a")
            start = keras.initializers.RandomUniform(-bound, bound, seed)
            a = self.add_weight(
                name=f"{short}_lora_a",
                shape=(*batch, n_in, self.rank),
                initializer=start,
            )
            b = self.add_weight(
                name=f"{short}_lora_b",
                shape=(*batch, self.rank, n_out),
                initializer="zeros",
            )
            self.pairs[name] = (a, b)

    def scaled_pairs(self):
        """The pairs by kernel, scale and strength in B; zero when off."""
        amount = self.amount
        on = ops.not_equal(amount, 0.0)
        return {
            name: (
                ops.where(on, ops.convert_to_tensor(a), 0.0),
                ops.where(on, b * amount, 0.0),
            )
            for name, (a, b) in self.pairs.items()
        }

    def delta(self, name):
        """The change of one kernel at full strength, in float32."""
        a, b = self.pairs[name]
        return ops.matmul(a, b * self.adapter_scale)

    def forwarded(self, base, name):
        if name in vars(self).get("pairs", {}):
            kernel = getattr(base, name)
            change = sum(
                m.delta(name) * m.adapter_strength for m in self.members()
            )
            return ops.cast(
                ops.cast(kernel, change.dtype) + change, kernel.dtype
            )
        return getattr(base, name)


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
            of three dimensions are multiplied by `ops.einsum`.
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

    >>> class Experts(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.up = self.add_weight(shape=(4, shape[-1], 6))
    ...     def call(self, x):
    ...         return keras.ops.einsum("th,ehm->etm", x, self.up)
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


@keras.saving.register_keras_serializable("keras_spectral")
class MultiKernelStack(Stack, MultiKernelHost):
    """Several adapters around one layer with several kernels."""


MultiKernelLoRA.stack = MultiKernelStack
