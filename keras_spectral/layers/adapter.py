"""The base of every adapter: a named change of a frozen layer or block."""

import inspect

import keras

from keras_spectral._internal.checks import check_layer
from keras_spectral._internal.layouts import lay_out
from keras_spectral.layers.host import Host
from keras_spectral.layers.member import Member

METHODS: dict[str, type["AdapterLayer"]] = {}


def register_method(name: str):
    """Class decorator: makes an adapter known to `wrap_model` and to Keras.

    Args:
        name: The method's name, which `wrap_model`, files and summaries use.

    Returns:
        What registers a class on `KernelAdapter` or another base of adapters.

    Raises:
        ValueError: Another class has the name.

    Example:

    >>> @ks.register_method("tiny_lora")
    ... class TinyLoRA(ks.LoRADense):
    ...     trains = "a pair of rank 1"
    ...     def __init__(self, layer, rank=1, **kwargs):
    ...         super().__init__(layer, rank=rank, **kwargs)
    >>> model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    >>> model = ks.wrap_model(model, "tiny_lora", target="dense.*")
    >>> [tuple(w.shape) for w in model.trainable_weights]
    [(16, 1), (1, 8)]
    """

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


class AdapterLayer(Member, Host):
    """Base class of adapters: a layer around a layer, which it changes.

    The layer inside (the base) is frozen for good and stays whole, see
    `Host`. What an adapter adds to it, at what strength, says the family:
    `KernelAdapter` for one linear layer, `BlockAdapter` for a transformer
    block. Options, weights, dtypes and configuration are kept here. Attributes
    that the adapter lacks are the base's.

    An adapter runs by itself, or beside others around the same base in a
    `Stack`, each with a name of its own.

    Args:
        layer: The base.
        adapter_name: The adapter's name.
        **kwargs: Keras layer arguments. `name` defaults to the base's name,
            `dtype` to the base's floating policy.

    Raises:
        ValueError: The base is an adapter already, or the method does not
            fit it.
    """

    method: str
    trains: str  # in a few words, for `methods`
    merges = True  # whether the change is one of the base's weights
    default_target = "attention"
    stack: type["Stack"]  # what holds several around one base

    def __init__(
        self, layer: keras.layers.Layer, adapter_name: str = "default", **kwargs
    ):
        if isinstance(layer, Host):
            raise ValueError(
                f"Layer '{layer.name}' is already wrapped "
                f"({type(layer).__name__}). Expected a plain layer; "
                "`wrap_model` puts several adapters on one."
            )
        self.check_base(check_layer(layer))
        super().__init__(layer, **kwargs)
        self.name_member(adapter_name)

    def members(self):
        return [self]

    def with_members(self, members):
        if len(members) > 1:
            return self.stack(self.layer, members)
        return members[0] if members else self.layer

    def build(self, input_shape=None):
        super().build(input_shape)
        try:
            self.view = self.view_of(self.layer)
            self.check_view()
            self.adapter_scale = self.add_weight(
                name="scale",
                shape=(),
                initializer=keras.initializers.Constant(self.initial_scale()),
                trainable=False,
            )
            self.build_adapter()
            self.add_strength()
        except BaseException:
            self.free_base()
            raise

    @classmethod
    def check_base(cls, layer):
        """Raises a ValueError unless the adapter fits the layer."""

    @classmethod
    def check_model(cls, model):
        """Raises a ValueError if no layer of a model can have the adapter."""

    @classmethod
    def view_of(cls, layer):
        """How the adapter sees its base."""
        raise NotImplementedError

    def check_view(self):
        """Raises a ValueError unless the method can use `self.view`."""

    def add_weight(self, shape=None, *args, name=None, **kwargs):
        """Adapter weights are float32 and stay so in `call`."""
        path, shape = f"{self.path}/{name}", tuple(shape or ())
        lay_out(path, shape, self.view, self.layer)
        options = {"dtype": "float32", "autocast": False, **kwargs}
        return super().add_weight(shape, *args, name=name, **options)

    def build_adapter(self):
        """Creates the method's weights; `self.view` knows the shapes."""
        raise NotImplementedError

    def initial_scale(self):
        """The method's own factor of the change."""
        return 1.0

    @property
    def scale(self):
        """What the base calls so, or the method's own factor."""
        if hasattr(self.layer, "scale"):
            return self.forwarded(self.layer, "scale")
        return self.adapter_scale

    @property
    def amount(self):
        """Scale times strength: 0 where the adapter is off."""
        return self.adapter_scale * self.adapter_strength

    @classmethod
    def connect(cls, adapters: list["AdapterLayer"]):
        """Gives new adapters of a model, beside its old ones, what they share.

        It is called before the new ones are built.
        """

    @property
    def shared(self) -> keras.layers.Layer | None:
        """A layer that several adapters use; saved and counted once."""
        return None

    def triplets_needed(self, view) -> int:
        """How many singular triplets of the kernel `build_adapter` takes."""
        return 0

    def check_mergeable(self):
        """Raises a ValueError if the change cannot be folded into the base."""

    @classmethod
    def option_names(cls):
        """The names of the method's own arguments."""
        names = inspect.signature(cls.__init__).parameters
        own = ("self", "layer", "adapter_name", "kwargs")
        return [name for name in names if name not in own]

    def options(self):
        """The method's own arguments, by name."""
        return {name: getattr(self, name) for name in self.option_names()}

    def get_config(self):
        config = {**super().get_config(), **self.options()}
        if self.adapter_name != "default":
            config["adapter_name"] = self.adapter_name
        return config


class Stack(Host):
    """Several adapters around one base, each with a name of its own.

    It is made by `wrap_model` where a layer has an adapter and gets another.

    Args:
        layer: The base.
        members: The adapters, each around the same base.
        **kwargs: Keras layer arguments.
    """

    def __init__(self, layer, members, **kwargs):
        super().__init__(layer, **kwargs)
        self._members = [
            _member_around(layer, m) if isinstance(m, dict) else m
            for m in members
        ]

    def members(self):
        return self._members

    def with_members(self, members):
        return AdapterLayer.with_members(self._members[0], members)

    def build(self, input_shape=None):
        first = self._members[0]
        frozen = first.built
        super().build(input_shape)
        if frozen:
            self.take_base_from(first)
        for member in self._members:
            if not member.built:
                member.build(input_shape)
                member.take_base_from(self)

    def get_config(self):
        members = []
        for member in self._members:
            config = member.get_config()
            config.pop("layer")
            members.append({"method": member.method, "config": config})
        return {**super().get_config(), "members": members}


def _member_around(layer, description):
    """An adapter from what a stack's configuration says of it."""
    config = dict(description["config"])
    config["dtype"] = keras.dtype_policies.get(config["dtype"])
    return METHODS[description["method"]](layer, **config)
