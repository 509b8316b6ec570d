"""What PEFT's tensors of one module become: adapters of single layers."""

import math
from typing import NamedTuple

import numpy as np
from keras import ops

from keras_spectral._internal.linalg import nearest_pair
from keras_spectral.exchange.config import is_target
from keras_spectral.exchange.config import matching_key
from keras_spectral.exchange.names import Part
from keras_spectral.kernels import KernelView
from keras_spectral.model.paths import Place

Tensors = dict[str, np.ndarray]
_SMALL = 1e-5  # PEFT adds it to the rank of AdaLoRA


class Piece(NamedTuple):
    """An adapter of one layer.

    Attributes:
        place: Where it goes.
        method: Its name here.
        options: Its options.
        values: Its parts, by their attributes.
        bias: What it adds to the layer's bias besides, or None.
    """

    place: Place
    method: str
    options: dict
    values: Tensors
    bias: np.ndarray | None = None


def lora_pieces(
    parts: list[Part], tensors: Tensors, config: dict, path: str
) -> list[Piece]:
    """The adapters of a module with LoRA or DoRA.

    Args:
        parts: The kernels that make the module: several if it is fused.
        tensors: The file's tensors of the module, by their suffixes.
        config: The checked configuration.
        path: The module's name in the file.
    """
    layout = parts[0].slot.layout
    table = layout == "table"
    names = ["lora_embedding_A", "lora_embedding_B"]
    names = names if table else ["lora_A.weight", "lora_B.weight"]
    a, b = (take(tensors, name, path) for name in names)
    rank = by_pattern(config, "r", "rank_pattern", path)
    _check_shapes(parts, path, rank, dict(zip(names, (a, b))))
    a, b = _as_matrix(a, layout).T, b.reshape(b.shape[0], rank).T
    alpha = by_pattern(config, "lora_alpha", "alpha_pattern", path)
    rooted = config["use_rslora"]
    magnitude = bias = None
    if config["use_dora"]:
        magnitude = take(tensors, "lora_magnitude_vector", path).reshape(-1)
        _check_size(magnitude, b.shape[1], f"{path}.lora_magnitude_vector")
    if config["lora_bias"] and not table:
        bias = take(tensors, "lora_B.bias", path)
        _check_size(bias, b.shape[1], f"{path}.lora_B.bias")
        bias = bias * alpha / (math.sqrt(rank) if rooted else rank)
    pieces = []
    needs_all = magnitude is not None or bias is not None
    for part, columns, codes in _shares(parts, b, needs_all):
        own_a, own_b = a[:, codes], b[codes][:, columns]
        options = {"alpha": _shared(alpha, own_a.shape[1] / rank, rooted)}
        own_a, own_b, options = _fitted(part, own_a, own_b, options, rooted)
        options["scaling"] = "rslora" if rooted else "standard"
        options["dropout"] = 0.0 if table else config["lora_dropout"]
        values = {"lora_a": own_a, "lora_b": own_b}
        method = "conv_lora" if layout == "conv" else "lora"
        if magnitude is not None:
            method = "dora"
            values["magnitude"] = magnitude[columns]
        own_bias = None if bias is None else bias[columns]
        pieces.append(Piece(part.place, method, options, values, own_bias))
    return pieces


def adalora_pieces(
    parts: list[Part], tensors: Tensors, config: dict, path: str
) -> list[Piece]:
    """The adapters of a module with AdaLoRA; see `lora_pieces`."""
    a, b, e = (take(tensors, f"lora_{x}", path) for x in "ABE")
    start = config["init_r"]
    flags = (config["rank_pattern"] or {}).get(f"{path}.lora_E")
    rank = start if flags is None else sum(flags)
    found = {"lora_A": a, "lora_B": b, "lora_E": e}
    _check_shapes(parts, path, rank, found)
    _check_size(e, rank, f"{path}.lora_E")
    if not rank:
        return []
    alpha = config["lora_alpha"]
    if rank != start:
        alpha *= (rank + _SMALL) / (start + _SMALL)
    options = {"dropout": config["lora_dropout"]}
    kept = {"rank": rank, "orthogonality": config["orth_reg_weight"]}
    pieces = []
    for part in parts:
        own_a, own_b = a.T, b.T[:, part.columns]
        if rank > part.view.max_rank:  # PEFT allows that
            scale = alpha / (rank + _SMALL)
            scaled = {**options, "alpha": scale * rank}
            pair = _fitted(part, own_a * e[:, 0], own_b, scaled, False)
            values = dict(zip(("lora_a", "lora_b"), pair[:2]))
            pieces.append(Piece(part.place, "lora", pair[2], values))
            continue
        own = {**options, **kept, "alpha": alpha}
        values = {"lora_a": own_a, "lora_b": own_b, "lora_e": e[:, 0]}
        pieces.append(Piece(part.place, "adalora", own, values))
    return pieces


