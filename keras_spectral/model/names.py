"""Several adapters on one model, by name: switching, mixing, dropping."""

import contextlib
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping

import keras
import numpy as np

from keras_spectral._internal.checks import check_model
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral._internal.snapshot import insist
from keras_spectral.layers.member import set_all_strengths
from keras_spectral.model import surgery
from keras_spectral.model import training
from keras_spectral.model.hosts import Names
from keras_spectral.model.hosts import check_new_name
from keras_spectral.model.hosts import chosen_names
from keras_spectral.model.hosts import keep_all
from keras_spectral.model.hosts import members
from keras_spectral.model.hosts import names_in
from keras_spectral.model.hosts import require_names
from keras_spectral.model.merge import unwrap_model

Active = str | Iterable[str] | Mapping[str, float]


def adapter_names(model: keras.Model) -> list[str]:
    """The names of a model's adapters.

    Returns:
        The names, in the order of the layers; `[]` for a plain model.

    Raises:
        ValueError: It is no Keras model.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> model = ks.wrap_model(model, "lora", "dense.*", rank=1, adapter="mrpc")
    >>> model = ks.wrap_model(model, "lora", "dense.*", rank=2, adapter="cola")
    >>> adapter_names(model)
    ['mrpc', 'cola']
    """
    check_model(model)
    return names_in(model)


def set_adapters(
    model: keras.Model, active: Active, *, train: Names = None
) -> keras.Model:
    """Switches adapters on and off, and mixes them.

    With strengths s_n each kernel is `K + sum of s_n (K'_n - K)`, and each
    layer that trains beside the adapters has `w + sum of s_n (w_n - w)`. That
    is linear for every method, rotations of SpectralDense included. No
    compiled function is traced again by it, as long as the same adapters
    train: each set of trained adapters has an optimizer and compiled
    functions of its own, which are there again when it comes back. What
    changes shapes (SoftPrompt) or keeps averages (a trained
    BatchNormalization) is compiled again.

    The model is changed for all threads.

    Args:
        model: A wrapped model.
        active: A name, several names, `[]` for the base, or `{name:
            strength}`. Strengths may be negative; the others are off.
        train: The names of what trains. By default what is active. With
            `[]` nothing does, which suits a model that only serves.

    Returns:
        The model.

    Raises:
        ValueError: An unknown name, or a strength that is no finite number.
            Nothing has changed then.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> for name in ("mrpc", "cola"):
    ...     model = ks.wrap_model(
    ...         model, "lora", "dense.*", adapter=name, rank=1
    ...     )
    >>> model = set_adapters(model, {"mrpc": 0.7, "cola": 0.3})
    >>> [layer.rank for layer in model.layers[0].members()]
    [1, 1]
    """
    check_model(model)
    found = members(model)
    if not found:
        require_names(model, None)
    known = list(dict.fromkeys(member.adapter_name for member in found))
    strengths = _strengths(model, known, active)
    trained = [name for name, strength in strengths.items() if strength]
    if train is not None:
        trained = chosen_names(model, known, train)
    before = [(m, m.set_to, m.is_trained) for m in found]

    def undo():
        set_strengths(model, [(m, strength) for m, strength, _ in before])
        _train(model, [m for m, _, trains in before if m.is_trained != trains])

    try:
        set_strengths(
            model, [(m, strengths.get(m.adapter_name, 0.0)) for m in found]
        )
        _train(
            model,
            [m for m in found if m.is_trained != (m.adapter_name in trained)],
        )
    except BaseException:
        insist(undo)
        raise
    return model


def _train(model, members):
    """Lets members train that do not, and the other way round."""
    if not members:
        return
    with training.another_set(model, members):
        for member in members:
            vars(member)["is_trained"] = not member.is_trained
        training.set_flags(model)


def set_strengths(
    model: keras.Model, strengths: list[tuple[keras.layers.Layer, float]]
) -> None:
    """Sets strengths of members."""
    retraced = []
    for member, strength in strengths:
        if member.retraces and member.is_off != (strength == 0):
            retraced.append(member)
    set_all_strengths(strengths)
    if retraced:
        above = surgery.models_above(surgery.owners(model), retraced)
        training.forget_compiled(above)


def delete_adapter(model: keras.Model, name: str) -> keras.Model:
    """Drops one of several adapters; see `unwrap_model` for the last.

    The others keep their strengths: if it was the only active one, none is.

    Raises:
        ValueError: There is no adapter of that name, or no other one.
    """
    (name,) = require_names(model, [name])
    if names_in(model) == [name]:
        raise ValueError(
            f"'{name}' is the only adapter of model '{model.name}'. Expected "
            "one of several; `unwrap_model` makes the model plain again."
        )
    return unwrap_model(model, adapter=name)


def rename_adapter(model: keras.Model, old: str, new: str) -> keras.Model:
    """Gives an adapter another name, its weights' paths included.

    Raises:
        ValueError: There is no adapter `old`, or there is one named `new`.
    """
    (old,) = require_names(model, [old])
    check_new_name(model, new)
    for member in members(model):
        if member.adapter_name == old:
            surgery.rename_member(member, new)
    return model


@contextlib.contextmanager
def mixed_batch(
    model: keras.Model, names: Iterable[str | None]
) -> Iterator[keras.Model]:
    """Each example of a batch through its own adapter, for inference.

    Inside, the model runs batches of as many examples as there are names,
    each at full strength of its adapter, None being the base. Layers run
    their base once and every adapter on the whole batch; blocks and trained
    heads run once for each name. Compiled functions are dropped at both ends.

    Args:
        model: A wrapped model.
        names: A name or None for each example.

    Raises:
        ValueError: An unknown name, or no examples; inside, a batch of
            another size, or a layer that does not keep examples apart.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    >>> for name in ("a", "b"):
    ...     model = ks.wrap_model(
    ...         model, "lora", "dense.*", adapter=name, rank=1
    ...     )
    >>> with mixed_batch(model, ["a", "b", None]):
    ...     outputs = model.predict(keras.ops.ones((3, 4)), verbose=0)
    """
    names = list(names) if isinstance(names, Iterable) else []
    if not names:
        raise ValueError(
            "Received no names. Expected a name, or None, for each example."
        )
    require_names(model, [name for name in names if name is not None])
    found = members(model)
    owners = surgery.owners(model)
    above = surgery.models_above(owners, found)
    with all_or_nothing() as snapshot:
        keep_all(model, snapshot)
        training.forget_compiled(above)
        for member in found:
            chosen = [float(name == member.adapter_name) for name in names]
            member.batch_rows = np.asarray(chosen, "float32")
            member.set_strength(1.0)
        try:
            yield model
        finally:
            training.forget_compiled(above)
            for member in found:
                member.batch_rows = None
        snapshot.restore()


def _strengths(model, known, active):
    """`{name: strength}` of what is to be on."""
    if isinstance(active, str):
        active = [active]
    if isinstance(active, Mapping):
        for name, strength in active.items():
            check_number(strength, f"strength of {name!r}")
        given = {name: float(s) for name, s in active.items()}
    elif isinstance(active, Iterable):
        given = {name: 1.0 for name in active}
    else:
        raise ValueError(
            f"Received active={active!r}. Expected a name, a list of names, or "
            "{name: strength}."
        )
    chosen_names(model, known, list(given))
    return given
