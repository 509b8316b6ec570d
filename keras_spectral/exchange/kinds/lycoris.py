"""PEFT's LoHa and LoKr."""

import math
from typing import Any

from keras_spectral._backend import number_in
from keras_spectral.exchange.folder import CONFIG
from keras_spectral.exchange.kinds.kind import Kind
from keras_spectral.exchange.kinds.kind import Tensor
from keras_spectral.exchange.kinds.kind import one_for_all
from keras_spectral.exchange.kinds.kind import sides_of
from keras_spectral.exchange.modules import ranks
from keras_spectral.exchange.pieces import by_pattern
from keras_spectral.exchange.pieces import within_rank
from keras_spectral.layers import LoHaDense
from keras_spectral.layers import LoKrDense
from keras_spectral.layers.lokr import weight_shapes
from keras_spectral.saving.naming import is_close

_CORE = "use_effective_conv2d"


class _Lycoris(Kind):
    """What both have: ranks and alphas that patterns change."""

    layouts = ("linear", "conv")

    def options(self, part, tensors, config, path):
        return {
            "rank": by_pattern(config, "r", "rank_pattern", path),
            "alpha": by_pattern(config, "alpha", "alpha_pattern", path),
        }

    def fields(self, layers):
        found = {path: (x.rank, _alpha(x)) for path, x in layers.items()}
        return ranks(found, "alpha")


class LoHa(_Lycoris):
    """LoHa: two thin pairs, with cores where convolutions have them."""

    name = "LOHA"
    layer = LoHaDense
    names = tuple(
        f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    )

    def options(self, part, tensors, config, path):
        options = super().options(part, tensors, config, path)
        # PEFT gives a 1x1 convolution no core.
        return {**options, "cp": config[_CORE] and _is_wide(sides_of(part))}

    def tensors(self, part, options):
        sides, rank = sides_of(part), options["rank"]
        n_in, n_out = part.view.n_in, part.view.n_out
        channels, cp = part.view.channels, options["cp"]
        # Offsets stand behind the channels there, before them here.
        axes = (*range(2, 2 + len(sides)), 1, 0)
        found = []
        for number, name in (("1", "first"), ("2", "second")):
            a, b = f"hada_w{number}_b", f"hada_w{number}_a"
            if cp:
                core = (rank, rank, *sides)
                flat = (*core, *[1] * (4 - len(core)))
                found += [
                    Tensor(f"hada_t{number}", f"{name}_core", flat, core, axes),
                    Tensor(a, f"{name}_a", (rank, channels), axes=(1, 0)),
                    Tensor(b, f"{name}_b", (rank, n_out)),
                ]
                continue
            cut, own = (rank, channels, *sides), (n_in, rank)
            found += [
                Tensor(a, f"{name}_a", (rank, n_in), cut, axes, own),
                Tensor(b, f"{name}_b", (n_out, rank), axes=(1, 0)),
            ]
        return found

    def fitted(self, part, options, values):
        rank, most = options["rank"], part.view.max_rank
        if options["cp"] or rank <= most:
            return options, values
        pairs = {}
        for name in ("first", "second"):
            ends = f"{name}_a", f"{name}_b"
            pair = within_rank(part.view, *(values[end] for end in ends))
            pairs |= dict(zip(ends, pair))
        alpha = float(f"{options['alpha'] * most / rank:.12g}")
        return {**options, "rank": most, "alpha": alpha}, pairs

    def fields(self, layers):
        wide = {}
        for path, layer in layers.items():
            sides = getattr(layer.layer, "kernel_size", ())
            if _is_wide(sides):
                wide[path] = layer
            elif layer.cp:
                raise ValueError(
                    f"'{path}' is a 1x1 convolution, and its LoHaDense has "
                    "cp=True. Expected False: PEFT has cores only where a "
                    "kernel is larger."
                )
        core = one_for_all(wide, "cp", _CORE) if wide else False
        return {**super().fields(layers), _CORE: core}


class LoKr(_Lycoris):
    """LoKr: the factors of a Kronecker product, whole or as pairs."""

    name = "LOKR"
    layer = LoKrDense
    names = tuple(
        f"lokr_{name}"
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    )

    def options(self, part, tensors, config, path):
        if "lokr_t2" in tensors:
            raise ValueError(
                f"{CONFIG} has {_CORE}={config[_CORE]}, and '{path}' has a "
                "core for its offsets, 'lokr_t2', which LoKrDense lacks. "
                f"Expected {_CORE}=false, or an adapter that leaves "
                "convolutions out."
            )
        return {
            **super().options(part, tensors, config, path),
            "factor": config["decompose_factor"],
            "decompose_both": config["decompose_both"],
        }

    def tensors(self, part, options):
        names = ("rank", "factor", "decompose_both")
        shapes = weight_shapes(part.view, **{n: options[n] for n in names})
        ends = {"a": "b", "b": "a"}  # a product's factors change places
        found = []
        for weight, own in shapes.items():
            name = f"lokr_{weight[:-1]}{ends.get(weight[-1], weight[-1])}"
            shape = cut = own[::-1]
            if weight == "w2" and sides_of(part):
                rows = own[0] // math.prod(sides_of(part))
                shape = (own[1], rows, *sides_of(part))
            found.append(Tensor(name, weight, shape, cut, (1, 0)))
        return found

    def fields(self, layers):
        return {
            **super().fields(layers),
            "decompose_factor": one_for_all(
                layers, "factor", "decompose_factor"
            ),
            "decompose_both": one_for_all(
                layers, "decompose_both", "decompose_both"
            ),
            _CORE: False,
        }


def _is_wide(sides: tuple[int, ...]) -> bool:
    """Whether a kernel looks at more than one place."""
    return math.prod(sides) > 1


def _alpha(layer: Any) -> float:
    """The alpha that makes a layer's scale."""
    scale = number_in(layer.adapter_scale)
    as_made = is_close(scale, layer.initial_scale())
    return layer.alpha if as_made else scale * layer.rank