def ia3_pieces(
    parts: list[Part], tensors: Tensors, config: dict, path: str
) -> list[Piece]:
    """The adapters of a module with IA3; see `lora_pieces`."""
    gains = take(tensors, "ia3_l", path)
    n_in, total = parts[0].view.n_in, parts[0].slot.total
    inputs = gains.ndim > 0 and gains.shape[0] == 1 and gains.size == n_in
    outputs = gains.size == total
    if gains.ndim == 2:
        outputs = outputs and gains.shape[0] == total
    if inputs and outputs:  # both have as many, and a convolution one shape
        meant = {**config, "target_modules": config["feedforward_modules"]}
        inputs = is_target(meant, path)
    if not inputs and not outputs:
        raise wrong_shape(path, "ia3_l", gains, f"({total}, 1) or (1, {n_in})")
    gains = gains.reshape(-1)
    side = "input" if inputs else "output"
    return [
        Piece(
            part.place,
            "ia3",
            {"side": side},
            {"gains": gains if inputs else gains[part.columns]},
        )
        for part in parts
    ]


def _shares(parts, b, needs_all):
    """For each layer of a module its columns of B, and its rows.

    Of a pair that was made of one for each layer (see `join_pairs`) each gets
    its own back; layers of any other share all rows. Layers that B leaves
    alone get none, unless all are needed.
    """
    columns = [part.columns for part in parts]
    used = [np.abs(b[:, c]).max(axis=1) > 0 for c in columns]
    on = [i for i, rows in enumerate(used) if rows.any()]
    rank = len(b)
    every = slice(0, rank)
    alone = len(parts) == 1 or not on
    if alone or rank % len(on) or (needs_all and len(on) < len(parts)):
        return [(w, c, every) for w, c in zip(parts, columns)]
    size = rank // len(on)
    blocks = [slice(k * size, (k + 1) * size) for k in range(len(on))]
    if any(
        used[i].sum() != used[i][block].sum() for i, block in zip(on, blocks)
    ):
        return [(w, c, every) for w, c in zip(parts, columns)]
    return [(parts[i], columns[i], block) for i, block in zip(on, blocks)]


def within_rank(
    view: KernelView, a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A pair of no higher rank than the kernel has, with the same product."""
    if a.shape[1] <= view.max_rank:
        return a, b
    product = ops.convert_to_tensor(a @ b)
    a, b = nearest_pair(product, view.max_rank)
    return ops.convert_to_numpy(a), ops.convert_to_numpy(b)


def _fitted(part, a, b, options, rooted):
    """A pair `within_rank`, and its options."""
    rank = a.shape[1]
    a, b = within_rank(part.view, a, b)
    alpha = _shared(options["alpha"], a.shape[1] / rank, rooted)
    return a, b, {**options, "alpha": alpha, "rank": a.shape[1]}


def _shared(alpha, share, rooted):
    """The alpha of a part of the ranks, that gives them the same scale."""
    if share == 1:
        return alpha
    alpha *= math.sqrt(share) if rooted else share
    return float(f"{alpha:.12g}")  # what was multiplied by a root comes back


def by_pattern(config: dict, field: str, patterns: str, path: str):
    """A field's value for a module, which a pattern may change."""
    key = matching_key(config[patterns] or {}, path)
    return config[field] if key is None else config[patterns][key]


def _as_matrix(a, layout):
    """A of PEFT as (rank, n_in)."""
    if layout == "conv":  # (rank, channels, *size), ours is (*size, channels)
        a = np.moveaxis(a, 1, -1)
    return a.reshape(a.shape[0], -1)


def take(tensors: Tensors, name: str, path: str) -> np.ndarray:
    """One of a module's tensors."""
    if name not in tensors:
        raise ValueError(
            f"The tensor '{path}.{name}' is missing. Expected it beside "
            f"{sorted(tensors)}: the file is damaged or of another kind than "
            "its configuration says."
        )
    return tensors[name]


def _check_shapes(parts, path, rank, found):
    """Raises unless the pair fits the rank and the layers."""
    n_in, total = parts[0].view.n_in, parts[0].slot.total
    (first, a), (second, b) = list(found.items())[:2]
    right = a.shape == (rank, n_in)
    if parts[0].slot.layout == "conv":
        kernel = parts[0].view.variable().shape
        right = a.shape == (rank, kernel[-2], *kernel[:-2])
    if not right:
        raise wrong_shape(path, first, a, f"rank {rank} by {n_in} inputs")
    if b.shape[:1] != (total,) or b.size != total * rank:
        raise wrong_shape(path, second, b, f"{total} outputs by rank {rank}")


def _check_size(tensor, size, name):
    if tensor.size != size:
        path, _, suffix = name.rpartition(".")
        raise wrong_shape(path, suffix, tensor, f"{size} numbers")


def wrong_shape(
    path: str, name: str, tensor: np.ndarray, expected: str
) -> ValueError:
    """The error for a tensor of another shape than expected."""
    return ValueError(
        f"The tensor '{path}.{name}' has shape {tensor.shape}. Expected "
        f"{expected}, as this model's layer and the configuration have: the "
        "adapter belongs to a base of another size, or is damaged."
    )
