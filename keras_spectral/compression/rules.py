"""How ranks are chosen: a choice for each layer at one level for all.

A level goes from 0, the cheapest, to 1, all.
"""

from collections.abc import Callable

import numpy as np

from keras_spectral.compression.spectrum import LEAVE
from keras_spectral.compression.spectrum import Choice
from keras_spectral.compression.spectrum import Spectrum

_DIGITS = 30

Rule = Callable[[Spectrum, float], Choice]


def uniform(spectrum: Spectrum, level: float) -> Choice:
    """Keeps an equal share of each kernel's cost."""
    if level >= 1:  # the largest pair may still be too far off
        return LEAVE
    return spectrum.choice(spectrum.within(level * spectrum.cost(LEAVE)))


def energy(spectrum: Spectrum, level: float) -> Choice:
    """Keeps an equal share of the sum of squared singular values."""
    squares = (spectrum.values[1].astype("float64") ** 2).sum(axis=0)
    total = np.cumsum(squares)
    wanted = level * total[-1]
    return spectrum.choice(1 + np.searchsorted(total, wanted * (1 - 1e-12)))


def largest(spectrum: Spectrum, level: float) -> Choice:
    """All singular values above `1 - level` of the layer's largest."""
    kept = spectrum.values[1] > (1 - level) * spectrum.norm
    return spectrum.choice(kept.sum(axis=1).max())


def alds(spectrum: Spectrum, level: float) -> Choice:
    """The cheapest slicing and rank whose error is at most `1 - level`."""
    found = [
        fitting(spectrum, spectrum.errors(count), count, level)
        for count in spectrum.values
    ]
    return min(found, key=spectrum.cost)


def sensitivity(spectrum: Spectrum, level: float) -> Choice:
    """The slicing and rank of the least loss, with a price on what is saved.

    The price is the same in all layers, from 1e30 at level 0 to 1e-30 at 1.
    """
    price = 10 ** (_DIGITS * (1 - 2 * level))
    found, least = LEAVE, price * spectrum.cost(LEAVE)
    for count in spectrum.values:
        losses = spectrum.loss(count)
        costs = losses + price * spectrum.cost_table(count)[: len(losses)]
        if len(costs) and costs.min() < least:
            found = spectrum.choice(int(np.argmin(costs)) + 1, count)
            least = costs.min()
    return found


def fitting(spectrum, errors, slices, level):
    """The smallest rank of a slicing whose error is at most `1 - level`."""
    # Errors fall with the rank.
    rank = len(errors) - np.searchsorted(errors[::-1], 1 - level, "right") + 1
    full = spectrum.values[slices].shape[-1]
    if rank > len(errors) < full:  # not at a rank that is fast enough
        return LEAVE
    return spectrum.choice(min(rank, full), slices)


RULES: dict[str, Rule] = {
    "uniform": uniform,
    "energy": energy,
    "global": largest,
    "alds": alds,
    "sensitivity": sensitivity,
}
