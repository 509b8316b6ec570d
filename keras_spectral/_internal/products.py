"""Layers that run as they are, but for products with kernels of their own."""

import types
from typing import Any

import keras
from keras import ops

from keras_spectral._internal.twin import twin

Pairs = dict[str, tuple[Any, Any]]


def with_pairs(layer: keras.layers.Layer, pairs: Pairs) -> keras.layers.Layer:
    """A twin whose einsums with its kernels gain thin products.

    `einsum(equation, x, K)` becomes that plus the same with A B for K, in
    two thin steps. The twin's `call` is the layer's own code, which finds
    other operations under the name `ops`; nothing that is shared changes.

    Args:
        layer: A layer whose `call` multiplies by `ops.einsum`.
        pairs: By the kernel's attribute A (.., n_in, r) and B (.., r, n_out).
    """
    call = type(layer).call
    kernels = {id(getattr(layer, name)): pair for name, pair in pairs.items()}
    names = {**call.__globals__, "ops": _Operations(kernels)}
    function = types.FunctionType(
        call.__code__, names, call.__name__, call.__defaults__, call.__closure__
    )
    function.__kwdefaults__ = call.__kwdefaults__
    copy = twin(layer)
    vars(copy)["call"] = types.MethodType(function, copy)
    return copy


class _Operations:
    """`keras.ops`, with thin products beside those with known kernels."""

    def __init__(self, kernels):
        self._kernels = kernels
        self._casts = []  # kept, so that no other tensor gets their ids

    def __getattr__(self, name):
        return getattr(ops, name)

    def cast(self, x, dtype):
        result = ops.cast(x, dtype)
        if id(x) in self._kernels:
            self._casts.append(result)
            self._kernels[id(result)] = self._kernels[id(x)]
        return result

    def einsum(self, equation, *operands, **kwargs):
        result = ops.einsum(equation, *operands, **kwargs)
        pair = self._kernels.get(id(operands[-1]))
        if pair is None or len(operands) != 2:
            return result
        first, second = thin_equations(equation)
        a, b = (ops.cast(x, result.dtype) for x in pair)
        codes = ops.einsum(first, operands[0], a)
        return result + ops.einsum(second, codes, b)


def thin_equations(equation: str) -> tuple[str, str]:
    """The two einsums of A B for `equation`, whose kernel is (.., in, out)."""
    terms, target = equation.replace(" ", "").split("->")
    source, kernel = terms.split(",")
    *rest, given, made = kernel
    rank = next(c for c in "rzqyx" if c not in equation)
    batch = "".join(rest)
    codes = target.replace(made, rank)
    return (
        f"{source},{batch}{given}{rank}->{codes}",
        f"{codes},{batch}{rank}{made}->{target}",
    )
