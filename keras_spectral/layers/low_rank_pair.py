"""LowRankPair: the thin pair of LoRA and its relatives."""

import math

import keras
from keras import ops

from keras_spectral._internal.checks import check_alpha
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.moments import Moments
from keras_spectral.layers.starts import LOADED
from keras_spectral.layers.starts import NEEDS
from keras_spectral.layers.starts import STARTS
from keras_spectral.layers.starts import triplets_of_start


class LowRankPair:
    """A pair A (n_in x rank), B (rank x n_out) among an adapter's weights.

    The weights are the adapter's attributes as well: `lora_a` and `lora_b`
    for the name "lora".

    Args:
        adapter: Gets the weights.
        view: The kernel that they change.
        rank: Columns of A.
        a_start: Keras initializer of A; LoRA's by default.
        b_start: That of B, which is zero in LoRA.
        name: Start of the weights' names.
        seed: Integer seed of LoRA's start.
        keeps_start: Whether frozen copies of the start stay beside it.
        trains: `"ab"`, or the one of the two that trains.

    Attributes:
        a: The variable A; `b` likewise.
        start_a: Its frozen start, or None; `start_b` likewise.

    Raises:
        ValueError: A rank above the kernel's smaller dimension.
    """

    def __init__(
        self,
        adapter,
        view,
        rank,
        a_start=None,
        b_start="zeros",
        name="lora",
        seed=None,
        keeps_start=False,
        trains="ab",
    ):
        check_fits(adapter, rank, view)
        if a_start is None:
            a_start = lora_start(view, derived_seed(seed, f"{name}_a"))

        def add(name, start, shape, trainable):
            variable = adapter.add_weight(
                name=name, shape=shape, initializer=start, trainable=trainable
            )
            setattr(adapter, name, variable)
            return variable

        shapes = (view.n_in, rank), (rank, view.n_out)
        self.start_a = self.start_b = None
        if keeps_start:
            self.start_a = add("start_a", a_start, shapes[0], False)
            self.start_b = add("start_b", b_start, shapes[1], False)
        self.a = add(f"{name}_a", a_start, shapes[0], "a" in trains)
        self.b = add(f"{name}_b", b_start, shapes[1], "b" in trains)

    def factors(self, share=1.0):
        """A and B, less the start if that is kept, or a share of it."""
        if self.start_a is None:
            return self.a, self.b
        a = ops.concatenate([self.a, self.start_a], axis=1)
        b = ops.concatenate([self.b, -share * self.start_b], axis=0)
        return a, b


class LowRankAdapter(KernelAdapter):
    """Base class of LoRA's relatives: a rank, a strength, a LowRankPair."""

    scaling = "standard"
    initializer = "kaiming"
    takes_data = False  # whether starts that look at data are among options
    start_data = None  # what a start is given beside the layer

    def set_rank(self, rank, alpha):
        """Checks and keeps a rank and a strength, which defaults to it."""
        self.rank = check_rank(rank)
        self.alpha = self.rank if alpha is None else check_alpha(alpha)

    def set_lora_options(
        self, rank, alpha, dropout, scaling, initializer, seed
    ):
        """Checks and keeps LoRA's options."""
        self.scaling = check_choice(scaling, "scaling", ("standard", "rslora"))
        known = [s for s in STARTS if self.takes_data or s not in NEEDS]
        self.initializer = check_choice(initializer, "initializer", known)
        self.set_rank(rank, alpha)
        self.set_dropout(dropout, seed)

    def set_start_data(self, data):
        """Checks and keeps what a start takes beside the layer."""
        needed = NEEDS.get(self.initializer)
        if (data is None) != (needed is None):
            raise ValueError(
                f"Received initializer={self.initializer!r} for layer "
                f"'{self.name}' with{'out' * (data is None)} data to start "
                "from. "
                + (
                    f"Expected `wrap_model(..., {needed}=...)`."
                    if needed
                    else "Expected none: this start needs none."
                )
            )
        if needed == "calibration" and not isinstance(data, Moments | str):
            raise ValueError(
                f"Received start_data={data!r} for layer '{self.name}'. "
                f"Expected `wrap_model(..., {needed}=...)`, which gives each "
                "layer the moments of its own inputs."
            )
        self.start_data = LOADED if isinstance(data, str) else data

    def triplets_needed(self, view):
        return triplets_of_start(self, view)

    def initial_scale(self):
        rooted = self.scaling == "rslora"
        return self.alpha / (math.sqrt(self.rank) if rooted else self.rank)

    def lora_pair(self) -> LowRankPair:
        """A pair that starts as the options say."""
        start = STARTS[self.initializer](self)
        if self.start_data is LOADED:
            zeros = {"a_start": "zeros", "b_start": "zeros"}
            start = {**start, **zeros}
        return LowRankPair(self, self.view, self.rank, seed=self.seed, **start)


def check_fits(adapter, rank: int, view=None) -> None:
    """Raises a ValueError if a rank is above that of an adapter's kernel."""
    view = adapter.view if view is None else view
    if rank > view.max_rank:
        raise ValueError(
            f"Received rank={rank} for layer '{adapter.name}', whose "
            f"kernel is {view.n_in} x {view.n_out}. Expected at most "
            f"{view.max_rank}; give this layer its own rank with "
            "`overrides`, or exclude it."
        )


def lora_start(view, seed):
    """How A starts in LoRA: uniform in +-sqrt(1/n_in)."""
    bound = math.sqrt(1 / view.fan_in)
    return keras.initializers.RandomUniform(-bound, bound, seed)
