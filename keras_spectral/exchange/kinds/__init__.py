"""PEFT's kinds that are methods here, as they are."""

from keras_spectral.exchange.kinds.glora import GLoRA
from keras_spectral.exchange.kinds.kind import Kind
from keras_spectral.exchange.kinds.lycoris import LoHa
from keras_spectral.exchange.kinds.lycoris import LoKr
from keras_spectral.exchange.kinds.rotations import BOFT
from keras_spectral.exchange.kinds.rotations import OFT
from keras_spectral.exchange.kinds.vera import Vera

KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (Vera(), LoHa(), LoKr(), OFT(), BOFT(), GLoRA())
}

__all__ = ["KINDS", "Kind"]
