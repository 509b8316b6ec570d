"""Kinds of PEFT's that are, tensor by tensor, methods here."""

from typing import Any
from typing import NamedTuple

import numpy as np

from keras_spectral._backend import to_numpy
from keras_spectral.exchange.fields import KNOWN
from keras_spectral.exchange.modules import Written
from keras_spectral.exchange.modules import is_turned
from keras_spectral.exchange.modules import modules_of
from keras_spectral.exchange.names import HubNames
from keras_spectral.exchange.names import Part
from keras_spectral.exchange.pieces import Piece
from keras_spectral.exchange.pieces import Tensors
from keras_spectral.exchange.pieces import take
from keras_spectral.exchange.pieces import wrong_shape
from keras_spectral.layers import KernelAdapter
from keras_spectral.model.paths import Place

_LAYOUTS = {
    "linear": "a linear layer",
    "conv1d": "a linear layer that lies as (in, out)",
    "conv": "a convolution",
    "table": "a table",
}


class Tensor(NamedTuple):
    """A tensor of a file, and the weight that it is here.

    Attributes:
        name: The tensor's name behind that of its module.
        weight: The weight's name.
        shape: The tensor's shape.
        cut: A finer shape that it is brought to first, `shape` by default.
        axes: The order of that one's axes here, the same by default.
        own: The weight's shape, by default what comes of these.
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    cut: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None
    own: tuple[int, ...] | None = None

    def read(self, tensor: np.ndarray, path: str) -> np.ndarray:
        """The weight's value from the tensor of a module."""
        if tensor.shape != self.shape:
            raise wrong_shape(path, self.name, tensor, f"{self.shape}")
        cut = tensor.reshape(self.cut or self.shape)
        turned = cut.transpose(self._order())
        return turned.reshape(self.own or turned.shape)

    def write(self, value: np.ndarray) -> np.ndarray:
        """The tensor from the weight's value."""
        cut, order = self.cut or self.shape, self._order()
        turned = value.reshape([cut[i] for i in order])
        tensor = turned.transpose(np.argsort(order)).reshape(self.shape)
        return np.ascontiguousarray(tensor)

    def _order(self):
        cut = self.cut or self.shape
        return tuple(range(len(cut))) if self.axes is None else self.axes


