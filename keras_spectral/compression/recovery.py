"""What is left open for a training that restores what was lost."""

import re

import keras

from keras_spectral.compression.spectrum import Choice
from keras_spectral.kernels import LowRank
from keras_spectral.model.kept import kept_places
from keras_spectral.model.paths import places
from keras_spectral.model.training import set_flags
from keras_spectral.model.wrap import wrap_model


def spare(choice: Choice, spared: int) -> Choice:
    """A choice with so much less rank, but at least 1."""
    if choice.rank is None:
        return choice
    return Choice(max(1, choice.rank - spared), choice.slices)


def prepare_recovery(
    small: keras.Model,
    plan: dict[LowRank, Choice],
    recover: str,
    spared: int,
) -> None:
    """Freezes all but what is to restore what was lost.

    Args:
        small: The compressed model.
        plan: Its pairs, with the ranks that they were meant to have.
        recover: `"train"` or `"lora"`.
        spared: The rank of LoRAs.
    """
    found = places(small)
    if recover == "train":
        halves = [half for layer in plan for half in (layer.down, layer.up)]
        heads = [p.layer for p in kept_places(small, found, None)]
        set_flags(small, [*plan, *halves, *heads])
        return
    ranks_left = {
        re.escape(p.path): {"rank": min(spared, plan[p.layer].rank - 1)}
        for p in found
        if p.layer in plan and plan[p.layer].rank > 1
    }
    if ranks_left:
        names = list(ranks_left)
        wrap_model(small, "lora", target=names, overrides=ranks_left)
