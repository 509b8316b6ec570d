"""PEFT's OFT and BOFT."""

import math
import re

from keras_spectral.exchange.folder import CONFIG
from keras_spectral.exchange.kinds.kind import Kind
from keras_spectral.exchange.kinds.kind import Tensor
from keras_spectral.exchange.kinds.kind import one_for_all
from keras_spectral.exchange.kinds.kind import sides_of
from keras_spectral.exchange.pieces import take
from keras_spectral.exchange.pieces import wrong_shape
from keras_spectral.layers import BOFTDense
from keras_spectral.layers import OFTDense

_SERIES = "num_cayley_neumann_terms"
_SINCE = (0, 18)  # the version of PEFT whose series ends as it does now


class OFT(Kind):
    """OFT: the upper triangles of skew blocks."""

    name = "OFT"
    layer = OFTDense
    layouts = ("linear", "conv")
    reasons = {"table": "PEFT turns its columns, not its rows"}
    names = ("oft_R.weight", "oft_embedding_R.weight")

    def reason(self, part):
        if math.prod(sides_of(part)) > 1:
            return (
                "PEFT adds up patches that overlap when it runs, and does not "
                "when it merges"
            )
        return super().reason(part)

    def options(self, part, tensors, config, path):
        name = "oft_R.weight"
        tensor = take(tensors, name, path)
        size = _block_size(part, config, "oft_block_size", "r")
        if size is None:  # then PEFT takes one nearby that divides
            size = (1 + math.isqrt(1 + 8 * math.prod(tensor.shape[-1:]))) // 2
        if size < 2 or part.view.n_in % size:
            inputs = f"blocks of 2 or more that divide {part.view.n_in} inputs"
            raise wrong_shape(path, name, tensor, inputs)
        return {
            "block_size": size,
            "eps": config["eps"] if config["coft"] else None,
            "block_share": config["block_share"],
            "neumann_terms": _terms(config),
        }

    def tensors(self, part, options):
        size = options["block_size"]
        blocks = 1 if options["block_share"] else part.view.n_in // size
        shape = (blocks, size * (size - 1) // 2)
        return [Tensor("oft_R.weight", "oft_q", shape)]

    def fields(self, layers):
        eps = one_for_all(layers, "eps", "eps")
        terms = one_for_all(layers, "neumann_terms", _SERIES)
        if terms in (2, 3):
            raise ValueError(
                f"The adapter's OFTDense layers have neumann_terms={terms}. "
                "Expected 0, or 4 or more: PEFT's shorter series are others."
            )
        fields = {
            **_block_fields(layers, "oft_block_size", "r"),
            "block_share": one_for_all(layers, "block_share", "block_share"),
            "coft": eps is not None,
            "use_cayley_neumann": terms > 0,
        }
        if eps is not None:
            fields["eps"] = eps
        if terms:
            fields[_SERIES] = terms
            fields["peft_version"] = ".".join(map(str, (*_SINCE, 0)))
        return fields


class BOFT(Kind):
    """BOFT: whole blocks, of which the skew parts count, and gains."""

    name = "BOFT"
    layer = BOFTDense
    layouts = ("linear", "conv")
    names = ("boft_R", "boft_s")

    def options(self, part, tensors, config, path):
        size = _block_size(part, config, "boft_block_size", "boft_block_num")
        count = config["boft_n_butterfly_factor"]
        found = tensors["boft_R"].shape if "boft_R" in tensors else ()
        if found[:1] == (1,):
            count = 1  # without its CUDA code PEFT makes one, whatever is said
        if size is None or size % 2:
            raise ValueError(
                f"{CONFIG} has boft_block_size={config['boft_block_size']} "
                f"and boft_block_num={config['boft_block_num']}, and '{path}' "
                f"has {part.view.n_in} inputs. Expected blocks of an even "
                "size that divide them."
            )
        return {"block_size": size, "factors": count}

    def tensors(self, part, options):
        size, n_out = options["block_size"], part.view.n_out
        blocks = (options["factors"], part.view.n_in // size, size, size)
        gains = (1, n_out) if sides_of(part) else (n_out, 1)
        return [
            Tensor("boft_R", "boft_d", blocks),
            Tensor("boft_s", "gains", gains, own=(n_out,)),
        ]

    def fields(self, layers):
        factors = "boft_n_butterfly_factor"
        return {
            **_block_fields(layers, "boft_block_size", "boft_block_num"),
            factors: one_for_all(layers, "factors_count", factors),
        }


def _block_size(part, config, size, count):
    """The size of blocks, None if it does not divide the inputs."""
    n_in = part.view.n_in
    if bool(config[size]) == bool(config[count]):
        raise ValueError(
            f"{CONFIG} has {size}={config[size]} and {count}={config[count]}. "
            "Expected one of them, and 0 for the other. Before PEFT 0.14 OFT "
            "was another method."
        )
    if n_in % (config[size] or config[count]):
        return None
    return config[size] or n_in // config[count]


def _block_fields(layers, size, count):
    """The fields that give all layers their blocks."""
    sizes = {layer.block_size for layer in layers.values()}
    counts = {x.view.n_in // x.block_size for x in layers.values()}
    if len(sizes) > 1 and len(counts) == 1:
        return {size: 0, count: counts.pop()}
    return {size: one_for_all(layers, "block_size", size), count: 0}


def _terms(config):
    """How many terms of the series there are, 0 for the exact rotation."""
    if not config["use_cayley_neumann"]:
        return 0
    version = str(config["peft_version"])
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or tuple(map(int, numbers.groups())) < _SINCE:
        raise ValueError(
            f"{CONFIG} has use_cayley_neumann=true and "
            f"peft_version={config['peft_version']!r}: before version 0.18 "
            "PEFT's series ended otherwise, and today's computes something "
            "else. Expected a later version. If what today's computes will "
            "do, load the folder in HF PEFT and save it again."
        )
    # PEFT doubles the last power of a series of 2, and its 3 terms are 4.
    return max(config[_SERIES], 4)
