"""Adapters of one linear layer: changes of its kernel."""

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.checks import is_small
from keras_spectral._internal.twin import without_ending
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels import view_class_of
from keras_spectral.kernels.spectra import Triplets
from keras_spectral.kernels.spectra import factorize
from keras_spectral.kernels.view import wide_dtype
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.adapter import Stack
from keras_spectral.layers.host import Host


class KernelHost(Host):
    """Runs a linear layer with the changes of its members.

    `y = finish(base(x) + sum of strength_n change_n(x, base(x)))` with the
    base up to its activation, and for its matrix `K + sum of strength_n
    (K'_n - K)`. Changes enter before the base's activation; their order does
    not matter.
    """

    def call(self, inputs, training=None, mask=None, **kwargs):
        members = [m for m in self.members() if not m.left_out(training)]
        before = [m for m in members if m.changes_inputs]
        # One run with a changed kernel, unless it has to see other inputs.
        formed = [
            m
            for m in members
            if m.forms_kernel and not before and m.batch_rows is None
        ]
        changed = inputs
        for member in before:
            change = member.weighed(member.input_change(inputs))
            changed = changed + ops.cast(change, inputs.dtype)
        outputs = plain = self._base(formed)(changed, **kwargs)
        if (before or formed) and any(m.needs_outputs for m in members):
            plain = self._base()(inputs, **kwargs)
        for member in members:
            if member not in before and member not in formed:
                outputs = member.added(
                    outputs, inputs, plain, training, mask, **kwargs
                )
        return self._finish(outputs, **kwargs)

    def compute_output_spec(self, inputs, mask=None, **kwargs):
        return super().compute_output_spec(inputs, **kwargs)

    def _base(self, formed=()):
        """The base without activation, some changes in its kernel."""
        if not formed:
            plain = self.view is None
            return without_ending(self.layer) if plain else self.view.bare()
        change = sum(m.amount_of(m.kernel_change()) for m in formed)
        return self.view.with_change(change)

    def _finish(self, outputs, reverse=False):
        """What the base does to its output once the changes are in."""
        cap = getattr(self.layer, "logit_soft_cap", None)
        if reverse and cap is not None:
            outputs = ops.tanh(outputs / cap) * cap
        activation = getattr(self.layer, "activation", None)
        return outputs if activation is None else activation(outputs)

    def merged_matrix(self, members=None):
        """Kernel plus changes as a float32 matrix (n_in x n_out).

        Args:
            members: Those that count; all by default.

        Raises:
            ValueError: It holds a NaN or an infinity, the base is quantised,
                or a member is switched off or cannot be merged.
        """
        members = self.members() if members is None else members
        for member in members:
            member.check_mergeable()
            member.check_active()
        self.view.check_assignable()
        matrix = self.view.matrix()
        total = matrix + ops.cast(_total(members), matrix.dtype)
        if not ops.all(ops.isfinite(total)):
            raise ValueError(
                f"The merged kernel of layer '{self.name}' holds NaN or "
                "infinite values, so nothing was merged. The training "
                "probably diverged: load an earlier adapter file."
            )
        return total

    def merge(self, members=None) -> float:
        """Folds changes into the base's kernel and bias.

        Returns:
            The share of the change that a kernel of 16 bits could not take,
            by the Frobenius norm.
        """
        members = self.members() if members is None else members
        bias = self.merged_bias(members)
        if all(m.only_bias for m in members):
            for member in members:
                member.check_active()
            self._bias().assign(bias)
            return 0.0
        matrix = self.merged_matrix(members)
        change = _total(members)
        self.view.assign(matrix)
        if bias is not None:
            self._bias().assign(bias)
        if not is_small(self.view.variable().dtype):
            return 0.0
        lost, size = ops.norm(self.view.matrix() - matrix), ops.norm(change)
        lost = ops.convert_to_numpy(lost / ops.maximum(size, 1e-30))
        return float(lost)

    def merged_bias(self, members=None):
        """Bias plus changes; None where no member changes it."""
        members = self.members() if members is None else members
        changes = [(m, m.bias_change()) for m in members]
        changes = [
            ops.cast(m.adapter_strength, c.dtype) * c
            for m, c in changes
            if c is not None
        ]
        if not changes:
            return None
        bias = self._bias()
        total = ops.cast(bias, wide_dtype(bias.dtype))
        total = total + ops.cast(sum(changes), total.dtype)
        return ops.cast(total, bias.dtype)

    def _bias(self):
        """The variable that holds the base's bias, or a norm's shift."""
        bias = getattr(self.layer, "bias", None)
        return self.layer.beta if bias is None else bias

    def forwarded(self, base, name):
        view = vars(self).get("view")
        if view is None or view.kernel_name is None:
            return getattr(base, name)
        if name in (view.kernel_name, f"_{view.kernel_name}"):
            matrix = view.matrix()
            total = ops.cast(_total(self.members()), matrix.dtype)
            return view.kernel(matrix + total)
        return getattr(base, name)


