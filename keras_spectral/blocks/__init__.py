"""Adapters that live on a transformer block."""

from keras_spectral.blocks.block_adapter import BlockAdapter
from keras_spectral.blocks.bottleneck import BottleneckAdapter
from keras_spectral.blocks.kinds import AttentionKind
from keras_spectral.blocks.kinds import BlockKind
from keras_spectral.blocks.kinds import register_block
from keras_spectral.blocks.prefix import PrefixTuning
from keras_spectral.blocks.red import RED
from keras_spectral.blocks.unipelt import UniPELTBlock

__all__ = [
    "RED",
    "AttentionKind",
    "BlockAdapter",
    "BlockKind",
    "BottleneckAdapter",
    "PrefixTuning",
    "UniPELTBlock",
    "register_block",
]
