"""Adapters of a whole transformer block.

- `BottleneckAdapter`: a small two-layer net in the block.
- `PrefixTuning`: trained keys and values that attention sees as well.
- `RED`: a factor and a shift for each channel of the block's output.
- `UniPELTBlock`: LoRA, prefix and bottleneck, each behind a gate.
- `BlockAdapter`: the base of block adapters of your own.
- `register_block`: says where the parts of a block of your own are.
- `BlockKind`, `AttentionKind`: what `register_block` is given.
"""

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
