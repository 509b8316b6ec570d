"""LoRA for layers that hold several kernels: experts, recurrent layers."""

import inspect
import math

import keras
from keras import ops

from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.checks import is_small
from keras_spectral._internal.layer_tools import take_signature
from keras_spectral.kernels.view import wide_dtype
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.adapter import Stack
from keras_spectral.layers.host import Host
from keras_spectral.layers.kernel_host import joined


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

    def merged_values(self, members=None):
        """As of all hosts, of several kernels."""
        lost = size = 0.0
        members = self.members() if members is None else members
        values = []
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
            rounded = ops.cast(total, kernel.dtype)
            values.append((kernel, rounded))
            if is_small(kernel.dtype):
                rest = ops.cast(rounded, total.dtype) - total
                lost += float(ops.sum(ops.square(rest)))
                size += float(ops.sum(ops.square(change)))
        return values, math.sqrt(lost / size) if size else 0.0


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

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 8,
        alpha: float | None = None,
        seed: int | None = None,
        **kwargs,
    ):
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


@keras.saving.register_keras_serializable("keras_spectral")
class MultiKernelStack(Stack, MultiKernelHost):
    """Several adapters around one layer with several kernels."""


MultiKernelLoRA.stack = MultiKernelStack
