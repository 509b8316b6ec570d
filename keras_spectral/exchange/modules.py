"""Adapters of single layers as PEFT's tensors of modules."""

import collections
import math
from typing import Any

import numpy as np

from keras_spectral._backend import to_numpy
from keras_spectral.exchange.names import HubNames
from keras_spectral.exchange.names import Part
from keras_spectral.exchange.pairs import join_pairs
from keras_spectral.exchange.pairs import pair_of
from keras_spectral.layers import DoRADense
from keras_spectral.model.paths import Place

Written = tuple[dict[str, np.ndarray], dict[str, Any], dict[str, float]]


def lora_tensors(
    names: HubNames, adapters: list[Place], rank: int | None
) -> Written:
    """The tensors of a LoRA or DoRA, its fields, and errors by path."""
    directed = [isinstance(place.layer, DoRADense) for place in adapters]
    if any(directed) and not all(directed):
        raise ValueError(
            "The adapter has DoRADense on some layers and other methods on "
            "others. Expected DoRADense on all or on none: PEFT has one "
            "use_dora for all layers."
        )
    pairs, errors = {}, {}
    for place in adapters:
        pairs[place.key], errors[place.path] = pair_of(place.layer, rank)
    rooted = all(pair.rooted for pair in pairs.values())
    modules, joined = modules_of(names, adapters), {}
    for module, parts in modules.items():
        pair = join_pairs(parts, pairs)
        joined[names.path(module)] = pair.with_scale(pair.scale, rooted)
    tensors = {}
    for module, parts in modules.items():
        path = names.path(module)
        layout = parts[0].slot.layout
        tensors |= _pair_tensors(path, joined[path], parts[0], layout)
    fields = {
        "peft_type": "LORA",
        **ranks({k: (p.rank, p.alpha) for k, p in joined.items()}),
        "use_rslora": rooted,
        "use_dora": any(directed),
        "lora_dropout": max(place.layer.dropout for place in adapters),
        "bias": "none",
        "fan_in_fan_out": is_turned(modules),
        "target_modules": sorted(joined),
        "init_lora_weights": True,
    }
    return tensors, fields, errors


def ia3_tensors(names: HubNames, adapters: list[Place]) -> Written:
    """The tensors of an IA3, its fields, and errors by path."""
    by_key = {place.key: place.layer for place in adapters}
    modules = modules_of(names, adapters)
    tensors, inward = {}, []
    for module, parts in modules.items():
        path = names.path(module)
        found = [by_key.get(part.place.key) for part in parts]
        sides = {layer.side if layer else "output" for layer in found}
        gains = [
            np.ones(part.view.n_out, "float32")
            if layer is None
            else to_numpy(layer.gains)
            for layer, part in zip(found, parts)
        ]
        same = all(np.array_equal(gains[0], other) for other in gains)
        if len(sides) > 1 or (sides == {"input"} and not same):
            raise ValueError(
                f"'{path}' is one module in Hugging Face's model and "
                f"{len(parts)} layers here, whose inputs are scaled apart. "
                "Expected output factors, or equal ones."
            )
        conv = parts[0].slot.layout == "conv"
        if sides == {"input"}:
            inward.append(path)
            shape = (1, -1, 1, 1) if conv else (1, -1)
            tensors[f"{path}.ia3_l"] = gains[0].reshape(shape)
            continue
        values = np.ones(parts[0].slot.total, "float32")
        for part, own in zip(parts, gains):
            values[part.columns] = own
        shape = (1, -1, 1, 1) if conv else (-1, 1)
        tensors[f"{path}.ia3_l"] = values.reshape(shape)
    fields = {
        "peft_type": "IA3",
        "target_modules": sorted(map(names.path, modules)),
        "feedforward_modules": sorted(inward),
        "fan_in_fan_out": is_turned(modules),
        "init_ia3_weights": True,
    }
    return tensors, fields, {place.path: 0.0 for place in adapters}


def modules_of(names: HubNames, adapters: list[Place]) -> dict[str, list[Part]]:
    """The modules that the adapted layers make."""
    wanted = {place.key: place for place in adapters}
    found = {}
    for module, weights in names.modules.items():
        keys = {weight.place.key for weight in weights}
        if keys & wanted.keys():
            found[module] = names.parts(module)
            for key in keys:
                wanted.pop(key, None)
    for place in wanted.values():
        raise ValueError(
            f"'{place.path}' ({place.layer.method}) has no module in Hugging "
            "Face's model that KerasHub's converter knows, or none that an "
            "adapter of PEFT's fits. Expected an adapter without it "
            "(`exclude`)."
        )
    return found


def _pair_tensors(path, pair, part, layout):
    a, b = pair.a.T, pair.b.T
    if layout == "table":
        tensors = {"lora_embedding_A": a, "lora_embedding_B": b}
    elif layout == "conv":
        sizes = part.view.layer.kernel_size
        a = np.moveaxis(a.reshape(len(a), *sizes, -1), -1, 1)
        b = b.reshape(*b.shape, *[1] * len(sizes))
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
    else:
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
    if pair.magnitude is not None:
        shape = (1, -1, 1, 1) if layout == "conv" else (-1,)
        tensors["lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    return {
        f"{path}.{name}": np.ascontiguousarray(value)
        for name, value in tensors.items()
    }


def ranks(
    found: dict[str, tuple[int, float]], alpha: str = "lora_alpha"
) -> dict[str, Any]:
    """The fields that give each module its rank and its alpha.

    Args:
        found: Both, by the modules' paths.
        alpha: What the kind calls the second.
    """
    rank = _most_common(rank for rank, _ in found.values())
    most = _most_common(a for r, a in found.values() if r == rank)
    return {
        "r": rank,
        alpha: _plain(most),
        "rank_pattern": {k: r for k, (r, _) in found.items() if r != rank},
        "alpha_pattern": {
            k: _plain(a) for k, (_, a) in found.items() if a != most
        },
    }


def _most_common(values):
    return collections.Counter(values).most_common(1)[0][0]


def _plain(alpha):
    """A whole number where it is one, as PEFT's are."""
    whole = math.isfinite(alpha) and alpha == int(alpha)
    return int(alpha) if whole else float(alpha)


def is_turned(modules: dict[str, list[Part]]) -> bool:
    """Whether kernels lie as (in, out), as those of GPT-2 do."""
    return any(
        part.slot.layout == "conv1d"
        for parts in modules.values()
        for part in parts
    )
