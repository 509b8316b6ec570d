"""load_peft: what HF PEFT wrote, as adapters of a KerasHub model."""

import collections
import os
import re
import warnings

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_adapter_name
from keras_spectral._internal.checks import check_model
from keras_spectral.exchange.config import checked_config
from keras_spectral.exchange.config import is_saved_module
from keras_spectral.exchange.config import is_target
from keras_spectral.exchange.config import matching_key
from keras_spectral.exchange.folder import CONFIG
from keras_spectral.exchange.folder import read_folder
from keras_spectral.exchange.names import Found
from keras_spectral.exchange.names import HubNames
from keras_spectral.exchange.pieces import Piece
from keras_spectral.exchange.pieces import adalora_pieces
from keras_spectral.exchange.pieces import ia3_pieces
from keras_spectral.exchange.pieces import lora_pieces
from keras_spectral.layers import METHODS
from keras_spectral.layers.bitfit import bias_name
from keras_spectral.layers.trained_copy import NamedCopy
from keras_spectral.model.hosts import names_in
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import subject
from keras_spectral.model.placing import Request
from keras_spectral.model.placing import wrap_places
from keras_spectral.saving.fresh import give_placeholders

_START = "base_model.model."
_SUFFIX = re.compile(
    r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_[ABE]|ia3_l"
    r"|lora_magnitude_vector)(?:\.weight)?"
)
# How the pieces of each kind are read.
_PIECES = {"LORA": lora_pieces, "ADALORA": adalora_pieces, "IA3": ia3_pieces}
# Parts of Hugging Face's tasks that a bare backbone does without.
_HEADS = ("classifier", "lm_head", "pooler", "pre_classifier", "score")


def load_peft(
    model: keras.Model, folder: str | os.PathLike, *, adapter: str = "default"
) -> keras.Model:
    """Puts an adapter that HF PEFT trained into a KerasHub model, in place.

    The folder holds `adapter_config.json` and `adapter_model.safetensors`, as
    PEFT's `save_pretrained` and `ks.save_peft` write them. It can be a LoRA
    (with rank patterns, rsLoRA, DoRA, biases, embeddings, convolutions), an
    AdaLoRA, IA3, a prefix or a soft prompt. `modules_to_save`, classification
    heads among them, become copies that train with the adapter. As by
    `wrap_model`, an adapter of a new name becomes the only active one.

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

    >>> load_peft(keras.Sequential(), "nowhere")
    Traceback (most recent call last):
    FileNotFoundError: There is no folder nowhere. ...
    """
    check_model(model)
    check_adapter_name(adapter)
    if adapter in names_in(model):
        raise ValueError(
            f"Model '{model.name}' has an adapter '{adapter}' already. Expected "
            "a new name (`adapter=`), or `delete_adapter` first."
        )
    config, tensors = read_folder(folder)
    config = checked_config(config, folder)
    names = HubNames(model)
    content = _Content(names, config, tensors, folder)
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
                for name, value in next(adapters).values.items():
                    getattr(place.layer, name).assign(value)

    wrap_places(model, requests, kept, give_placeholders, fill)
    return model


