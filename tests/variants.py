"""What a method's own test file tells the contracts about the method.

Each file in `tests/layers/` and `tests/blocks/` that tests a method has a
list `VARIANTS`: one `Variant` for every value of every string option.
"""

import dataclasses
import importlib
import inspect
import pathlib
from collections.abc import Callable
from collections.abc import Sequence

import layer_cases
import numpy as np
from keras import ops

from keras_spectral._internal.layer_tools import own_variables

TESTS = pathlib.Path(__file__).parent


def lora_size(case, layer):
    """How many weights a pair of rank 2 has."""
    return 2 * case.size


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of a method, and what the contract then expects of it.

    Attributes:
        adapter: The method's class.
        name: What the tests of this variant are called.
        options: Arguments of the class, rank 2 where there is a rank.
        formula: `(variant, adapter, weights) -> matrix`, what the kernel
            gains, in numpy float64 from the adapter's own weights by name,
            `scale` excepted. None for what cannot be merged.
        size: `(case, layer) -> int`, how many weights train.
        cases: The kinds of layers that it fits, all by default; on other
            backends than PyTorch those in `layer_cases.ONE_PER_VIEW`.
        exact_start: Whether it starts as the base bit for bit.
        starts_as_base: Whether it starts as the base at all.
        settle: What `fit` would change besides the trained weights.
        bias: `(variant, adapter, bias) -> bias`, what becomes of the base's
            bias, in numpy.
    """

    adapter: type
    name: str
    options: dict
    formula: Callable | None
    size: Callable = lora_size
    cases: Sequence[layer_cases.Case] = tuple(layer_cases.ONE_PER_VIEW)
    exact_start: bool = True
    starts_as_base: bool = True
    settle: Callable = lambda adapter: None
    bias: Callable = lambda variant, adapter, bias: bias

    @property
    def merges(self):
        return self.formula is not None

    def make(self, layer):
        seed = {"seed": 3} if "seed" in self.adapter.option_names() else {}
        return self.adapter(layer, **self.options, **seed)

    def matrix(self, adapter):
        """What the formula gives for the adapter's weights as they are."""
        weights = {
            weight.name: np.float64(ops.convert_to_numpy(weight))
            for weight in own_variables(adapter)
            if weight.name not in ("scale", "strength")
        }
        return np.float32(self.formula(self, adapter, **weights))


@dataclasses.dataclass(frozen=True)
class BlockVariant:
    """Options of a method of blocks, and how many weights a block trains."""

    adapter: type
    name: str
    options: dict
    size: int
    starts_as_base: bool = True


def collected(folder):
    """The variants of all test files in a folder of `tests/`."""
    found = []
    for path in sorted((TESTS / folder).glob("*_test.py")):
        module = importlib.import_module(path.stem)
        found += getattr(module, "VARIANTS", [])
    return found


def without_variants(namespace, kind, variants):
    """Names in `__all__` of classes of a kind that no variant is of."""
    adapters = {variant.adapter for variant in variants}
    exported = [getattr(namespace, name) for name in namespace.__all__]
    return [
        x.__name__
        for x in exported
        if inspect.isclass(x) and issubclass(x, kind) and x not in adapters
    ]


def on_blocks(adapter, matrix):
    """A matrix, zero where a grouped convolution has no weights."""
    groups = getattr(adapter.layer, "groups", 1)
    n_in, n_out = matrix.shape
    ones = np.ones((n_in // groups, n_out // groups))
    return matrix * np.kron(np.eye(groups), ones)
