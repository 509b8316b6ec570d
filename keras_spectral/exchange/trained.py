"""What trains beside an adapter as PEFT's tensors: heads, copies, biases."""

from typing import Any

import numpy as np

from keras_spectral._backend import to_numpy
from keras_spectral.exchange.names import HubNames
from keras_spectral.exchange.slots import slot_of
from keras_spectral.exchange.slots import to_tensor
from keras_spectral.layers.bitfit import bias_name
from keras_spectral.model.paths import Place

Tensors = dict[str, np.ndarray]


def copy_tensors(
    names: HubNames, copies: list[Place]
) -> tuple[Tensors, list[str] | None]:
    """The tensors of copies and heads, and PEFT's `modules_to_save`.

    A classifier's head is always there: PEFT expects it.

    Args:
        names: The model's names.
        copies: The places of the copies.
    """
    by_key = {place.key: place.layer for place in copies}
    tensors: Tensors = {}
    modules: list[str] = []
    left = {
        id(variable): (place.path, variable.name)
        for place in copies
        for variable, _ in place.layer.pairs
    }
    for key, weights in names.tensors.items():
        is_head = key in names.heads
        owners = [by_key.get(weight.place.key) for weight in weights]
        if not any(owners) and not is_head:
            continue
        path = names.path(key)
        if len(weights) > 1:
            raise ValueError(
                f"'{path}' is made of several layers here, of which "
                f"'{weights[0].place.path}' trains as a copy. Expected none of "
                "them in `trainable`."
            )
        (weight,), (copy,) = weights, owners
        source = weight.source
        slot = slot_of(source)
        if slot is None or slot.total != _outputs(source, slot):
            raise ValueError(
                f"'{weight.place.path}' trains as a copy, and its "
                f"'{source.attribute}' is not all of '{path}' in Hugging "
                "Face's model. Expected `trainable` without it."
            )
        value = _value(copy, source)
        tensors[path] = np.ascontiguousarray(
            to_tensor(slot, source.layer, value)
        )
        left.pop(id(getattr(source.layer, source.attribute)), None)
        module = path.partition(".")[0] if is_head else path.rpartition(".")[0]
        modules.append(module)
    for path, name in left.values():
        raise ValueError(
            f"'{path}' trains as a copy, and its '{name}' has no tensor in "
            "Hugging Face's model that KerasHub's converter knows. Expected "
            "`trainable` without it."
        )
    return tensors, sorted(set(modules)) or None


def bias_tensors(
    names: HubNames, biases: list[Place], fields: dict[str, Any]
) -> Tensors:
    """The tensors of trained biases, whole; sets the field that says so."""
    kind = fields["peft_type"]
    if "bias" not in fields:
        raise ValueError(
            f"'{biases[0].path}' trains its bias, which PEFT does not do "
            f"beside {kind}. Expected an adapter without trained biases."
        )
    by_key = {place.key: place for place in biases}
    targets = set(fields["target_modules"])
    tensors: Tensors = {}
    left = dict(by_key)
    for key, weights in names.tensors.items():
        named = [(w, by_key.get(w.place.key)) for w in weights]
        named = [(w, p) for w, p in named if p and _is_bias(w.source)]
        if not named:
            continue
        path = names.path(key)
        module = path.removesuffix(".bias")
        inner = ".base_layer.bias" if module in targets else ".bias"
        pieces = []
        for weight in sorted(weights, key=lambda w: slot_of(w.source).start):
            layer = weight.source.layer
            value = getattr(layer, weight.source.attribute)
            place = left.pop(weight.place.key, None)
            if place is not None:
                value = value + place.layer.bias_delta
            pieces.append(to_numpy(value).reshape(-1))
        tensors[module + inner] = np.concatenate(pieces)
    for place in left.values():
        raise ValueError(
            f"'{place.path}' trains its bias, which has no tensor in Hugging "
            "Face's model that KerasHub's converter knows. Expected an adapter "
            "without it."
        )
    alone = all(".base_layer." in key for key in tensors)
    fields["bias"] = f"{kind.lower()}_only" if alone else "all"
    return tensors


def _is_bias(source):
    return source.attribute == bias_name(source.layer)


def _value(copy, source):
    """A weight's value in a copy, or in its layer."""
    own = getattr(source.layer, source.attribute)
    for variable, trained in copy.pairs if copy is not None else ():
        if variable is own:
            return trained
    return own


def _outputs(source, slot):
    if slot.layout == "vector":
        return int(np.prod(source.shape))
    return source.shape[1] if slot.layout == "table" else slot.total
