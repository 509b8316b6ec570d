"""load_peft: what HF PEFT wrote, as adapters of a KerasHub model."""

import os
import warnings

import keras

from keras_spectral._internal.checks import check_model
from keras_spectral.exchange.config import checked_config
from keras_spectral.exchange.content import Content
from keras_spectral.exchange.folder import read_folder
from keras_spectral.layers import METHODS
from keras_spectral.layers.member import own_weights
from keras_spectral.layers.trained_copy import NamedCopy
from keras_spectral.model.hosts import check_new_name
from keras_spectral.model.placing import Request
from keras_spectral.model.placing import wrap_places
from keras_spectral.model.wrap import check_chosen
from keras_spectral.saving.fresh import give_placeholders


def load_peft(
    model: keras.Model, folder: str | os.PathLike, *, adapter: str = "default"
) -> keras.Model:
    """Puts an adapter that HF PEFT trained into a KerasHub model, in place.

    The folder holds `adapter_config.json` and `adapter_model.safetensors`, as
    PEFT's `save_pretrained` and `ks.save_peft` write them. It can be a LoRA
    (with rank patterns, rsLoRA, DoRA, biases, embeddings, convolutions), an
    AdaLoRA, IA3, VeRA, LoHa, LoKr, OFT, BOFT, a prefix or a soft prompt.
    `modules_to_save`, classification heads among them, become copies that
    train with the adapter. As by `wrap_model`, an adapter of a new name
    becomes the only active one.

    Layers are found by the names that KerasHub's own converter from Hugging
    Face has for them, so nothing but the folder is read.

    Args:
        model: A KerasHub task or backbone of a family that KerasHub converts
            from Hugging Face, with the base that the adapter was trained on.
        folder: The adapter's folder.
        adapter: The name that it gets.

    Returns:
        The model.

    Raises:
        ValueError: A file is damaged; the kind, or a field of the
            configuration, is not supported; tensors are missing, unexpected
            or of other shapes; the name is taken. The model is as it was.
        FileNotFoundError: The folder or one of its files is missing.

    Example:

    >>> load_peft(keras.Sequential(), "nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: There is no folder nowhere. ...
    """
    check_model(model)
    check_new_name(model, adapter)
    config, tensors = read_folder(folder)
    config = checked_config(config, folder)
    content = Content(model, config, tensors, folder)
    check_chosen(model, [piece.place for piece in content.pieces], adapter)
    requests = [
        Request(p.place, METHODS[p.method], p.options, adapter)
        for p in content.pieces
    ]
    kept = [(place, adapter) for place, _ in content.copies.values()]

    def fill(made):
        adapters = iter(content.pieces)
        for place in made:
            if isinstance(place.layer, NamedCopy):
                _fill_copy(place.layer, content.copies[place.key][1])
            else:
                weights = {w.name: w for w in own_weights(place.layer)}
                for name, value in next(adapters).values.items():
                    weights[name].assign(value)
        for name, value in content.shared.items():
            getattr(made[0].layer.shared, name).assign(value)

    wrap_places(model, requests, kept, give_placeholders, fill)
    if content.left_out:
        warnings.warn(
            f"{folder} holds {content.left_out}, parts of a task, which the "
            "backbone lacks: they are ignored. The task, such as "
            "`BertTextClassifier`, takes them.",
            stacklevel=2,
        )
    return model


def _fill_copy(copy, values):
    for attribute, value in values.items():
        own = getattr(copy.base, attribute)
        for variable, trained in copy.pairs:
            if variable is own:
                trained.assign(value)
