"""PEFT's VeRA."""

from keras_spectral._backend import to_numpy
from keras_spectral.exchange.folder import CONFIG
from keras_spectral.exchange.kinds.kind import Kind
from keras_spectral.exchange.kinds.kind import Tensor
from keras_spectral.exchange.kinds.kind import one_for_all
from keras_spectral.layers import VeRADense

_A, _B = "base_model.vera_A", "base_model.vera_B"


class Vera(Kind):
    """VeRA: two vectors a module, and one pair for all."""

    name = "VERA"
    layer = VeRADense
    layouts = ("linear", "conv1d")
    names = ("vera_lambda_b", "vera_lambda_d")
    shared = {_A: "vera_a", _B: "vera_b"}

    def options(self, part, tensors, config, path):
        return {
            "rank": config["r"],
            "d_initial": config["d_initial"],
            "dropout": config["vera_dropout"],
        }

    def tensors(self, part, options):
        return [
            Tensor("vera_lambda_d", "vera_d", (options["rank"],)),
            Tensor("vera_lambda_b", "vera_v", (part.view.n_out,)),
        ]

    def fields(self, layers):
        return {
            "r": one_for_all(layers, "rank", "r"),
            "d_initial": one_for_all(layers, "d_initial", "d_initial"),
            "vera_dropout": max(layer.dropout for layer in layers.values()),
            "save_projection": True,
            "projection_prng_key": 0,
        }

    def read_shared(self, found, parts, config):
        missing = sorted(self.shared.keys() - found.keys())
        if missing:
            raise ValueError(
                f"The tensors {missing} are missing, the pair that all "
                f"layers share: {CONFIG} has "
                f"save_projection={config['save_projection']}. Without them "
                "PyTorch's random numbers would be needed. Expected them: in "
                "HF PEFT set `config.save_projection = True` before "
                "`save_pretrained`."
            )
        n_in = max(part.view.n_in for part in parts)
        n_out = max(part.view.n_out for part in parts)
        a, b, rank = found[_A], found[_B], config["r"]
        # A file can have a larger pair: of a head that is left out here.
        right = a.ndim == b.ndim == 2 and a.shape[1] >= n_in
        if not right or b.shape[0] < n_out or {len(a), b.shape[1]} != {rank}:
            raise ValueError(
                f"The tensors '{_A}' and '{_B}' have shapes {a.shape} and "
                f"{b.shape}. Expected ({rank}, {n_in}) and ({n_out}, {rank}), "
                "or more inputs and outputs, as this model's layers and the "
                "configuration have: the adapter belongs to a base of another "
                "size, or is damaged."
            )
        return {"vera_a": a[:, :n_in].T, "vera_b": b[:n_out].T}

    def write_shared(self, layers):
        pairs = {id(layer.pair): layer.pair for layer in layers.values()}
        if len(pairs) > 1:
            raise ValueError(
                f"The adapter's VeRADense layers have {len(pairs)} pairs. "
                "Expected one that all share, which is what PEFT has: wrap "
                "all layers at once."
            )
        (pair,) = pairs.values()
        n_in = max(layer.view.n_in for layer in layers.values())
        n_out = max(layer.view.n_out for layer in layers.values())
        return {
            _A: to_numpy(pair.vera_a)[:n_in].T.copy(),
            _B: to_numpy(pair.vera_b)[:, :n_out].T.copy(),
        }