class _Content:
    """What a folder's tensors mean in a model.

    Attributes:
        pieces: Adapters of single layers.
        copies: For the key of each layer that trains as a copy its place and
            its values, by attribute.
    """

    def __init__(self, names, config, tensors, folder):
        self.names, self.config, self.folder = names, config, folder
        self.pieces: list[Piece] = []
        self.copies: dict[str, tuple[Place, dict]] = {}
        self._biases: dict[str, tuple[Place, np.ndarray]] = {}
        self._found: dict[str, Found] = {}
        modules, others = self._sorted(tensors)
        self._check_targets(modules)
        read = _PIECES[config["peft_type"]]
        for path, found in self._found.items():
            parts = names.parts(found.name)
            self._check_tables(parts, path)
            for piece in read(parts, modules[path], config, path):
                self.pieces.append(piece)
                if piece.bias is not None:
                    self._add_bias(piece.place, piece.bias)
        for path, tensor in others.items():
            self._read_other(path, tensor)
        self._join()

    def _sorted(self, tensors):
        """The tensors of adapters by module and suffix, and all others."""
        modules: dict = collections.defaultdict(dict)
        others, unknown = {}, []
        for key, tensor in tensors.items():
            path = key.removeprefix(_START)
            match = _SUFFIX.fullmatch(path)
            if path == key:
                unknown.append(key)
            elif ".original_module." in path:
                continue  # the base's own, which PEFT saves with `bias="all"`
            elif match is None:
                others[path] = tensor
            elif self._module(match[1]):
                modules[match[1]][match[2]] = tensor
            elif not self._is_missing_head(path):
                unknown.append(key)
        self._refuse(unknown)
        return modules, others

    def _module(self, path):
        if path not in self._found:
            found = self.names.module(path)
            if found is None:
                return False
            self._found[path] = found
        return True

    def _refuse(self, unknown):
        if not unknown:
            return
        hint = f"Expected names that begin with '{_START}'."
        if unknown[0].startswith(_START):
            known = [self.names.path(name) for name in self.names.modules]
            hint = f"This model has {known[:3]} and {len(known) - 3} more."
            if any(".lm_head." in name for name in unknown):
                hint = (
                    "The output projection is a part of the token embedding "
                    "here, which no adapter fits: train the adapter without."
                )
        raise ValueError(
            f"{self.folder} has unexpected tensors, {unknown[:4]} of "
            f"{len(unknown)}. {hint} It belongs to another model, or is of a "
            "kind that is not supported."
        )

    def _is_missing_head(self, path):
        """Whether a bare backbone can do without a tensor, which is said."""
        start = path.split(".")
        if self.names.prefix or not {*start[:2]} & {*_HEADS}:
            return False
        warnings.warn(
            f"{self.folder} holds '{path}', a part of a task, which a "
            "backbone has not: it is passed over. The task (such as "
            "`BertTextClassifier`) takes it.",
            stacklevel=6,
        )
        return True

    def _check_targets(self, modules):
        """Raises unless there are tensors for what the configuration means."""
        config = self.config
        first = next(iter(self._found.values()), None)
        style = {} if first is None else {"prefix": first.prefix}
        tops = [f for f in self._found.values() if f.prefix]
        if tops:
            style = {"prefix": tops[0].prefix}
        renamed = not self._found or any(
            f.renamed for f in self._found.values()
        )
        expected = {
            self.names.path(name, renamed=renamed, **style): name
            for name in self.names.modules
            if name != "lm_head"
        }
        present = {found.name for found in self._found.values()}
        missing = [
            path
            for path, name in expected.items()
            if name not in present and is_target(config, path)
        ]
        if missing or not modules:
            raise ValueError(
                f"{self.folder} lacks tensors for {missing[:4] or 'any layer'}"
                f" of {len(missing)}, which {CONFIG} names: it has "
                f"target_modules={config['target_modules']!r}. The file is "
                "damaged, or of another kind."
            )
        for field in ("rank_pattern", "alpha_pattern"):
            for key in config.get(field) or {}:
                path = key.removesuffix(".lora_E")
                if not any(matching_key({path: 0}, p) for p in self._found):
                    raise ValueError(
                        f"{self.folder} has {key!r} in its {field}, which "
                        "matches none of the modules that have tensors, such "
                        f"as {next(iter(self._found))!r}. Expected the end of "
                        "such a name."
                    )

    def _check_tables(self, parts, path):
        """Raises if a module is a table that is read backwards as well."""
        for part in parts:
            tied = getattr(part.view.layer, "tie_weights", False)
            if tied and self.names.task_type == "CAUSAL_LM":
                raise ValueError(
                    f"'{path}' is '{part.place.path}' here, which is the "
                    "output projection as well: an adapter would change both. "
                    "Expected an adapter that leaves it out."
                )

    def _read_other(self, path, tensor):
        """Takes a tensor of the base: a head's, a bias, a copy's."""
        plain = path.replace(".base_layer.", ".")
        found = self.names.tensor(plain)
        if found is None:
            if not self._is_missing_head(plain):
                self._refuse([_START + path])
            return
        is_saved = is_saved_module(self.config, plain)
        for weight in self.names.tensors[found.name]:
            source = weight.source
            value = self._value(source, tensor, path)
            now = ops.convert_to_numpy(
                ops.cast(getattr(source.layer, source.attribute), "float32")
            )
            if is_saved:
                self._add_copy(weight.place, source.attribute, value, path)
            elif source.attribute in ("bias", "beta"):
                self._add_bias(weight.place, value - now)
            elif not np.allclose(value, now, rtol=1e-2, atol=1e-4):
                self._add_copy(weight.place, source.attribute, value, path)

    def _value(self, source, tensor, path):
        try:
            value = source.read(tensor)
        except (ValueError, IndexError, TypeError):
            value = tensor
        if value.shape != source.shape:
            raise ValueError(
                f"The tensor '{_START}{path}' has shape {tensor.shape}, which "
                f"does not make '{source.layer.name}/{source.attribute}' of "
                f"shape {source.shape}. Expected one that does: the adapter "
                "belongs to another base, or has another number of classes."
            )
        return value

    def _add_copy(self, place, attribute, value, path):
        values = self.copies.setdefault(place.key, (place, {}))[1]
        if not np.array_equal(values.setdefault(attribute, value), value):
            raise ValueError(
                f"'{path}' and another tensor of {self.folder} are one weight "
                f"of '{place.path}' here, and they differ. Expected a model "
                "that does not tie them."
            )

    def _add_bias(self, place, change):
        _, before = self._biases.setdefault(
            place.key, (place, np.zeros_like(change))
        )
        self._biases[place.key] = place, before + change

    def _join(self):
        """Makes adapters of biases, and looks for layers that have two."""
        adapted = {piece.place.key: piece.place for piece in self.pieces}
        both = [p for key, p in adapted.items() if key in self.copies]
        if both:
            raise ValueError(
                f"{self.folder} both adapts and trains {describe(both)}. "
                "Expected one of the two for each layer."
            )
        for key, (place, change) in self._biases.items():
            if not change.any():
                continue
            layer = subject(place.layer)
            name = bias_name(layer)
            if name is None:
                raise ValueError(
                    f"{self.folder} has lora_bias=true in {CONFIG}, and "
                    f"'{place.path}' has no bias that could take it. Expected "
                    "lora_bias=false, or a base with biases."
                )
            bias = getattr(layer, name)
            value = change.reshape(bias.shape)
            if key in self.copies:
                now = ops.convert_to_numpy(ops.cast(bias, "float32"))
                self.copies[key][1][name] = now + value
                continue
            piece = Piece(place, "bitfit", {}, {"bias_delta": value})
            self.pieces.append(piece)
        self._check_tied()

    def _check_tied(self):
        """Raises if a file changes one of two tied tables."""
        if self.names.task_type != "CAUSAL_LM":
            return
        for place, values in self.copies.values():
            layer = subject(place.layer)
            tied = getattr(layer, "tie_weights", False)
            if tied and "embeddings" in values and not self._saves_both():
                raise ValueError(
                    f"{self.folder} trains the token embedding alone, by "
                    "modules_to_save, and this model has it as its output "
                    "projection, too. Expected both in modules_to_save, with "
                    "equal values, or ensure_weight_tying=true."
                )

    def _saves_both(self):
        saved = self.config["modules_to_save"] or []
        return self.config.get("ensure_weight_tying") or "lm_head" in saved


def _fill_copy(copy, values):
    for attribute, value in values.items():
        own = getattr(copy.base, attribute)
        for variable, trained in copy.pairs:
            if variable is own:
                trained.assign(value)
