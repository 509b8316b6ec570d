"""Hosts: transparent wrappers that leave the layer inside whole."""

import functools

import keras

from keras_spectral import surgery
from keras_spectral._internal.twin import twin
from keras_spectral.checks import is_small


class Host(keras.layers.Wrapper):
    """Stands in a layer's place; the layer inside (the base) stays whole.

    Once built it keeps the base frozen. What the base needs to run with
    other pieces (no activation, other weights) goes into a twin, so that
    whoever else holds the base gets the base. Attributes that a host lacks
    are the base's.

    Args:
        layer: The base.
        **kwargs: Keras layer arguments. `name` defaults to the base's name,
            `dtype` to the base's floating policy.
    """

    # Whether the layers inside of the base keep places of their own.
    opens_base = False

    def __init__(self, layer, **kwargs):
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("dtype", _float_policy(layer))
        kwargs.setdefault("autocast", layer.autocast)
        super().__init__(layer, **kwargs)
        self.supports_masking = layer.supports_masking
        self.activity_regularizer = layer.activity_regularizer
        self._base_trainable = layer.trainable
        self._keeps_frozen = False

    def build(self, input_shape=None):
        super().build(input_shape)
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
        """Keeps the base's weights from training."""
        self.layer.trainable = False

    @property
    def trainable(self):
        return keras.layers.Layer.trainable.fget(self)

    @trainable.setter
    def trainable(self, value):
        keras.layers.Layer.trainable.fset(self, value)
        if self._keeps_frozen:
            self.freeze_base()

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
        if base is None or name.startswith("__") or name in _books():
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


class TrainedCopy(Host):
    """A layer that trains beside adapters: a copy of its weights trains.

    The copy is float32 where the base has 16 bits, because steps of an
    optimizer are too small for these; it runs in the base's compute dtype.
    Dropping the host brings the base back as it was, `fold` gives the base
    what was trained.

    Args:
        layer: The base, a built layer with weights of its own.
        **kwargs: Keras layer arguments.
    """

    opens_base = True

    def __init__(self, layer, **kwargs):
        super().__init__(layer, **kwargs)
        surgery.take_signature(self, layer)
        self.trains = True  # False while a later wrap keeps it frozen
        # Past Keras's trackers: the base's weights are no weights of its own.
        vars(self)["_pairs"] = []

    def build(self, input_shape=None):
        super().build(input_shape)
        base = self.layer
        for trains, variables in (
            (True, base._trainable_variables),
            (False, base._non_trainable_variables),
        ):
            for variable in variables:
                self._pairs.append((variable, self._copy(variable, trains)))

    def _copy(self, variable, trains):
        dtype = keras.backend.standardize_dtype(variable.dtype)
        copy = self.add_weight(
            name=variable.name,
            shape=variable.shape,
            dtype="float32" if is_small(dtype) else dtype,
            initializer=lambda shape, dtype=None: fresh(variable, dtype),
            trainable=trains,
            autocast=getattr(variable, "_autocast", True),
            regularizer=getattr(variable, "regularizer", None),
            constraint=getattr(variable, "constraint", None),
        )
        # PyTorch's `zero_grad` finds weights by paths: no two may share one.
        *above, layer, name = variable.path.split("/")
        surgery.set_path(copy, "/".join([*above, "trained", layer, name]))
        return copy

    def freeze_base(self):
        surgery.set_trainable(self.layer, False, False)

    def call(self, *args, training=None, **kwargs):
        if surgery.takes_training(self.layer):
            kwargs["training"] = training
        return self._trained()(*args, **kwargs)

    def _trained(self):
        """The base with the copies for weights."""
        copies = {id(variable): copy for variable, copy in self._pairs}
        changes = {
            name: exchanged(value, copies)
            for name, value in vars(self.layer).items()
            if not name.startswith(("_trainable_v", "_non_trainable_v"))
        }
        changes["activity_regularizer"] = None
        changes["_trainable"] = self.trainable
        if is_small(self.layer.variable_dtype):
            # Or the float32 copies would make float32 outputs.
            policy = f"mixed_{self.layer.compute_dtype}"
            changes["_dtype_policy"] = keras.DTypePolicy(policy)
        return twin(self.layer, **changes)

    def forwarded(self, base, name):
        if not vars(self).get("_pairs"):
            return getattr(base, name)
        return getattr(self._trained(), name)

    def take_base(self):
        """Gives the copies the base's own values."""
        for variable, copy in self._pairs:
            copy.assign(fresh(variable, copy.dtype))

    def fold(self):
        """Writes what was trained into the base."""
        for variable, copy in self._pairs:
            variable.assign(fresh(copy, variable.dtype))


def fresh(variable, dtype):
    """A variable's value in a buffer of its own, as JAX wants for each."""
    return keras.ops.copy(keras.ops.cast(variable, dtype))


def exchanged(value, mapping):
    """A value, or a plain container of values, with some exchanged."""
    if id(value) in mapping:
        return mapping[id(value)]
    if isinstance(value, dict):
        fresh = {k: exchanged(v, mapping) for k, v in value.items()}
        same = all(fresh[k] is v for k, v in value.items())
        return value if same else fresh
    if isinstance(value, list | tuple):
        items = [exchanged(item, mapping) for item in value]
        if all(new is old for new, old in zip(items, value)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    return value


def _float_policy(layer):
    """The base's dtype policy without its quantisation."""
    compute, variable = layer.compute_dtype, layer.variable_dtype
    return compute if compute == variable else f"mixed_{compute}"


@functools.cache
def _books():
    """What every layer may hold for Keras's and the backend's own use."""
    layer = keras.layers.Identity(name="books")
    layer(keras.ops.zeros((1,)))
    names = {"_torch_params", "_build_shapes_dict", "_metrics", "view", "layer"}
    return names | set(vars(layer)) | set(vars(layer).get("_modules", ()))
