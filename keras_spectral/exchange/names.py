"""The layers of a KerasHub model by their Hugging Face names."""

import functools
from typing import NamedTuple

import keras
import numpy as np

from keras_spectral.exchange.families import head_names
from keras_spectral.exchange.families import in_memory
from keras_spectral.exchange.families import is_top
from keras_spectral.exchange.families import part_prefix
from keras_spectral.exchange.families import task_of
from keras_spectral.exchange.recorder import Source
from keras_spectral.exchange.recorder import recorded_head
from keras_spectral.exchange.recorder import recorded_sources
from keras_spectral.exchange.slots import Slot
from keras_spectral.exchange.slots import slot_of
from keras_spectral.kernels import KernelView
from keras_spectral.kernels import kernel_view
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject

_KERNELS = ("kernel", "embeddings")


class Weight(NamedTuple):
    """A weight of a layer and the tensor that it comes from.

    Attributes:
        place: Where the layer is.
        source: What KerasHub's converter says of it.
    """

    place: Place
    source: Source


class Part(NamedTuple):
    """A kernel that a Hugging Face module is made of, alone or with others.

    Attributes:
        place: Where its layer is.
        view: The kernel as a matrix.
        slot: Where it lies in the module's tensor.
    """

    place: Place
    view: KernelView
    slot: Slot

    @property
    def columns(self) -> slice:
        """Which of the module's outputs are the layer's."""
        return slice(self.slot.start, self.slot.start + self.view.n_out)


class Found(NamedTuple):
    """A module or tensor that a file names.

    Attributes:
        name: The model's own name for it, without the prefix.
        prefix: What the file has before that.
        renamed: Whether the file calls it as transformers 5 does in memory,
            where older ones have another name.
    """

    name: str
    prefix: str
    renamed: bool


class HubNames:
    """A model's weights by the names that Hugging Face's classes have.

    Args:
        model: A KerasHub task or backbone.

    Attributes:
        task_type: PEFT's word for what the model is for, or None.
        prefix: What names of the backbone's tensors begin with.
        tensors: The weights that make each tensor, by its name on the disk
            without the prefix: several where it is fused.
        heads: The tensors of a classifier's head.
    """

    def __init__(self, model: keras.Model):
        backbone = subject(getattr(model, "backbone", model))
        sources = recorded_sources(backbone)
        start = part_prefix(backbone, [s.key for s in sources])
        self.task_type, inside = task_of(model)
        self.prefix = start if inside else ""
        by_layer = {id(subject(p.layer)): p for p in places(model)}
        self.tensors: dict[str, list[Weight]] = {}
        self._tops: set[str] = set()
        self.heads: set[str] = set()
        if backbone is not subject(model):
            heads = recorded_head(model) or _head_sources(model)
            self.heads = {source.key for source in heads}
            self._tops |= self.heads
            sources = [*sources, *heads]
        for source in sources:
            key = source.key
            if is_top(key):
                self._tops.add(key)
            elif key not in self._tops:
                key = key.removeprefix(start)
            place = by_layer.get(id(source.layer))
            if place is not None:
                self.tensors.setdefault(key, []).append(Weight(place, source))
        self._tied_head(model)
        self._now = {key: in_memory(backbone, key) for key in self.tensors}
        self._known = {new: key for key, new in self._now.items()}

    def _tied_head(self, model):
        """An output projection that is the table of the inputs."""
        key = "lm_head.weight"
        if self.task_type != "CAUSAL_LM" or key in self.tensors:
            return
        self._tops.add(key)
        for weights in list(self.tensors.values()):
            for weight in weights:
                layer = weight.source.layer
                if getattr(layer, "tie_weights", False):
                    self.tensors[key] = [weight]

    @functools.cached_property
    def modules(self) -> dict[str, list[Weight]]:
        """The kernels that make each linear module, by its name."""
        return {
            key.removesuffix(".weight"): weights
            for key, weights in self.tensors.items()
            if key.endswith(".weight")
            and key != "lm_head.weight"  # a table that is read backwards
            and weights[0].source.attribute in _KERNELS
            and len(weights[0].source.shape) > 1
        }

    def parts(self, module: str) -> list[Part]:
        """The kernels of a module, in the order of its outputs.

        Raises:
            ValueError: Their numbers stand in another order than the
                tensor's.
        """
        weights = self.modules[module]
        slots = [slot_of(weight.source) for weight in weights]
        for weight, slot in zip(weights, slots):
            if slot is None:
                raise ValueError(
                    f"'{module}' is '{weight.place.path}' here, whose numbers "
                    "are in another order than in Hugging Face's module. "
                    "Expected an adapter that leaves it out."
                )
        # A hook that takes the first columns says nothing of those behind.
        total = max(slot.total for slot in slots)
        parts = [
            Part(w.place, kernel_view(w.source.layer), s._replace(total=total))
            for w, s in zip(weights, slots)
        ]
        return sorted(parts, key=lambda part: part.slot.start)

    def module(self, path: str) -> Found | None:
        """The module that a file's path means, whatever stands before it."""
        found = self.tensor(f"{path}.weight")
        if found is None:
            return None
        name = found.name.removesuffix(".weight")
        return found._replace(name=name) if name in self.modules else None

    def tensor(self, path: str) -> Found | None:
        """The tensor that a file's path means, whatever stands before it."""
        pieces = path.split(".")
        for i in range(len(pieces)):
            end, prefix = ".".join(pieces[i:]), ".".join([*pieces[:i], ""])
            name = end if end in self.tensors else self._known.get(end)
            if name is None or (name in self._tops and i):
                continue
            renamed = self._now[name] != name and end != name
            return Found(name, prefix if i else "", renamed)
        return None

    def path(
        self, name: str, prefix: str | None = None, renamed: bool = True
    ) -> str:
        """The full name in a Hugging Face class.

        Args:
            name: The name of a tensor or module.
            prefix: That of the class; this model's kind by default.
            renamed: Whether in the words of transformers 5.
        """
        weight = f"{name}.weight"
        if weight in self._now:
            new, top = self._now[weight].removesuffix(".weight"), weight
        else:
            new, top = self._now[name], name
        if top in self._tops:
            return name
        prefix = self.prefix if prefix is None else prefix
        return prefix + (new if renamed else name)


def _head_sources(model):
    """The weights of a task's own layers, each from a linear module."""
    sources = []
    for name, module in head_names(model).items():
        layer = subject(model.get_layer(name))
        shape = tuple(layer.kernel.shape)
        key = f"{module}.weight"
        sources.append(Source(layer, "kernel", shape, key, _transposed))
        if layer.bias is not None:
            shape = tuple(layer.bias.shape)
            sources.append(Source(layer, "bias", shape, f"{module}.bias", None))
    return sources


def _transposed(tensor, shape):
    return np.transpose(tensor)
