"""Adapters of one linear layer: changes of its kernel."""

import functools
from collections.abc import Callable

import keras
from keras import ops

from keras_spectral._backend import is_on
from keras_spectral._backend import is_training
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.layer_tools import asks_shapes_only
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels import view_class_of
from keras_spectral.kernels.spectra import Triplets
from keras_spectral.kernels.spectra import factorize
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.adapter import Stack
from keras_spectral.layers.kernel_host import KernelHost


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
      (`forms_kernel`), and `output_shift(outputs, training)` if it changes
      the bias as well.

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

    def __init__(
        self, layer: keras.layers.Layer, adapter_name: str = "default", **kwargs
    ):
        super().__init__(layer, adapter_name, **kwargs)
        self._triplets = None

    @classmethod
    def check_base(cls, layer):
        view_class_of(layer)
        last = layer.up if isinstance(layer, LowRank) else layer
        if cls.scales_columns and not view_class_of(last).columns_are_outputs:
            raise ValueError(
                f"Layer '{layer.name}' is a {type(last).__name__}, whose "
                "kernel has columns that are not outputs: patches overlap. "
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

    def check_view(self):
        if self.forms_kernel and self.view.kernel_name is None:
            raise ValueError(
                f"Layer '{self.name}' is a {type(self.layer).__name__}, whose "
                f"kernel is a product of two. {type(self).__name__} expects a "
                "layer with a kernel of its own."
            )
        if self.changes_inputs and not self.view.rows_are_inputs:
            raise ValueError(
                f"Layer '{self.name}' is a {type(self.layer).__name__}, whose "
                f"kernel has {self.view.n_in} rows that are not its inputs. "
                f"This {type(self).__name__} changes inputs: expected a layer "
                "whose rows are."
            )

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
        return hasattr(type(self), "factors")

    @property
    def is_plain_pair(self) -> bool:
        """Whether the change of the kernel is `scale * A B` and no more."""
        own = type(self).delta_matrix is not KernelAdapter.delta_matrix
        return hasattr(type(self), "factors") and not (own or self.forms_kernel)

    def give_triplets(self, triplets: Triplets):
        """Factors made elsewhere, together with others or from a cache."""
        self._triplets = triplets

    def from_triplets(self, count: int, *functions: Callable) -> list[Callable]:
        """Initializers from the kernel's first singular triplets.

        The triplets are those that were given, or are made when the weights
        get their numbers: in a model that is built by its first `fit` the
        kernel has none before.

        Args:
            count: How many triplets.
            *functions: `(u, s, v) -> tensor`, one for each initializer.
        """
        given, self._triplets = self._triplets, None

        def triplets():
            found = given or factorize([(self.view, count)])[0]
            return [ops.convert_to_tensor(x) for x in found]

        return self.made_late(triplets, *functions)

    def made_late(self, make: Callable, *functions: Callable) -> list[Callable]:
        """Initializers from what is made, once, when weights get numbers.

        Args:
            make: `() -> several values`.
            *functions: `(*values) -> tensor`, one for each initializer.
        """
        make = functools.cache(make)

        def initializer(function):
            def start(shape, dtype=None):
                if asks_shapes_only():
                    return ops.zeros(shape, dtype)
                # A buffer of its own, as JAX wants for each variable.
                return ops.copy(ops.cast(function(*make()), dtype))

            return start

        return [initializer(function) for function in functions]

    def added(self, total, inputs, outputs, training, mask, **kwargs):
        """Adds strength times the change to outputs.

        Args:
            total: What is changed: the base's outputs, with other changes.
            inputs: What the base was given.
            outputs: What it gave.
            training: Boolean.
            mask: Boolean (batch, tokens) or None.
            **kwargs: Further arguments of the call.
        """
        if self.forms_kernel:
            kernel = self.amount_of(self.kernel_change_of_step(training))
            change = self.view.linear(inputs, kernel)
            change = self.shifted(change, training)
        elif hasattr(type(self), "factors"):
            return self._thin_added(total, inputs, training, **kwargs)
        else:
            change = self.weighed(
                self.change(inputs, outputs, training=training, **kwargs)
            )
        return total + self.in_rows(ops.cast(change, total.dtype))

    def _thin_added(self, total, inputs, training, **kwargs):
        pair = self.pair_of_step(training)
        inputs = self.dropped(inputs, training)
        if self.batch_rows is None:
            return self.view.add(total, inputs, *pair, **kwargs)
        change = self.view.apply(inputs, *pair, **kwargs)
        return total + self.in_rows(ops.cast(change, total.dtype))

    def can_join(self, training) -> bool:
        """Whether its thin pair can run as one with those of others."""
        if self.forms_kernel or not hasattr(type(self), "factors"):
            return False
        dropped = self.dropout and is_training(training)
        return self.batch_rows is None and not dropped

    def pair_of_step(self, training):
        """The pair that a call uses, in its dtype, strength included."""
        return self.scaled(*self.factors_of_step(training))

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

    def kernel_change_of_step(self, training):
        """The change of the kernel that a call uses."""
        return self.kernel_change()

    def output_shift(self, outputs, training=None):
        """What a change of the bias adds to outputs, or None.

        For `forms_kernel`; `change` brings its own along. `bias_change` says
        the same of the bias.

        Args:
            outputs: What it is added to, for their shape and dtype.
            training: Boolean.
        """
        return None

    def shifted(self, outputs, training):
        """Outputs with strength times `output_shift`."""
        shift = self.output_shift(outputs, training)
        if shift is None:
            return outputs
        return outputs + ops.cast(self.amount_of(shift), outputs.dtype)

    def scaled(self, a, b):
        """A pair in the compute dtype, scale and strength in B."""
        return (ops.cast(x, self.compute_dtype) for x in self._strong(a, b))

    def strong_pair(self):
        """`factors` in their own dtype, scale and strength in B."""
        return self._strong(*self.factors())

    def _strong(self, a, b):
        a, amount = ops.convert_to_tensor(a), self.amount
        if is_on(self.adapter_strength):
            return a, b * amount
        # Switched off both are zero, whatever they hold: NaN times 0 is NaN.
        on = ops.not_equal(amount, 0.0)
        return ops.where(on, a, 0.0), ops.where(on, b * amount, 0.0)

    def unless_off(self, weight):
        """A weight, zeros when off: TensorFlow cannot solve for NaN."""
        on = ops.not_equal(self.amount, 0.0)
        return ops.where(on, ops.convert_to_tensor(weight), 0.0)

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
        return ops.matmul(a, b * self.adapter_scale)

    def bias_change(self):
        """The change of the base's bias, or None."""
        return None


@keras.saving.register_keras_serializable("keras_spectral")
class KernelStack(Stack, KernelHost):
    """Several adapters around one linear layer."""

    def build(self, input_shape=None):
        super().build(input_shape)
        self.view = self._members[0].view


KernelAdapter.stack = KernelStack
