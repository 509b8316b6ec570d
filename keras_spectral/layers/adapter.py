"""The base of every adapter: a transparent wrapper around one linear layer."""

import inspect

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral.checks import check_layer
from keras_spectral.checks import check_number
from keras_spectral.checks import check_seed
from keras_spectral.checks import derived_seed
from keras_spectral.checks import is_small
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels import view_class_of
from keras_spectral.layers.host import Host
from keras_spectral.spectra import Triplets
from keras_spectral.spectra import factorize

METHODS: dict[str, type["AdapterLayer"]] = {}


def register_method(name: str):
    """Class decorator: makes an adapter known to `wrap_model` and to Keras."""

    def register(cls):
        known = METHODS.get(name, cls)
        # The very same class once more is a module that was loaded again.
        names = ("__module__", "__qualname__")
        if any(getattr(known, x) != getattr(cls, x) for x in names):
            raise ValueError(
                f"Received register_method({name!r}) for {cls.__name__}. "
                f"That name is taken by {known.__module__}."
                f"{known.__qualname__}. Expected another one."
            )
        METHODS[name] = cls
        cls.method = name
        return keras.saving.register_keras_serializable("keras_spectral")(cls)

    return register


class AdapterLayer(Host):
    """Base class of adapters: `y = activation(base(x) + delta(x))`.

    It takes one linear layer (the base), freezes it for good, and adds a
    correction `delta(x) = scale * x A B` before the base's activation. A
    method supplies its weights (`build_adapter`) and the thin pair A, B made
    of them (`factors`); freezing, masks, merging, attribute forwarding,
    dtypes and configuration live here. Attributes that the adapter lacks are
    the base's; the base's `kernel` (or `embeddings`) is the effective one.

    The base itself keeps its activation: a twin without it computes
    `base(x)`, see `Host`.

    Args:
        layer: The base: a layer that `keras_spectral.kernels` has a view of.
        **kwargs: Keras layer arguments. `name` defaults to the base's name,
            `dtype` to the base's floating policy.

    Call arguments:
        inputs: What the base takes; further arguments go to the base.
        training: Boolean, whether dropout is active.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: The base is an adapter already, or no view covers it.
    """

    method: str
    trains: str  # in a few words, for `methods`
    merges = True  # whether the correction is one of the base's kernel
    default_target = "attention"
    dropout = 0.0
    retraces = False  # whether it has to be compiled anew when switched off

    def __init__(self, layer, **kwargs):
        if isinstance(layer, Host):
            raise ValueError(
                f"Layer '{layer.name}' is already wrapped "
                f"({type(layer).__name__}). Expected a plain layer; unwrap "
                "or merge it first."
            )
        self.check_base(check_layer(layer))
        super().__init__(layer, **kwargs)
        self.disabled = False
        self._triplets = None

    def build(self, input_shape=None):
        super().build(input_shape)
        try:
            self._build_on_base()
        except BaseException:
            self.free_base()
            raise

    def _build_on_base(self):
        self.view = self.view_of(self.layer)
        self.scale = self.add_weight(
            name="scale",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_scale()),
            trainable=False,
        )
        self.build_adapter()

    @classmethod
    def check_base(cls, layer):
        """Raises a ValueError unless the adapter fits the layer."""
        view_class_of(layer)

    @classmethod
    def check_model(cls, model):
        """Raises a ValueError if no layer of a model can have the adapter."""

    @classmethod
    def view_of(cls, layer):
        """How the adapter sees its base."""
        return kernel_view(layer)

    def add_weight(self, *args, **kwargs):
        """Adapter weights are float32 and stay so in `call`."""
        wide = {"dtype": "float32", "autocast": False}
        return super().add_weight(*args, **{**wide, **kwargs})

    def set_dropout(self, dropout: float, seed: int | None):
        """Keeps `seed` and the share of inputs that `delta` drops."""
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

    def build_adapter(self):
        """Creates the method's weights; `self.view` knows the shapes."""
        raise NotImplementedError

    def initial_scale(self):
        """What the correction is multiplied by."""
        return 1.0

    @classmethod
    def connect(cls, adapters: list["AdapterLayer"]):
        """Gives new adapters of a model, beside its old ones, what they share.

        It is called before the new ones are built.
        """

    @property
    def shared(self) -> keras.layers.Layer | None:
        """A layer that several adapters use; saved and counted once."""
        return None

    @property
    def is_low_rank(self) -> bool:
        """Whether `factors` is a pair that is worth keeping as it is."""
        return True

    def triplets_needed(self, view) -> int:
        """How many singular triplets of the kernel `build_adapter` takes."""
        return 0

    def give_triplets(self, triplets: Triplets):
        """Factors made elsewhere, together with others or from a cache."""
        self._triplets = triplets

    def take_triplets(self, count: int) -> Triplets:
        """The kernel's first singular triplets, given or made here."""
        triplets, self._triplets = self._triplets, None
        if triplets is None:
            triplets = factorize([(self.view, count)])[0]
        return triplets

    def call(self, inputs, training=None, **kwargs):
        outputs = self.view.bare()(inputs, **kwargs)
        delta = self.delta(inputs, training=training, **kwargs)
        outputs = outputs + ops.cast(delta, outputs.dtype)
        return self.finish(outputs, **kwargs)

    def delta(self, inputs, training=None, **kwargs):
        """The correction to the base's output, before the activation."""
        a, b = self.scaled(*self.factors())
        if self.dropout and is_training(training):
            inputs = keras.random.dropout(
                inputs, self.dropout, seed=self.seed_generator
            )
        return self.view.apply(inputs, a, b, **kwargs)

    def scaled(self, a, b):
        """A pair in the compute dtype, the scale in B.

        Switched off both are zero, whatever they hold: NaN times 0 is NaN.
        """
        a = ops.convert_to_tensor(a)
        on = ops.not_equal(self.scale, 0.0)
        a, b = ops.where(on, a, 0.0), ops.where(on, b * self.scale, 0.0)
        return (ops.cast(x, self.compute_dtype) for x in (a, b))

    def factors(self):
        """The pair A (n_in x r), B (r x n_out) of the unscaled correction."""
        raise NotImplementedError

    def finish(self, outputs, reverse=False):
        """What the base does to its output once the correction is in."""
        cap = getattr(self.layer, "logit_soft_cap", None)
        if reverse and cap is not None:
            outputs = ops.tanh(outputs / cap) * cap
        activation = getattr(self.layer, "activation", None)
        return outputs if activation is None else activation(outputs)

    def delta_matrix(self):
        """The matrix (n_in x n_out, float32) that the kernel gains."""
        a, b = self.factors()
        return ops.matmul(a, b * self.scale)

    def merged_matrix(self):
        """Kernel plus correction as a float32 matrix (n_in x n_out).

        Raises:
            ValueError: It holds a NaN or an infinity, the base is quantised,
                or the adapter is switched off.
        """
        self.view.check_assignable()
        self.check_active()
        matrix = self.view.matrix()
        matrix = matrix + ops.cast(self.delta_matrix(), matrix.dtype)
        if not ops.all(ops.isfinite(matrix)):
            raise ValueError(
                f"The merged kernel of layer '{self.name}' holds NaN or "
                "infinite values, so nothing was merged. The training "
                "probably diverged: load an earlier adapter file."
            )
        return matrix

    def check_active(self):
        """Raises a ValueError if the adapter is switched off."""
        if self.disabled:
            raise ValueError(
                f"The adapter of layer '{self.name}' is switched off. Expected "
                "an active one: leave the `adapters_disabled` block first."
            )

    def merge(self) -> float:
        """Folds the correction into the base's kernel.

        Returns:
            The share of the correction that a kernel of 16 bits could not
            take, by the Frobenius norm.
        """
        matrix = self.merged_matrix()
        if not is_small(self.view.variable().dtype):
            self.view.assign(matrix)
            return 0.0
        change = self.delta_matrix()
        self.view.assign(matrix)
        lost, size = ops.norm(self.view.matrix() - matrix), ops.norm(change)
        lost = ops.convert_to_numpy(lost / ops.maximum(size, 1e-30))
        return float(lost)

    @classmethod
    def option_names(cls):
        """The names of the method's own arguments."""
        names = inspect.signature(cls.__init__).parameters
        return [n for n in names if n not in ("self", "layer", "kwargs")]

    def options(self):
        """The method's own arguments, by name."""
        return {name: getattr(self, name) for name in self.option_names()}

    def get_config(self):
        return {**super().get_config(), **self.options()}

    def forwarded(self, base, name):
        view = vars(self).get("view")
        if view is None or view.kernel_name is None:
            return getattr(base, name)
        if name in (view.kernel_name, f"_{view.kernel_name}"):
            matrix = view.matrix()
            delta = ops.cast(self.delta_matrix(), matrix.dtype)
            return view.kernel(matrix + delta)
        return getattr(base, name)
