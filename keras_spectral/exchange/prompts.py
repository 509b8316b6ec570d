"""PEFT's prefixes and soft prompts: one tensor for a whole model."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import to_numpy
from keras_spectral.backbones import SoftPrompt
from keras_spectral.blocks import PrefixTuning
from keras_spectral.blocks.kinds import BlockView
from keras_spectral.exchange.pieces import Piece
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.presets import PRESETS

KEY = "prompt_embeddings"
METHODS = {"PREFIX_TUNING": PrefixTuning, "PROMPT_TUNING": SoftPrompt}


def prompt_pieces(
    model: keras.Model, tensor: np.ndarray, config: dict
) -> list[Piece]:
    """The adapters of a prefix, one a block, or of a soft prompt.

    Args:
        model: The model that gets them.
        tensor: PEFT's prompt embeddings.
        config: The checked configuration.
    """
    count = config["num_virtual_tokens"]
    if count is not None and tensor.shape[:1] != (count,):
        raise _wrong_shape(tensor, f"{count} rows, as num_virtual_tokens says")
    if config["peft_type"] == "PROMPT_TUNING":
        return _soft_prompt(model, tensor)
    return _prefix(model, tensor)


def prompt_tensors(
    model: keras.Model, adapters: list[Place]
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, float]]:
    """The tensor of a prefix or soft prompt, fields, and errors by path."""
    first = adapters[0].layer
    errors = {place.path: 0.0 for place in adapters}
    fields = {
        "num_virtual_tokens": first.length,
        "num_transformer_submodules": 1,
    }
    if isinstance(first, SoftPrompt):
        if first.start() or first.keep:
            raise ValueError(
                f"The soft prompt of '{adapters[0].path}' stands behind "
                f"{first.start()} tokens, with keep={first.keep}. Expected "
                "position=0 and keep=False, which is what PEFT has."
            )
        fields |= {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
        fields |= _sizes(model, first.prompt.shape[-1])
        return {KEY: to_numpy(first.prompt)}, fields, errors
    blocks = {place.key for place in _blocks(model)}
    if blocks != {place.key for place in adapters} or any(
        place.layer.length != first.length for place in adapters
    ):
        raise ValueError(
            f"The prefix is on {len(adapters)} of {len(blocks)} blocks, or of "
            "several lengths. Expected one of one length on each block, which "
            "is what PEFT has."
        )
    rows = []
    for place in adapters:
        keys, values = map(to_numpy, place.layer.prefix.keys_and_values())
        rows += [_turned(place.layer.view, keys, first.length), values]
    heads = _heads(first.view)
    fields |= {
        "peft_type": "PREFIX_TUNING",
        "num_layers": len(adapters),
        "num_attention_heads": heads,
        "token_dim": rows[0].shape[1],
        "prefix_projection": False,
    }
    return {KEY: np.concatenate(rows, axis=1)}, fields, errors


def _soft_prompt(model, tensor):
    backbone = getattr(model, "backbone", None)
    found = [p for p in places(model) if subject(p.layer) is subject(backbone)]
    if not found:
        raise ValueError(
            f"'{model.name}' has no backbone that a soft prompt could go "
            "before. Expected a task, such as a text classifier."
        )
    embedding = SoftPrompt.view_of(subject(backbone)).embedding
    width = embedding.output_dim
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise _wrong_shape(tensor, f"(tokens, {width}), as the embedding has")
    options = {"length": len(tensor), "position": 0}
    return [Piece(found[0], "soft_prompt", options, {"prompt": tensor})]


def _prefix(model, tensor):
    blocks = _blocks(model)
    views = [BlockView(subject(place.layer)) for place in blocks]
    sizes = [view.linear("key").n_out for view in views]
    if not blocks or tensor.ndim != 2 or tensor.shape[1] != 2 * sum(sizes):
        raise _wrong_shape(
            tensor,
            f"(tokens, {2 * sum(sizes)}): keys and values for each of "
            f"{len(blocks)} blocks",
        )
    count, start, pieces = len(tensor), 0, []
    for place, view, size in zip(blocks, views, sizes):
        keys = tensor[:, start : start + size]
        values = tensor[:, start + size : start + 2 * size]
        start += 2 * size
        rows = np.concatenate([_turned(view, keys, -count), values], axis=1)
        pieces.append(
            Piece(place, "prefix", {"length": count}, {"prefix_rows": rows})
        )
    return pieces


def _turned(view, keys, positions):
    """Keys (length, n_key) that are turned by a number of positions.

    PEFT's tokens stand behind the prefix, at positions from its length on,
    and ours at those from 0 on: seen from them the prefix's keys are turned
    by its length where positions turn queries.
    """
    attention = view.attention
    rotary = getattr(attention, "rotary_embedding_layer", None)
    turn = getattr(attention, "_apply_rope", None) or rotary
    if turn is None:
        raise ValueError(
            f"'{view.block.name}' ({type(view.block).__name__}) takes "
            "positions from a table, or in its own way, and PEFT puts the "
            "tokens behind a prefix, at other positions. Expected a model "
            "with rotary positions, such as Llama 3 or Gemma."
        )
    heads = _heads(view)
    keys = np.reshape(keys, (len(keys), 1, heads, -1))
    keys = ops.cast(ops.convert_to_tensor(keys), "float32")
    if positions > 0 and turn is not rotary:
        # Gemma's attention mixes the order of a head's numbers as well.
        size = keys.shape[-1]
        probe = ops.reshape(ops.arange(size, dtype="float32"), (1, 1, 1, -1))
        order = ops.convert_to_numpy(turn(probe, start_index=0)).reshape(-1)
        keys = ops.take(keys, np.argsort(order), axis=-1)
        turn = attention.rope_layer
    return to_numpy(turn(keys, start_index=positions)).reshape(len(keys), -1)


def _heads(view):
    """How many heads keys have."""
    shape = view.linear("key").variable().shape
    return view.linear("key").n_out // shape[-1]


def _blocks(model):
    """The places of the blocks, in the order in which they run."""
    return PRESETS["blocks"](model, places(model))


def _sizes(model, width):
    backbone = subject(model.backbone)
    return {
        "token_dim": int(width),
        "num_layers": getattr(backbone, "num_layers", None),
        "num_attention_heads": getattr(backbone, "num_heads", None),
    }


def _wrong_shape(tensor, expected):
    return ValueError(
        f"The tensor '{KEY}' has shape {tensor.shape}. Expected {expected}: "
        "the adapter belongs to a base of another size, or is damaged."
    )
