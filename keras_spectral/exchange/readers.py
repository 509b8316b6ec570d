"""How the tensors of each kind of adapter are named and read."""

import re

from keras_spectral.exchange import prompts
from keras_spectral.exchange.kinds import KINDS
from keras_spectral.exchange.pieces import adalora_pieces
from keras_spectral.exchange.pieces import ia3_pieces
from keras_spectral.exchange.pieces import lora_pieces

_NAMES = "|".join(re.escape(n) for kind in KINDS.values() for n in kind.names)
SUFFIX = re.compile(
    r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_[ABE]|ia3_l"
    rf"|lora_magnitude_vector|{_NAMES})(?:\.weight)?"
)
# How the pieces of each kind that sits on single layers are read.
PIECES = {
    "LORA": lora_pieces,
    "ADALORA": adalora_pieces,
    "IA3": ia3_pieces,
    **{name: kind.pieces for name, kind in KINDS.items()},
}
# Tensors of a whole model, whose names have no start.
WHOLE = {prompts.KEY, *(n for kind in KINDS.values() for n in kind.shared)}


def start_of(kind: str) -> str:
    """What the names of tensors begin with, by the kind of adapter."""
    return "base_model." if kind in prompts.METHODS else "base_model.model."
