"""Hosts: transparent wrappers that leave the layer inside whole."""

import functools

import keras

from keras_spectral._internal.layer_tools import freeze
from keras_spectral._internal.layer_tools import sublayers


class Host(keras.layers.Wrapper):
    """Takes a layer's place; the layer inside (the base) is not changed.

    Once built it keeps the base frozen. What the base needs to run with
    other pieces (no activation, other weights) goes into a twin, so that
    other models that hold the base are not changed. Attributes that a host
    lacks are the base's.

    A host holds named members, which say how it differs from its base. Each
    has an `adapter_name`, a strength (`adapter_strength`, a variable), and
    says by `is_trained` whether it is among those that train.

    Args:
        layer: The base.
        **kwargs: Keras layer arguments. `name` defaults to the base's name,
            `dtype` to the base's floating policy.
    """

    is_host = True
    # Whether the layers inside of the base keep places of their own.
    opens_base = False

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("dtype", _float_policy(layer))
        kwargs.setdefault("autocast", layer.autocast)
        super().__init__(layer, **kwargs)
        self.supports_masking = layer.supports_masking
        self.activity_regularizer = layer.activity_regularizer
        self._base_trainable = layer.trainable
        self._keeps_frozen = False
        self._is_plain = _is_plain(layer)

    def build(self, input_shape=None):
        super().build(input_shape)
        self.input_spec = self.layer.input_spec
        self._base_trainable = self.layer.trainable
        self.keep_base_frozen()

    def keep_base_frozen(self):
        """Freezes the base, whatever happens to the host's own flag."""
        self._keeps_frozen = True
        self.freeze_base()

    def free_base(self):
        """Gives the base the flag that it had."""
        self._keeps_frozen = False
        self.layer.trainable = self._base_trainable

    def take_base_from(self, other):
        """Takes over another host's base, which that one has frozen."""
        self._base_trainable = other._base_trainable

    def freeze_base(self):
        """Keeps the base from training, hosts inside of it excepted."""
        freeze(self.layer)

    @property
    def trainable(self):
        return keras.layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        keras.layers.Layer.trainable.fset(self, value)
        if self._keeps_frozen:
            self.freeze_base()

    def run_base(self, base, *args, **kwargs):
        """Calls a twin of the base, without what Keras does around `call`.

        That is for PyTorch, where it costs a small layer as much as its
        product does. Keras has done the same around the host's own call.
        """
        policy = base.dtype_policy
        same = policy is self.layer.dtype_policy
        same = same and policy.quantization_mode is None
        if self._is_plain and same and base._remat_mode is None:
            return base.call(*args, **kwargs)
        return base(*args, **kwargs)

    def run_members(self, run, training):
        """What `run(members)` gives for those that are on.

        In a `mixed_batch` the base runs once, and once more for each member,
        whose rows are then taken.
        """
        mixed = [m for m in self.members() if m.batch_rows is not None]
        if not mixed:
            return run([m for m in self.members() if not m.left_out(training)])
        outputs = run([])
        for member in mixed:
            outputs = keras.tree.map_structure(
                member.where_chosen, run([member]), outputs
            )
        return outputs

    def members(self) -> list[keras.layers.Layer]:
        """The adapters that it holds; one by itself is its own member."""
        raise NotImplementedError

    def with_members(self, members: list) -> keras.layers.Layer:
        """The layer that stands in the base's place with other members.

        The base itself without any; else a host, which `surgery` has yet to
        put in place.
        """
        raise NotImplementedError

    def merged_values(self, members: list | None = None) -> tuple:
        """What the base's weights become with members folded in.

        Returns:
            Pairs of a variable and its new value, and the share of the change
            that kernels of 16 bits cannot take.

        Raises:
            ValueError: A member cannot be merged, or is off.
        """
        raise NotImplementedError

    def check_merge(self, members: list | None = None) -> None:
        """Raises the ValueError that `merged_values` would raise."""
        self.merged_values(members)

    def merge(self, members: list | None = None) -> float:
        """Writes `merged_values` into the base; returns what is lost."""
        values, loss = self.merged_values(members)
        for variable, value in values:
            variable.assign(value)
        return loss

    def get_config(self):
        config = super().get_config()
        config.pop("activity_regularizer", None)
        config["layer"]["config"]["trainable"] = self._base_trainable
        return config

    def compute_mask(self, inputs, mask=None):
        return self.layer.compute_mask(inputs, mask)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, training=None, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def __getattr__(self, name):
        try:
            # PyTorch modules keep some attributes outside of `__dict__`.
            return super().__getattr__(name)
        except AttributeError:
            own = vars(self)
            base = own.get("layer") or own.get("_modules", {}).get("layer")
        if base is None or name.startswith("__") or name in _own_names():
            raise AttributeError(
                f"'{type(self).__name__}' object has no attribute '{name}'"
            )
        try:
            return self.forwarded(base, name)
        except AttributeError as error:
            raise AttributeError(
                f"Neither the {type(self).__name__} around layer "
                f"'{base.name}' nor the {type(base).__name__} inside has an "
                f"attribute '{name}'."
            ) from error

    def forwarded(self, base, name):
        """The value of an attribute that only the base has."""
        return getattr(base, name)


def _float_policy(layer):
    """The base's dtype policy without its quantisation."""
    compute, variable = layer.compute_dtype, layer.variable_dtype
    return compute if compute == variable else f"mixed_{compute}"


@functools.cache
def _own_names():
    """Attributes that Keras and the backend keep in every layer."""
    layer = keras.layers.Identity(name="own_names")
    layer(keras.ops.zeros((1,)))
    names = {"_torch_params", "_build_shapes_dict", "_metrics", "view", "layer"}
    return names | set(vars(layer)) | set(vars(layer).get("_modules", ()))


def _is_plain(layer):
    """Whether on PyTorch a call of a layer is no more than its `call`."""
    own = type(layer).__call__ is not keras.layers.Layer.__call__
    known = "mask" in layer._call_signature.parameters
    inside = bool(sublayers(layer))
    return keras.backend.backend() == "torch" and not (own or known or inside)
