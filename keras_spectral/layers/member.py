"""Member: what a host holds, by a name and with a strength."""

import math

import keras
from keras import ops

from keras_spectral._backend import assign_numbers
from keras_spectral._backend import is_on
from keras_spectral._internal.checks import check_adapter_name


class Member:
    """Mixed into layers that a host holds: a change of the host's base.

    Attributes:
        adapter_name: The name of the adapter that it is a part of.
        adapter_strength: How much of the change is there, a float32 variable:
            0 is off exactly, whatever the weights hold.
        is_trained: Whether it trains, as long as the model does.
        disabled: Whether an `adapters_disabled` block has put it off.
        set_to: The strength that `set_strength` gave it last.
        batch_rows: Inside of a `mixed_batch` block for each example whether
            the change is there, an array of 0.0 and 1.0; else None.
    """

    retraces = False  # whether it is compiled again when switched

    def name_member(self, adapter_name: str) -> None:
        """Gives it its name."""
        self.adapter_name = check_adapter_name(adapter_name)
        self.is_trained = True
        self.disabled = False
        self.set_to = 1.0
        self.batch_rows = None

    def add_strength(self) -> None:
        """Creates the variable of the strength."""
        self.adapter_strength = self.add_weight(
            name="strength",
            shape=(),
            dtype="float32",
            initializer="ones",
            trainable=False,
            autocast=False,
        )

    def set_strength(self, strength: float) -> None:
        """Sets how much of the change is there."""
        set_all_strengths([(self, strength)])

    @property
    def is_off(self) -> bool:
        """Whether `set_strength` has put it off."""
        return self.set_to == 0

    def current_strength(self) -> float:
        """How much of the change is there."""
        return float(ops.convert_to_numpy(self.adapter_strength))

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.set_to = self.current_strength()

    def left_out(self, training=None) -> bool:
        """Whether a call can do without it: it is off, and does not train."""
        on = is_on(self.adapter_strength)
        if self.batch_rows is not None or on is None or on:
            return False
        return not (training and self.trainable)

    def in_rows(self, change):
        """A change of outputs, zero for examples that it is not meant for."""
        if self.batch_rows is None:
            return change
        return self.where_chosen(change, ops.zeros((), change.dtype))

    def where_chosen(self, one, other):
        """`one` for the examples that the change is meant for, else `other`.

        Raises:
            ValueError: There is another number of examples.
        """
        count = one.shape[0] if len(one.shape) else 1
        if count not in (None, len(self.batch_rows)):
            raise ValueError(
                f"Layer '{self.name}' runs on {count} rows, and `mixed_batch` "
                f"was given {len(self.batch_rows)} names. Expected inputs "
                "with one row for each name, and layers that keep examples "
                "apart."
            )
        rows = ops.convert_to_tensor(self.batch_rows, "float32")
        rows = ops.reshape(rows, (-1, *[1] * (len(one.shape) - 1)))
        return ops.where(rows > 0, one, other)

    def check_active(self) -> None:
        """Raises a ValueError if it is switched off."""
        if self.disabled:
            raise ValueError(
                f"The adapter of layer '{self.name}' is switched off. Expected "
                "an active one: leave the `adapters_disabled` block first."
            )
        if self.current_strength() == 0:
            raise ValueError(
                f"The adapter '{self.adapter_name}' of layer '{self.name}' is "
                "not active. Expected one that is: "
                f"`set_adapters(model, {self.adapter_name!r})` first."
            )


def set_all_strengths(strengths: list[tuple[Member, float]]) -> None:
    """Sets how much of their changes is there for many members at once."""
    numbers = [float(strength) for _, strength in strengths]
    assign_numbers([m.adapter_strength for m, _ in strengths], numbers)
    for (member, _), number in zip(strengths, numbers):
        # Past Keras, which takes long to set an attribute.
        vars(member)["set_to"] = number


def own_weights(member: keras.layers.Layer) -> list[keras.Variable]:
    """A member's weights: all that are neither its base's nor shared."""
    base = vars(member).get("base") or member.layer
    foreign = {id(w) for w in base.weights}
    shared = getattr(member, "shared", None)
    if shared is not None:
        foreign |= {id(w) for w in shared.weights}
    strength = getattr(member, "adapter_strength", None)
    return [
        w for w in member.weights if id(w) not in foreign and w is not strength
    ]


def count_own(member: keras.layers.Layer, trainable: bool = False) -> int:
    """How many numbers these hold."""
    found = [w for w in own_weights(member) if w.trainable or not trainable]
    return sum(math.prod(w.shape) for w in found)
