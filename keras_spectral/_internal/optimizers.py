"""Optimizers from inside: renewing them, and watching their updates."""

import contextlib
import types
import warnings
from collections.abc import Callable
from collections.abc import Iterable

import keras

from keras_spectral._backend import number_in
from keras_spectral._backend import over_replicas

_PLAIN = (bool, int, float, str, types.FunctionType)
# What `after_update` puts over an optimizer's methods.
_WATCHED = ("_backend_update_step", "save_own_variables", "load_own_variables")

Pairs = Iterable[tuple[keras.Variable, keras.Variable]]


def renewed(
    optimizer: keras.optimizers.Optimizer, replaced: Pairs = ()
) -> keras.optimizers.Optimizer:
    """An unbuilt optimizer of the same kind, for other variables.

    It has the class and the configuration of the old one and what a
    configuration leaves out: the exclusions from weight decay, by name and
    by variable; a callable learning rate itself; the scale that a
    LossScaleOptimizer has reached; inner optimizers, renewed in the same way;
    what a user has hung on it (IVON's `noise`). It begins at step 0, without
    momenta.

    Args:
        optimizer: The old one; it stays as it is.
        replaced: Pairs of an old variable and the one that trains in its
            place: an exclusion of the old one holds for the new one too.
    """
    replaced = list(replaced)
    with warnings.catch_warnings():
        # The function itself is handed over below, nothing is written.
        lambdas = "The object being serialized includes a `lambda`"
        warnings.filterwarnings("ignore", lambdas)
        config = optimizer.get_config()
    kind = type(optimizer)
    if hasattr(optimizer, "inner_optimizer"):
        inner = renewed(optimizer.inner_optimizer, replaced)
        # What is around another names it so, or like WithRates shorter.
        name = "optimizer" if "optimizer" in config else "inner_optimizer"
        fresh = kind(**{**config, name: inner})
    elif _optimizer_map(optimizer) is not None:
        chosen = _renewed_map(_optimizer_map(optimizer), replaced)
        fresh = kind(**{**config, "optimizer_map": chosen})
    else:
        rate = optimizer._learning_rate
        if callable(rate) and not isinstance(rate, keras.Variable):
            config["learning_rate"] = rate
        fresh = kind.from_config(config)
    _carry(optimizer, fresh, replaced)
    return fresh


def innermost(
    optimizer: keras.optimizers.Optimizer | None,
) -> keras.optimizers.Optimizer | None:
    """The optimizer that updates weights: itself, or the one inside."""
    while hasattr(optimizer, "inner_optimizer"):
        optimizer = optimizer.inner_optimizer
    return optimizer


def after_update(
    optimizer: keras.optimizers.Optimizer,
    function: Callable,
    variables: Iterable[keras.Variable] = (),
) -> None:
    """Lets an optimizer call a function after each update of weights.

    The function gets the gradients that the update used (unscaled,
    accumulated, clipped) and the variables, within the compiled step.

    Args:
        optimizer: A Keras optimizer, or one around another.
        function: What to call.
        variables: Those of the innermost optimizer that belong to the
            function: an optimizer is saved and loaded without them.
    """
    inner, variables = innermost(optimizer), list(variables)
    plain = inner._backend_update_step

    def update(grads, trainable_variables, learning_rate):
        plain(grads, trainable_variables, learning_rate)
        function(over_replicas(grads), trainable_variables)

    def alone(method):
        def call(store):
            with _without(inner, variables):
                return method(store)

        return call

    for each in _chain(optimizer):
        for name in _WATCHED[1:]:
            vars(each)[name] = alone(getattr(each, name))
    vars(inner)["_backend_update_step"] = update
    vars(inner)["_called_after_update"] = function, variables


def called_after_update(
    optimizer: keras.optimizers.Optimizer,
) -> Callable | None:
    """The function that `after_update` gave to an optimizer, if any."""
    function, _ = vars(innermost(optimizer)).get(
        "_called_after_update", 2 * [0]
    )
    return function or None


def stop_after_update(optimizer: keras.optimizers.Optimizer) -> None:
    """Takes off what `after_update` gave, and forgets its variables."""
    inner = innermost(optimizer)
    _, variables = vars(inner).pop("_called_after_update", (None, ()))
    for variable in variables:
        inner._untrack_variable(variable)
    for each in _chain(optimizer):
        for name in _WATCHED:
            vars(each).pop(name, None)


def _chain(optimizer):
    """An optimizer and those inside of it."""
    chain = [optimizer]
    while hasattr(chain[-1], "inner_optimizer"):
        chain.append(chain[-1].inner_optimizer)
    return chain


@contextlib.contextmanager
def _without(optimizer, variables):
    """An optimizer that does not know some of its last variables."""
    for variable in variables:
        optimizer._untrack_variable(variable)
    try:
        yield
    finally:
        for variable in variables:
            optimizer._track_variable(variable)


def _optimizer_map(optimizer):
    """The table that a MultiOptimizer chooses by, if it is one."""
    chosen = getattr(optimizer, "_optimizer_map", None)
    return chosen if hasattr(chosen, "default_optimizer") else None


def _renewed_map(table, replaced):
    fresh = {}

    def renew(optimizer):
        if id(optimizer) not in fresh:
            fresh[id(optimizer)] = renewed(optimizer, replaced)
        return fresh[id(optimizer)]

    chosen = {pattern: renew(table[pattern]) for pattern in table}
    return type(table)(renew(table.default_optimizer), chosen)


def _carry(old, fresh, replaced):
    """Hands over what is in no configuration."""
    if hasattr(old, "_exclude_from_weight_decay"):
        keys = set(old._exclude_from_weight_decay)
        keys |= {
            old._var_key(new) for v, new in replaced if old._var_key(v) in keys
        }
        fresh._exclude_from_weight_decay = keys
        fresh._exclude_from_weight_decay_pattern = (
            old._exclude_from_weight_decay_pattern
        )
        fresh._exclude_from_weight_decay_cache = {}
    if hasattr(old, "dynamic_scale"):
        # Its scale begins there as soon as it is built.
        fresh.initial_scale = number_in(old.dynamic_scale)
    for name, value in vars(old).items():
        given = name not in vars(fresh) and not name.startswith("_")
        if given and name not in _WATCHED and isinstance(value, _PLAIN):
            setattr(fresh, name, value)