class Kind:
    """How a kind of PEFT's and a method here are one.

    Of a kind there is what it is called, where it can be, its tensors, and
    how options are made of the configuration and back. Reading and writing
    follow from that.

    Attributes:
        name: PEFT's `peft_type`.
        layer: The method's class.
        layouts: The kinds of modules that it can be on (see `Slot`).
        reasons: Why it cannot be on another one, by that layout.
        names: What a module's tensors may be called.
        shared: For a tensor that all modules have in common its whole name
            and the weight that it is here.
    """

    name: str
    layer: type[KernelAdapter]
    layouts: tuple[str, ...]
    reasons: dict[str, str] = {}
    names: tuple[str, ...]
    shared: dict[str, str] = {}

    def options(
        self, part: Part, tensors: Tensors, config: dict, path: str
    ) -> dict[str, Any]:
        """The method's options, from the checked configuration."""
        raise NotImplementedError

    def tensors(self, part: Part, options: dict[str, Any]) -> list[Tensor]:
        """The tensors of a module, from the method's options."""
        raise NotImplementedError

    def constants(self, part: Part, options: dict) -> Tensors:
        """Tensors that PEFT's files have and that say nothing, by name."""
        return {}

    def fields(self, layers: dict[str, Any]) -> dict[str, Any]:
        """The configuration's fields, from the adapters by module."""
        raise NotImplementedError

    def fitted(self, part: Part, options: dict, values: Tensors) -> tuple:
        """Options and values that the method takes, where PEFT allows more."""
        return options, values

    def read_shared(
        self, found: Tensors, parts: list[Part], config: dict
    ) -> Tensors:
        """What all layers share, by weight, of the size that these need."""
        return {}

    def write_shared(self, layers: dict[str, Any]) -> Tensors:
        """The tensors that all modules share, by their whole names."""
        return {}

    def reason(self, part: Part) -> str | None:
        """Why it cannot be on a kernel, None if it can."""
        layout = part.slot.layout
        if layout not in self.layouts:
            return self.reasons.get(layout, "PEFT has none for it")
        if part.view.groups > 1:
            return "its channels are in groups, which PEFT cuts otherwise"
        return None

    def part(self, parts: list[Part], path: str, hint: str = "") -> Part:
        """The one kernel that makes a module.

        Args:
            parts: The kernels that make it.
            path: Its name.
            hint: What else an error says.

        Raises:
            ValueError: There are several, or the kind cannot be on it.
        """
        part = parts[0]
        if len(parts) > 1:
            places = [other.place.path for other in parts]
            raise ValueError(
                f"'{path}' is one module in Hugging Face's model and "
                f"{len(parts)} layers here, {places}: a {self.name} of the "
                "whole is none of its parts. Expected an adapter that leaves "
                f"it out.{hint}"
            )
        reason = self.reason(part)
        if reason:
            raise ValueError(
                f"'{path}' is {_LAYOUTS[part.slot.layout]}, here "
                f"'{part.place.path}', which takes no {self.name}: {reason}. "
                f"Expected an adapter that leaves it out.{hint}"
            )
        return part

    def pieces(
        self, parts: list[Part], tensors: Tensors, config: dict, path: str
    ) -> list[Piece]:
        """The adapters of a module; see `lora_pieces`."""
        part = self.part(parts, path)
        options = self.options(part, tensors, config, path)
        wanted = self.tensors(part, options)
        values = {
            tensor.weight: tensor.read(take(tensors, tensor.name, path), path)
            for tensor in wanted
        }
        extra = tensors.keys() - {tensor.name for tensor in wanted}
        extra = sorted(extra - self.constants(part, options).keys())
        if extra:
            raise ValueError(
                f"The tensor '{path}.{extra[0]}' is unexpected: by its "
                f"configuration this {self.name} has "
                f"{[tensor.name for tensor in wanted]}. The file is damaged, "
                "or belongs to another configuration."
            )
        options, values = self.fitted(part, options, values)
        return [Piece(part.place, self.layer.method, options, values)]

    def written(self, names: HubNames, adapters: list[Place]) -> Written:
        """The tensors of all modules, fields, and errors by path."""
        by_key = {place.key: place.layer for place in adapters}
        modules = modules_of(names, adapters)
        layers, tensors = {}, {}
        for module, parts in modules.items():
            path = names.path(module)
            part = self.part(parts, path, _AS_LORA)
            layer = layers[path] = by_key[part.place.key]
            for tensor in self.tensors(part, layer.options()):
                value = to_numpy(getattr(layer, tensor.weight))
                tensors[f"{path}.{tensor.name}"] = tensor.write(value)
            constants = self.constants(part, layer.options())
            tensors |= {f"{path}.{name}": x for name, x in constants.items()}
        fields = {
            "peft_type": self.name,
            "target_modules": sorted(layers),
            "init_weights": True,
            **self.fields(layers),
        }
        if "fan_in_fan_out" in KNOWN[self.name]:
            fields["fan_in_fan_out"] = is_turned(modules)
        if "bias" in KNOWN[self.name]:
            fields["bias"] = "none"
        tensors |= self.write_shared(layers)
        return tensors, fields, {place.path: 0.0 for place in adapters}


_AS_LORA = " (`save_peft(..., rank=...)` writes a LoRA of that rank.)"


def one_for_all(layers: dict[str, Any], name: str, field: str) -> Any:
    """What all layers have in common.

    Args:
        layers: The adapters by module.
        name: Their attribute.
        field: What it is in PEFT's configuration.
    """
    found = {getattr(layer, name): path for path, layer in layers.items()}
    if len(found) > 1:
        (first, path), (second, other) = list(found.items())[:2]
        raise ValueError(
            f"The adapter has {name}={first} on '{path}' and {name}={second} "
            f"on '{other}'. Expected the same on all layers: PEFT has one "
            f"{field} for all.{_AS_LORA}"
        )
    return next(iter(found))


def sides_of(part: Part) -> tuple[int, ...]:
    """The sides of a convolution's kernel, none of a linear layer's."""
    layer = part.view.layer
    return tuple(layer.kernel_size) if part.slot.layout == "conv" else ()
