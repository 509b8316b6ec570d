"""save_peft: an adapter as a folder that HF PEFT, vLLM and others load."""

import os
from typing import Any

import keras

from keras_spectral._backend import is_first_process
from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_path
from keras_spectral._internal.checks import check_rank
from keras_spectral.backbones import SoftPrompt
from keras_spectral.blocks import PrefixTuning
from keras_spectral.exchange import prompts
from keras_spectral.exchange.card import model_card
from keras_spectral.exchange.folder import write_folder
from keras_spectral.exchange.kinds import KINDS
from keras_spectral.exchange.modules import ia3_tensors
from keras_spectral.exchange.modules import lora_tensors
from keras_spectral.exchange.names import HubNames
from keras_spectral.exchange.readers import WHOLE
from keras_spectral.exchange.readers import start_of
from keras_spectral.exchange.trained import bias_tensors
from keras_spectral.exchange.trained import copy_tensors
from keras_spectral.layers import IA3
from keras_spectral.layers import BitFit
from keras_spectral.layers import KernelAdapter
from keras_spectral.layers.trained_copy import NamedCopy
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import member_places
from keras_spectral.model.hosts import require_names
from keras_spectral.saving.reading import check_finite


def save_peft(
    model: keras.Model,
    folder: str | os.PathLike,
    *,
    adapter: str | None = None,
    rank: int | None = None,
    base: str | None = None,
) -> dict[str, float]:
    """Writes an adapter as a folder that HF PEFT and vLLM load.

    The folder gets `adapter_model.safetensors`, `adapter_config.json` and a
    model card, `README.md`, if it has none; other files in it stay. LoRA,
    ConvLoRA, DoRA, IA3, VeRA, LoHa, LoKr, OFT and BOFT are written as they
    are, whatever has a low rank (spectral additive and rotate, gated, DyLoRA,
    AdaLoRA, LoRA-FA, PiSSA) as the LoRA that it is, without ranks that do
    nothing. Trained heads go with it.

    The names in it are those of the task's class in transformers: of
    `LlamaForCausalLM` for a `Llama3CausalLM`, of the bare model for a
    backbone. They are taken from KerasHub's own converter.

    Of several processes of JAX the first one writes, and all call this.

    Args:
        model: A wrapped KerasHub task or backbone of a family that KerasHub
            converts from Hugging Face.
        folder: The folder; it is made if its parent is there.
        adapter: The name of the adapter; not needed if there is one.
        rank: What larger ranks, and changes that have no low rank, are
            truncated to: VeRA, LoHa, LoKr, OFT and BOFT are written as a LoRA
            then. None truncates nothing.
        base: What PEFT calls the base model, such as
            `"google-bert/bert-base-uncased"`, for the configuration and the
            card.

    Returns:
        For each path the relative error of the change in the Frobenius norm:
        0.0 where it is written as it is.

    Raises:
        ValueError: There is no such adapter, or it holds NaN or infinities;
            it, or a layer that it is on, has no counterpart in PEFT. Nothing
            is written then.
        OSError: The files cannot be written.

    Example:

    >>> import keras_hub, tempfile
    >>> model = keras_hub.models.BertBackbone(
    ...     vocabulary_size=16, num_layers=1, num_heads=2, hidden_dim=8,
    ...     intermediate_dim=12, max_sequence_length=8,
    ... )
    >>> model = ks.wrap_model(model, "lora", ".*/query", rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     errors = save_peft(model, folder)
    ...     model = ks.load_peft(ks.unwrap_model(model), folder)
    >>> errors
    {'transformer_layer_0/self_attention_layer/query': 0.0}
    """
    check_model(model)
    check_path(folder, "folder")
    if rank is not None:
        check_rank(rank)
    name = _one_name(model, adapter)
    names = HubNames(model)
    found = adapter_places(model, names=[name])
    biases = [p for p in found if isinstance(p.layer, BitFit)]
    adapters = [p for p in found if not isinstance(p.layer, BitFit)]
    copies = [
        place
        for place in member_places(model, [name])
        if isinstance(place.layer, NamedCopy)
    ]
    if not adapters:
        raise ValueError(
            f"The adapter '{name}' of model '{model.name}' trains biases "
            "alone, which is no kind of PEFT's. Expected one of another "
            "method beside them; `merge_model` folds them into the base."
        )
    tensors, fields, errors = _written(names, model, adapters, rank)
    trained, fields["modules_to_save"] = copy_tensors(names, copies)
    tensors |= trained
    if biases:
        tensors |= bias_tensors(names, biases, fields)
    start = start_of(fields["peft_type"])
    tensors = {
        key if key in WHOLE else start + key: value
        for key, value in tensors.items()
    }
    check_finite(tensors, f"Not written to {os.fspath(folder)}")
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": names.task_type,
        "inference_mode": True,
        **fields,
    }
    card = model_card(model, config, errors)
    if is_first_process():
        write_folder(folder, config, tensors, card)
    return errors


def _written(names, model, adapters, rank):
    """Tensors, fields and errors of adapters, which are of one kind."""
    for same in KINDS.values():
        own = all(isinstance(place.layer, same.layer) for place in adapters)
        if own and rank is None:
            return same.written(names, adapters)
    for kind, write in (
        (PrefixTuning, lambda: prompts.prompt_tensors(model, adapters)),
        (SoftPrompt, lambda: prompts.prompt_tensors(model, adapters)),
        (IA3, lambda: ia3_tensors(names, adapters)),
        (KernelAdapter, lambda: lora_tensors(names, adapters, rank)),
    ):
        of_kind = [p for p in adapters if isinstance(p.layer, kind)]
        if len(of_kind) == len(adapters):
            return write()
        if of_kind and kind is not KernelAdapter:
            break
    found = sorted({place.layer.method for place in adapters})
    raise ValueError(
        f"The adapter has the methods {found}. Expected one of PEFT's kinds on "
        "all layers: LoRA and what converts to it, DoRA, IA3, VeRA, LoHa, "
        "LoKr, OFT, BOFT, a prefix or a soft prompt."
    )


def _one_name(model, adapter):
    if adapter is not None and not isinstance(adapter, str):
        raise ValueError(
            f"Received adapter={adapter!r}. Expected a name: a folder holds "
            "one adapter."
        )
    found = require_names(model, adapter)
    if len(found) > 1:
        raise ValueError(
            f"Model '{model.name}' has the adapters {found}. Expected "
            "adapter= with one of them: a folder holds one adapter."
        )
    return found[0]
