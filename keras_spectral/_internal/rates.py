"""Updates of an optimizer in which each variable has its own rate."""

import contextlib
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_spectral._internal.checks import check_mapping
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import did_you_mean

_EXPECTED = "a dictionary of regexes and factors, such as {'.*lora_b': 16}"
_MAX_SHOWN = 6


def check_inner(given: Any) -> keras.optimizers.Optimizer:
    """Raises unless it is, or names, an optimizer that updates weights."""
    cause = optimizer = None
    try:
        optimizer = keras.optimizers.get(given)
    except Exception as error:  # of a configuration it may be any
        cause = error
    if optimizer is None:
        raise ValueError(
            f"Received optimizer={given!r}. Expected a Keras optimizer, or "
            "its name or configuration as `keras.optimizers.get` takes them."
            + did_you_mean(given, dir(keras.optimizers))
        ) from cause
    around = ("inner_optimizer", "optimizers")
    if any(hasattr(optimizer, name) for name in around):
        raise ValueError(
            f"Received optimizer={type(optimizer).__name__}(...). Expected "
            "one that updates weights itself. A LossScaleOptimizer belongs "
            "around WithRates, and all factors into one dictionary."
        )
    return optimizer


def check_rates(given: Any) -> dict[str, float]:
    """Raises unless it maps regular expressions to factors of at least 0."""
    rates = {}
    for pattern, factor in check_mapping(given, "rates", _EXPECTED).items():
        if not isinstance(pattern, str):
            raise ValueError(
                f"Received rates with {pattern!r}. Expected {_EXPECTED}."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"Received rates with {pattern!r}, which is no regular "
                f"expression: {error}. Expected {_EXPECTED}."
            ) from error
        rates[pattern] = check_number(factor, f"rates[{pattern!r}]", 0)
    return rates


def factors_of(
    variables: Iterable[keras.Variable], rates: dict[str, float]
) -> list[float]:
    """The factor of the first regex that matches each variable's path, or 1.

    Raises:
        ValueError: A regex matches no variable.
    """
    # TensorFlow's own variables have no path.
    paths = [getattr(v, "path", v.name) for v in variables]
    for pattern in rates:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(_no_match(pattern, paths))
    return [
        next((c for p, c in rates.items() if re.fullmatch(p, path)), 1)
        for path in paths
    ]


@contextlib.contextmanager
def at_rates(
    optimizer: keras.optimizers.Optimizer,
    factor: Callable,
    frozen: bool = True,
) -> Iterator[None]:
    """Steps within multiply the rate of each variable by its factor.

    For as long as it lasts, functions stand over the methods that update
    weights and shrink them. They are below `_backend_update_step`, which goes
    on to see all variables together, as do clipping and accumulation: what
    `after_update` puts over that one sees each step once.

    Args:
        optimizer: A Keras optimizer that updates weights itself.
        factor: Gives the factor of a variable, a Python number.
        frozen: Whether variables with factor 0 are left out of updates.
    """
    own = vars(optimizer)
    if "_at_rates" in own:  # TensorFlow's replicas take turns within a step
        yield
        return
    put = _methods(optimizer, factor, frozen)
    before = {name: own[name] for name in put if name in own}
    own.update(put, _at_rates=True)
    try:
        yield
    finally:
        for name in [*put, "_at_rates"]:
            del own[name]
        own.update(before)


def _methods(optimizer, factor, frozen):
    """Replacements of the optimizer's methods, by their names."""
    decay = optimizer._apply_weight_decay
    rate = optimizer._get_current_learning_rate
    step = optimizer.update_step
    together = getattr(optimizer, "_parallel_update_step", None)
    decaying = [1]  # the factor of the group that shrinks just now

    def groups(variables):
        found = {}
        for index, variable in enumerate(variables):
            found.setdefault(factor(variable), []).append(index)
        return [(c, where) for c, where in found.items() if c or not frozen]

    def apply_weight_decay(variables):
        if keras.backend.backend() == "torch":  # its `foreach` needs some
            use = optimizer._use_weight_decay
            variables = [v for v in variables if use(v)]
        for decaying[0], where in groups(variables):
            decay([variables[i] for i in where])
        decaying[0] = 1

    def current_learning_rate():
        return _times(rate(), decaying[0])

    def update_step(gradient, variable, learning_rate):
        c = factor(variable)
        if c or not frozen:
            step(gradient, variable, _times(learning_rate, c))

    def parallel_update_step(grads, variables, learning_rate):
        # Nadam's product is for all, and each call takes it a step further.
        product = getattr(optimizer, "_u_product", None)
        start = None if product is None else ops.copy(product)
        for c, where in groups(variables):
            if product is not None:
                product.assign(start)
            together(
                [grads[i] for i in where],
                [variables[i] for i in where],
                _times(learning_rate, c),
            )

    put = {
        "_apply_weight_decay": apply_weight_decay,
        "_get_current_learning_rate": current_learning_rate,
    }
    if together is None:
        return {**put, "update_step": update_step}
    return {**put, "_parallel_update_step": parallel_update_step}


def _times(rate, factor):
    return rate if factor == 1 else rate * factor


def _no_match(pattern, paths):
    ends = [f".*{path.rpartition('/')[2]}" for path in paths]
    parts = [f".*{p}/.*" for path in paths for p in path.split("/")[:-1]]
    shown = ", ".join(map(repr, paths[:_MAX_SHOWN])) or "none"
    more = len(paths) - _MAX_SHOWN
    return (
        f"rates has {pattern!r}, which matches no variable that trains. "
        "Expected a regex that matches a whole path."
        + did_you_mean(pattern, [*ends, *parts, *paths])
        + f" Variables here: {shown}"
        + (f" and {more} more." if more > 0 else ".")
    )
