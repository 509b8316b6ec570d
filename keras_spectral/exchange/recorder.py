"""Which Hugging Face tensor each weight of a KerasHub backbone comes from.

KerasHub's own converters know it. One is run on a mirror of the backbone,
with a loader that writes down what it is asked for: no weights are read, none
are changed.
"""

import inspect
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.converters import converter_of
from keras_spectral.model.adapted import plain_class
from keras_spectral.model.paths import subject


class Source(NamedTuple):
    """Where a weight comes from.

    Attributes:
        layer: The layer that has it.
        attribute: The layer's attribute that holds it.
        shape: Its shape.
        key: The name of the Hugging Face tensor.
        hook: `(tensor, shape) -> tensor` of the weight's shape, or None.
    """

    layer: keras.layers.Layer
    attribute: str
    shape: tuple[int, ...]
    key: str
    hook: Callable | None

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The weight's value from the Hugging Face tensor's."""
        if self.hook is None:
            return tensor
        return np.asarray(self.hook(tensor, list(self.shape)))


def recorded_sources(backbone: keras.Model) -> list[Source]:
    """The sources of a backbone's weights, without the hosts.

    Raises:
        ImportError: KerasHub is not installed.
        ValueError: It has no converter for the backbone's class, or one that
            asks for more than names.
    """
    converter = converter_of(plain_class(backbone))
    loader = _Loader()
    name = converter.__name__.rpartition(".")[2]
    mirror, config = _mirrored(backbone), _Config(backbone)
    try:
        converter.convert_weights(mirror, loader, config)
    except Exception as error:
        raise ValueError(
            f"KerasHub's `{name}` does not tell the names of "
            f"{plain_class(backbone).__name__}'s weights ({error!r}). Expected "
            "a family whose converter only ports weights, such as BERT or "
            "Llama 3."
        ) from error
    return loader.sources


def recorded_head(task: keras.Model) -> list[Source]:
    """The sources of a task's head, where KerasHub's converter knows them."""
    backbone = subject(task.backbone)
    converter = converter_of(plain_class(backbone))
    if not hasattr(converter, "convert_head"):
        return []
    loader = _Loader()
    converter.convert_head(_mirrored(task), loader, _Config(backbone))
    return loader.sources


class _Loader:
    """Writes down what a converter asks for."""

    # What converters look at of KerasHub's own loader.
    safetensor_config = preset = prefix = None

    def __init__(self):
        self.sources: list[Source] = []

    def port_weight(self, keras_variable, hf_weight_key, hook_fn=None):
        if isinstance(keras_variable, _Weight):
            self.sources.append(
                Source(*keras_variable.known, hf_weight_key, hook_fn)
            )

    def get_tensor(self, hf_weight_key):
        if hf_weight_key.endswith((".gamma", ".beta")):
            raise KeyError(hf_weight_key)  # how old files call norms' weights
        return _Anything()


class _Config(dict):
    """A Hugging Face configuration, as far as converters look into it."""

    def __init__(self, backbone):
        width = getattr(backbone, "hidden_dim", None)
        config = {"hidden_size": width, "n_embd": width}
        names = [c.__name__ for c in plain_class(backbone).__mro__]
        if "GemmaBackbone" in names:
            second = getattr(backbone, "use_post_ffw_norm", False)
            config["model_type"] = "gemma2" if second else "gemma"
        if "Gemma3Backbone" in names:
            text = getattr(backbone, "vision_encoder", None) is None
            config["model_type"] = "gemma3_text" if text else "gemma3"
        if "ESMBackbone" in names:
            config["position_embedding_type"] = backbone.position_embedding_type
            config["emb_layer_norm_before"] = backbone.use_pre_layer_norm
        if "SwinTransformerBackbone" in names:
            config["qkv_bias"] = backbone.qkv_bias
        super().__init__(config)


def _mirrored(value):
    """A value in which layers cannot be changed and hosts are their bases."""
    if isinstance(value, keras.layers.Layer):
        return _Mirror(subject(value))
    if isinstance(value, dict):
        return {key: _mirrored(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_mirrored(item) for item in value]
    if inspect.ismethod(value):
        return lambda *args, **kwargs: _mirrored(value(*args, **kwargs))
    return value


class _Mirror:
    """A layer whose weights tell where they are and take no values."""

    def __init__(self, layer):
        vars(self)["_layer"] = layer

    @property
    def __class__(self):
        return type(self._layer)

    def __getattr__(self, name):
        value = getattr(self._layer, name)
        if isinstance(value, keras.Variable) or ops.is_tensor(value):
            return _Weight(self._layer, name, value)
        return _mirrored(value)

    def __setattr__(self, name, value):
        """Converters may set flags for themselves."""


class _Anything:
    """Stands for a tensor that nobody reads, whatever is done with it."""

    def _same(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    __call__ = __getitem__ = __add__ = __radd__ = __sub__ = __mul__ = _same
    __rmul__ = __truediv__ = __array_function__ = __array_ufunc__ = _same


class _Weight(_Anything):
    """A weight of a layer that a converter asks for."""

    def __init__(self, layer, name, value):
        shape = tuple(value.shape)
        self.known: tuple[Any, ...] = layer, name, shape
        self.shape = shape

    def assign(self, value):
        """Takes no values."""
