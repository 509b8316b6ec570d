"""PEFT's GLoRA."""

import numpy as np

from keras_spectral.exchange.kinds.kind import Kind
from keras_spectral.exchange.kinds.kind import Tensor
from keras_spectral.exchange.kinds.kind import one_for_all
from keras_spectral.layers import GLoRADense
from keras_spectral.layers.glora_path import shapes_of

# The configuration's field that says of what kind a part is.
_FIELDS = {
    "a": "config_A_B",
    "b": "config_A_B",
    "c": "config_C",
    "d": "config_D_E",
    "e": "config_D_E",
}
_HERE = {"constant": "scalar"}
_THERE = {"scalar": "constant"}


class GLoRA(Kind):
    """GLoRA: five parts a module, of three kinds in the configuration."""

    name = "GLORA"
    layer = GLoRADense
    layouts = ("linear",)
    names = tuple(
        f"glora_{part.upper()}.{end}"
        for part in _FIELDS
        for end in ("X", "Xd", "Xu", "zeros")
    )

    def options(self, part, tensors, config, path):
        kinds = {p: config[field] for p, field in _FIELDS.items()}
        if part.view.bias_of() is None:
            kinds |= dict.fromkeys("cde", "none")  # which PEFT leaves out
        parts = {p: _HERE.get(kind, kind) for p, kind in kinds.items()}
        return {"rank": config["r"], "parts": parts}

    def tensors(self, part, options):
        shapes, found = self._shapes(part, options), []
        for weight, own in shapes.items():
            letter, end = weight.split("_")
            start = f"glora_{letter.upper()}"
            if f"{letter}_down" in shapes:
                name = f"{start}.{'Xu' if end == 'down' else 'Xd'}"
                found.append(Tensor(name, weight, own[::-1], axes=(1, 0)))
                continue
            column = letter in "abc" and options["parts"][letter] == "vector"
            shape = (own[1], 1) if column else (own[1],)
            found.append(Tensor(f"{start}.X", weight, shape, own=own))
        return found

    def constants(self, part, options):
        n_in, n_out = part.view.n_in, part.view.n_out
        shapes = dict.fromkeys("ab", (n_out, n_in)) | {"c": (n_in, 1)}
        used = {name[0] for name in self._shapes(part, options)}
        return {
            f"glora_{letter.upper()}.zeros": np.zeros(
                shapes.get(letter, (n_out,)), "float32"
            )
            for letter in _FIELDS
            if letter not in used
        }

    def _shapes(self, part, options):
        return shapes_of(options["parts"], options["rank"], part.view)

    def fields(self, layers):
        for path, layer in layers.items():
            if layer.supernet:
                raise ValueError(
                    f"'{path}' is a supernet, which has no path of its own. "
                    "Expected fixed ones: `finalize_glora` first."
                )
            kept = [p for p in "ce" if layer.parts[p] != "none"]
            if kept and layer.view.bias_of() is None:
                raise ValueError(
                    f"'{path}' has no bias, and its GLoRADense has the parts "
                    f"{kept}, which PEFT leaves out there. Expected "
                    "parts={'c': 'none', 'e': 'none'} on such layers."
                )
        found = {"r": one_for_all(layers, "rank", "r")}
        for letter, field in _FIELDS.items():
            kinds = {
                layer.parts[letter]: path
                for path, layer in layers.items()
                if letter in "ab" or layer.view.bias_of() is not None
            }
            kind = next(iter(kinds), "none")
            kind = _THERE.get(kind, kind)
            if len(kinds) > 1 or found.setdefault(field, kind) != kind:
                raise ValueError(
                    f"The adapter's part {letter!r} is of the kinds "
                    f"{sorted(kinds)}, and PEFT has one {field} for "
                    "all layers, for A and B alike, and for D and E. Expected "
                    "`parts` that agree."
                )
        return found
