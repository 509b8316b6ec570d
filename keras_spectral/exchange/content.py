"""What the tensors of an adapter's folder mean in a model."""

import collections

import numpy as np
from keras import ops

from keras_spectral._backend import to_numpy
from keras_spectral.exchange import prompts
from keras_spectral.exchange.config import is_saved_module
from keras_spectral.exchange.config import is_target
from keras_spectral.exchange.config import matching_key
from keras_spectral.exchange.folder import CONFIG
from keras_spectral.exchange.kinds import KINDS
from keras_spectral.exchange.names import Found
from keras_spectral.exchange.names import HubNames
from keras_spectral.exchange.pieces import Piece
from keras_spectral.exchange.readers import PIECES
from keras_spectral.exchange.readers import SUFFIX
from keras_spectral.exchange.readers import start_of
from keras_spectral.layers.bitfit import bias_name
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import describe
from keras_spectral.model.paths import subject

# Parts of Hugging Face's tasks that a bare backbone does without.
_HEADS = ("classifier", "lm_head", "pooler", "pre_classifier", "score")


class Content:
    """What a folder's tensors mean in a model.

    Args:
        model: The model.
        config: The checked configuration.
        tensors: Those of the file.
        folder: Where they are from, for messages.

    Attributes:
        pieces: Adapters of single layers.
        shared: What these share, by weight.
        copies: For the key of each layer that trains as a copy its place and
            its values, by attribute.
        left_out: Tensors of a task that the model, a bare backbone, lacks.
    """

    def __init__(self, model, config, tensors, folder):
        self.names = HubNames(model)
        self.config, self.folder = config, folder
        self.pieces: list[Piece] = []
        self.shared: dict[str, np.ndarray] = {}
        self.copies: dict[str, tuple[Place, dict]] = {}
        self.left_out: list[str] = []
        self._biases: dict[str, tuple[Place, np.ndarray]] = {}
        self._found: dict[str, Found] = {}
        self._start = start_of(config["peft_type"])
        if config["peft_type"] in prompts.METHODS:
            others = self._prompt(model, dict(tensors))
        else:
            others = self._modules(tensors)
        for path, tensor in others.items():
            self._read_other(path, tensor)
        self._check_saved(others)
        self._join()

    def _prompt(self, model, tensors):
        """Takes the one tensor of a prompt or prefix; returns the others."""
        if prompts.KEY not in tensors:
            raise ValueError(
                f"{self.folder} lacks the tensor '{prompts.KEY}'. Expected it: "
                f"{CONFIG} has peft_type={self.config['peft_type']!r}."
            )
        tensor = tensors.pop(prompts.KEY)
        self.pieces += prompts.prompt_pieces(model, tensor, self.config)
        start = self._start
        self._refuse([key for key in tensors if not key.startswith(start)])
        return {key.removeprefix(start): x for key, x in tensors.items()}

    def _modules(self, tensors):
        """Takes the tensors of adapted modules; returns the others."""
        kind = KINDS.get(self.config["peft_type"])
        names = kind.shared if kind else ()
        shared = {key: tensors[key] for key in names if key in tensors}
        rest = {k: x for k, x in tensors.items() if k not in shared}
        modules, others = self._sorted(rest)
        self._check_targets(modules)
        read = PIECES[self.config["peft_type"]]
        adapted = []
        for path, found in self._found.items():
            parts = self.names.parts(found.name)
            self._check_tables(parts, path)
            adapted += parts
            for piece in read(parts, modules[path], self.config, path):
                self.pieces.append(piece)
                if piece.bias is not None:
                    self._add_bias(piece.place, piece.bias)
        if kind:
            self.shared = kind.read_shared(shared, adapted, self.config)
        return others

    def _sorted(self, tensors):
        """The tensors of adapters by module and suffix, and all others."""
        modules: dict = collections.defaultdict(dict)
        others, unknown = {}, []
        for key, tensor in tensors.items():
            path = key.removeprefix(self._start)
            path = path.replace(".modules_to_save.", ".")
            match = SUFFIX.fullmatch(path)
            if not key.startswith(self._start):
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
        hint = f"Expected names that begin with '{self._start}'."
        if unknown[0].startswith(self._start):
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
        """Whether a bare backbone can do without a tensor."""
        start = path.split(".")
        if self.names.prefix or not {*start[:2]} & {*_HEADS}:
            return False
        self.left_out.append(path)
        return True

    def _check_targets(self, modules):
        """Raises unless there are tensors for what the configuration means."""
        config = self.config
        found = self._found.values()
        prefix = next((f.prefix for f in found if f.prefix), "")
        renamed = any(f.renamed for f in found)
        expected = {
            self.names.path(name, prefix, renamed): name
            for name in self.names.modules
        }
        present = {f.name: path for path, f in self._found.items()}
        double = [p for p, f in self._found.items() if present[f.name] != p]
        self._refuse([f"{self._start}{path}" for path in double])
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
                self._refuse([self._start + path])
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

    def _check_saved(self, others):
        """Raises unless all tensors of saved modules are there."""
        paths = {self.names.path(key): key for key in self.names.tensors}
        saved = [p for p in paths if is_saved_module(self.config, p)]
        found = map(self.names.tensor, others)
        present = {f.name for f in found if f is not None}
        missing = [path for path in saved if paths[path] not in present]
        if missing:
            raise ValueError(
                f"{self.folder} lacks the tensors {missing[:4]} of "
                f"{len(missing)}, of modules_to_save="
                f"{self.config['modules_to_save']!r} in {CONFIG}. The file is "
                "damaged."
            )

    def _value(self, source, tensor, path):
        try:
            value = source.read(tensor)
        except (ValueError, IndexError, TypeError):
            value = tensor
        if value.shape != source.shape:
            raise ValueError(
                f"The tensor '{self._start}{path}' has shape {tensor.shape}, "
                f"which does not make '{source.layer.name}/"
                f"{source.attribute}' of shape {source.shape}. Expected one "
                "that does: the adapter belongs to another base, or has "
                "another number of classes."
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
        change = change.reshape(-1)
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
                now = to_numpy(bias)
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
