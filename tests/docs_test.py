"""Examples in docstrings run, and the public face is as documented."""

import doctest
import importlib
import inspect
import pkgutil

import keras
import pytest

import keras_spectral
from keras_spectral.layers import METHODS

# PyTorch runs all examples, TensorFlow and JAX every third of them.
SHARE = {"tensorflow": slice(0, None, 3), "jax": slice(1, None, 3)}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(
        keras_spectral.__path__, "keras_spectral."
    )
][SHARE.get(keras.backend.backend(), slice(None))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    known = set(METHODS)
    module = importlib.import_module(name)
    keras.utils.clear_session()  # automatic names count from the start
    result = doctest.testmod(
        module, extraglobs={"keras": keras, "ks": keras_spectral}
    )
    for method in METHODS.keys() - known:  # that an example registers
        del METHODS[method]
    assert result.failed == 0


def test_public_names_have_docstrings_and_examples():
    for name in keras_spectral.__all__:
        documented = getattr(keras_spectral, name)
        assert documented.__doc__, name
        silent = inspect.ismodule(documented) or name == "adapter_summary"
        assert "Raises:" in documented.__doc__ or silent