def _total(members):
    """The sum of what the members add to the kernel, at their strengths."""
    parts = []
    for member in members:
        delta = member.delta_matrix()
        on = ops.not_equal(member.adapter_strength, 0)
        strength = ops.cast(member.adapter_strength, delta.dtype)
        parts.append(ops.where(on, strength * delta, ops.zeros_like(delta)))
    return sum(parts)


class KernelAdapter(AdapterLayer, KernelHost):
    """Base class of adapters around one linear layer.

    A method supplies its weights (`build_adapter`) and one of these:

    - `factors()`: the pair A (n_in x r), B (r x n_out), if the change of the
      kernel is `scale * A B`; all else follows from it;
    - `change(inputs, outputs, training)`, of the base's output before the
      activation, and `delta_matrix()`, the same of the kernel, `K' - K`;
    - `input_change(inputs)` and `delta_matrix()`, if it changes what the
      base is given (`changes_inputs`);
    - `kernel_change()`, in the kernel's own shape, if it has no thin form
      (`forms_kernel`).

    All are at full strength, the method's own scale included (but for
    `factors`); the strength of the adapter comes on top. The base's `kernel`
    (or `embeddings`) is the effective one.

    Args:
        layer: The base: a layer that `keras_spectral.kernels` has a view of.
        adapter_name: The adapter's name.
        **kwargs: Keras layer arguments.

    Call arguments:
        inputs: What the base takes; further arguments go to the base.
        training: Boolean, whether dropout is active.
        mask: Boolean (batch, tokens), for methods that look at tokens.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: The base is an adapter already, or no view covers it.
    """

    one_direction = False  # whether it fits no table that is read backwards
    scales_columns = False  # whether each column needs an output of its own
    reads_kernel = False  # whether the change hangs on what the kernel holds
    changes_inputs = False
    forms_kernel = False
    only_bias = False  # whether it leaves the kernel alone
    needs_outputs = False  # whether `change` looks at the base's outputs
    dropout = 0.0

    def __init__(self, layer, adapter_name="default", **kwargs):
        super().__init__(layer, adapter_name, **kwargs)
        self._triplets = None

    @classmethod
    def check_base(cls, layer):
        view_class_of(layer)
        last = layer.up if isinstance(layer, LowRank) else layer
        if cls.scales_columns and not view_class_of(last).columns_are_outputs:
            raise ValueError(
                f"Layer '{layer.name}' is a {type(last).__name__}, whose "
                "kernel's columns are no outputs: patches overlap. "
                f"{cls.__name__} expects a layer with a column for each "
                "output channel."
            )
        reversible = isinstance(layer, keras.layers.ReversibleEmbedding)
        if cls.one_direction and reversible:
            raise ValueError(
                f"Layer '{layer.name}' is a ReversibleEmbedding. {cls.__name__}"
                " expects a layer that runs in one direction."
            )

    @classmethod
    def view_of(cls, layer):
        return kernel_view(layer)

    def set_dropout(self, dropout: float, seed: int | None):
        """Keeps `seed` and the share of inputs that a thin pair drops."""
        dropout = check_number(dropout, "dropout", 0, 1)
        if dropout and isinstance(self.layer, keras.layers.Embedding):
            raise ValueError(
                f"Received dropout={dropout} for the Embedding "
                f"'{self.layer.name}'. Expected 0: token ids cannot be "
                "dropped."
            )
        self.dropout = dropout
        self.seed = check_seed(seed)
        if dropout:
            self.seed_generator = keras.random.SeedGenerator(
                derived_seed(seed, "dropout")
            )

    @property
    def is_low_rank(self) -> bool:
        """Whether `factors` is there, and worth keeping as it is."""
        return hasattr(self, "factors")

    def give_triplets(self, triplets: Triplets):
        """Factors made elsewhere, together with others or from a cache."""
        self._triplets = triplets

    def take_triplets(self, count: int) -> Triplets:
        """The kernel's first singular triplets, given or made here."""
        triplets, self._triplets = self._triplets, None
        if triplets is None:
            triplets = factorize([(self.view, count)])[0]
        return triplets

    def added(self, total, inputs, outputs, training, mask, **kwargs):
        """What it makes of outputs: strength times the change comes on top.

        Args:
            total: What is changed: the base's outputs, with other changes.
            inputs: What the base was given.
            outputs: What it gave.
            training: Boolean.
            mask: Boolean (batch, tokens) or None.
            **kwargs: Further arguments of the call.
        """
        if hasattr(self, "factors"):
            return self._thin_added(total, inputs, training, **kwargs)
        if self.forms_kernel:
            kernel = self.amount_of(self.kernel_change())
            change = self.view.linear(inputs, kernel)
        else:
            change = self.weighed(
                self.change(inputs, outputs, training=training, **kwargs)
            )
        return total + self.in_rows(ops.cast(change, total.dtype))

    def _thin_added(self, total, inputs, training, **kwargs):
        a, b = self.scaled(*self.factors_of_step(training))
        inputs = self.dropped(inputs, training)
        if self.batch_rows is None:
            return self.view.add(total, inputs, a, b, **kwargs)
        change = self.view.apply(inputs, a, b, **kwargs)
        return total + self.in_rows(ops.cast(change, total.dtype))

    def dropped(self, inputs, training):
        """The inputs that a thin pair sees."""
        if not (self.dropout and is_training(training)):
            return inputs
        return keras.random.dropout(
            inputs, self.dropout, seed=self.seed_generator
        )

    def factors_of_step(self, training):
        """The pair that a call uses."""
        return self.factors()

    def change(self, inputs, outputs, training=None, **kwargs):
        """The change of the base's outputs before its activation.

        Args:
            inputs: What the base was given.
            outputs: What it gave, bias included; `needs_outputs` says that
                they are looked at.
            training: Boolean.
            **kwargs: Further arguments of the call.
        """
        raise NotImplementedError

    def input_change(self, inputs):
        """The change of what the base is given."""
        raise NotImplementedError

    def kernel_change(self):
        """The change of the kernel, in its own shape."""
        raise NotImplementedError

    def scaled(self, a, b):
        """A pair in the compute dtype, scale and strength in B.

        Switched off both are zero, whatever they hold: NaN times 0 is NaN.
        """
        a, amount = ops.convert_to_tensor(a), self.amount
        on = ops.not_equal(amount, 0.0)
        a, b = ops.where(on, a, 0.0), ops.where(on, b * amount, 0.0)
        return (ops.cast(x, self.compute_dtype) for x in (a, b))

    def weighed(self, change):
        """Strength times a change; zero when off, whatever that is."""
        strength = ops.cast(self.adapter_strength, change.dtype)
        on = ops.not_equal(strength, 0)
        zero = ops.zeros((), change.dtype)
        return self.in_rows(ops.where(on, strength * change, zero))

    def amount_of(self, change):
        """Strength times a change of the kernel, scale included in it."""
        on = ops.not_equal(self.adapter_strength, 0)
        return ops.where(on, self.adapter_strength * change, 0.0)

    def delta_matrix(self):
        """The matrix (n_in x n_out, float32) that the kernel gains."""
        if self.forms_kernel:
            return self.view.to_matrix(self.kernel_change())
        a, b = self.factors()
        return ops.matmul(a, b * self.scale)

    def bias_change(self):
        """What the base's bias gains, or None."""
        return None


@keras.saving.register_keras_serializable("keras_spectral")
class KernelStack(Stack, KernelHost):
    """Several adapters around one linear layer."""

    def build(self, input_shape=None):
        super().build(input_shape)
        self.view = self._members[0].view


KernelAdapter.stack = KernelStack
