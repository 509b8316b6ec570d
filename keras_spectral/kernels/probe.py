"""Whether a layer computes what its view says: `x K + b`.

A layer that runs the very functions of its Keras class is trusted. One that
runs others, such as a subclass with its own `call`, is tried on a few random
inputs.
"""

import functools
import inspect

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import concretely
from keras_spectral._internal.checks import is_small
from keras_spectral.kernels.view import KernelView
from keras_spectral.kernels.view import wide_dtype

# What a subclass may change without changing what its layers compute.
_HARMLESS = frozenset(
    """
    __abstractmethods__ __annotations__ __class__ __dict__ __doc__
    __firstlineno__ __init__ __init_subclass__ __module__ __new__
    __orig_bases__ __parameters__ __qualname__ __reduce__ __repr__
    __static_attributes__ __str__ __subclasshook__ __weakref__
    _api_export_path _api_export_symbol_id
    build build_from_config compute_mask compute_output_shape
    compute_output_spec count_params enable_lora from_config get_build_config
    get_config load_own_variables quantize quantized_build
    save_own_variables variable_serialization_spec
    """.split()
)
# On PyTorch Keras multiplies float64 matrices in float32.
_TOLERANCES = {"float64": 1e-4, "float32": 1e-4}
_TOLERANCE = 0.05  # where there are 16 bits or fewer
_RANK = 2


def check_view(view: KernelView, kind: type[keras.layers.Layer]) -> None:
    """Raises a ValueError if a layer is not what its view describes.

    Args:
        view: The view of a layer.
        kind: The class of layers that the view was written for.
    """
    changed = changed_parts(view.layer, kind)
    problem, cause = _problem(view, kind) if changed else (None, None)
    if problem is not None:
        layer = view.layer
        parts = " and ".join(f"`{name}`" for name in changed)
        raise ValueError(
            f"Layer {view.label} is a {type(layer).__name__} with {parts} "
            f"of its own beside those of {kind.__name__}, and {problem}. "
            "Expected a layer that computes `x K + b` with the kernel K that "
            f"it holds: leave it out with `exclude`, or build the model with "
            f"a plain {kind.__name__} whose kernel holds the change."
        ) from cause


def changed_parts(
    layer: keras.layers.Layer, kind: type[keras.layers.Layer]
) -> list[str]:
    """Names of what a layer does by other functions than its Keras class.

    Args:
        layer: An instance of `kind` or of a subclass.
        kind: A class of Keras's own.
    """
    cls = type(layer)
    patched = vars(layer).keys() & _routines(kind)
    if cls is kind:
        return sorted(patched)
    mine = cls.__mro__[: cls.__mro__.index(kind)]
    beside = [c for c in cls.__mro__ if c not in kind.__mro__]
    names = {name for c in (*mine, *beside) for name in vars(c)} - _HARMLESS
    overridden = [
        name
        for name in names
        if _found(kind, name) is not None
        and _found(kind, name) is not _found(cls, name)
    ]
    return sorted({*patched, *overridden})


@functools.cache
def _routines(kind):
    """Routines that a class calls and an instance could have of its own."""
    names = {name for c in kind.__mro__ for name in vars(c)} - _HARMLESS
    return {name for name in names if inspect.isroutine(_found(kind, name))}


def _found(cls, name):
    """A class's attribute, found without calling any property."""
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def _problem(view, kind):
    """A layer's fault and the error behind it; None if there is none.

    The layer itself is not touched: the trial is run by a twin, and other
    values for its variables hold for this thread alone.
    """
    try:
        with concretely():
            error = _error(view, kind)
    except _NoVariable:
        return f"its `{view.kernel_name}` is no variable of its own", None
    except Exception as cause:
        return f"it cannot be tried on random inputs ({cause})", cause
    dtype = "quantised" if view.quantized else view.layer.compute_dtype
    if error <= _TOLERANCES.get(dtype, _TOLERANCE):
        return None, None
    off = f"is off by {error:.2g} of the largest output"
    if view.quantized:
        return f"it is not linear: on random inputs it {off}", None
    return f"on random inputs `x K + b` by its kernel {off}", None


class _NoVariable(Exception):
    pass


def _error(view, kind):
    if view.quantized:
        return _linearity(view)
    if view.kernel_name is None:
        return _error_of_pair(view, kind)
    return _error_of_kernel(view)


def _error_of_pair(view, kind):
    """How far a factorised layer is from its halves, one after the other."""
    worst = 0.0
    with keras.StatelessScope():
        for inputs, _ in view.trials(np.random.default_rng(0)):
            expected = kind.call(view.bare(), inputs)
            worst = max(worst, _difference(_called(view, inputs), expected))
    return worst


def _error_of_kernel(view):
    """How far `x A B + b` is from the layer with A B for its kernel."""
    variable = view.variable()
    if not isinstance(variable, keras.Variable):
        raise _NoVariable
    rng = np.random.default_rng(0)
    a = rng.normal(size=(view.n_in, _RANK)) / np.sqrt(view.fan_in)
    b = rng.normal(size=(_RANK, view.n_out))
    kernel = ops.convert_to_tensor(a @ b, wide_dtype(variable.dtype))
    values = [(variable, view.kernel(kernel))]
    bias = getattr(view.layer, "bias", None)
    if isinstance(bias, keras.Variable):
        values.append((bias, rng.normal(size=bias.shape)))
    dtype = view.layer.compute_dtype
    a, b = (ops.convert_to_tensor(x, dtype) for x in (a, b))
    worst = 0.0
    with keras.StatelessScope(values):
        for inputs, options in view.trials(rng):
            got = _called(view, inputs, **options)
            expected = view.apply(inputs, a, b, **options)
            if not options and view.bias(expected) is not None:
                expected = expected + view.bias(expected)
            worst = max(worst, _difference(got, expected))
    return worst


def _linearity(view):
    """How far the layer is from a linear one; of a table always 0.

    The matrix of a quantised layer is read through its call, so that it is
    right if only the call is linear.
    """
    rng = np.random.default_rng(0)
    (one, _), *_ = view.trials(rng)
    (two, _), *_ = view.trials(rng)
    if "int" in keras.backend.standardize_dtype(one.dtype):
        return 0.0
    with keras.StatelessScope():
        parts = (_called(view, x) for x in (one, two))
        both = _called(view, one + two) + _called(view, ops.zeros_like(one))
        return _difference(sum(parts), both)


def _called(view, inputs, **options):
    if "training" in inspect.signature(view.layer.call).parameters:
        options["training"] = False
    return view.bare()(inputs, **options)


def _difference(got, expected):
    if tuple(got.shape) != tuple(expected.shape):
        return float("inf")
    got, expected = map(_numbers, (got, expected))
    size = max(np.abs(expected).max(), np.finfo("float32").tiny)
    error = np.abs(got - expected).max() / size
    return float(error) if np.isfinite(error) else float("inf")


def _numbers(x):
    small = is_small(keras.backend.standardize_dtype(x.dtype))
    x = ops.cast(x, "float32") if small else x
    return np.float64(ops.convert_to_numpy(x))
