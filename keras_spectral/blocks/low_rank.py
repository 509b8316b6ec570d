"""LowRankPart: LoRA as a part of a block's adapter."""

from keras import ops

from keras_spectral._internal.twin import Detour
from keras_spectral.blocks.parts import spread
from keras_spectral.layers.low_rank_pair import LowRankPair


class LowRankPart:
    """A LoRA pair on a projection of a block: `y + strength * x A B`."""

    def __init__(self, adapter, name, part, rank, seed):
        self.view = adapter.view.linear(part)
        self.slot = adapter.view.slot(part)
        self.pair = LowRankPair(adapter, self.view, rank, name=name, seed=seed)

    def detours(self, strength) -> list[Detour]:
        calls = []

        def adapted(original, x):
            outputs = original(x)
            calls.append(x)
            if len(calls) > 1:  # DeBERTa's position embeddings
                return outputs
            a, b = (ops.cast(w, x.dtype) for w in self.pair.factors())
            delta = self.view.apply(x, a, b)
            share = spread(strength(x), delta)
            on = ops.not_equal(share, 0)
            zero = ops.zeros((), delta.dtype)
            return outputs + ops.where(on, delta * share, zero)

        return [(self.slot, adapted)]
