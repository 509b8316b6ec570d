import gc
import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import keras_spectral  # noqa: E402, F401
from keras_spectral.compression import latency  # noqa: E402

ON_TORCH = keras.backend.backend() == "torch"
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


def _warm_up():
    """Loads what Keras loads late: seeds import TensorFlow, `fit` the rest."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(np.ones((1, 1)), np.ones((1, 1)), verbose=0)


_warm_up()
# The collector need not look again and again at what the imports made.
gc.collect()
gc.freeze()
# And what tests leave behind goes at the end of each file.
gc.set_threshold(100_000, 20, 100)


def pytest_addoption(parser):
    parser.addoption(
        "--everything",
        action="store_true",
        help="off PyTorch also what is marked `once`",
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out what PyTorch's run has seen to."""
    if ON_TORCH or config.getoption("everything"):
        return
    once = [item for item in items if item.get_closest_marker("once")]
    config.hook.pytest_deselected(items=once)
    items[:] = [item for item in items if not item.get_closest_marker("once")]


@pytest.fixture(autouse=True)
def _eager_on_tensorflow(request):
    """Tracing a step takes TensorFlow seconds, running it eagerly does not.

    What is marked `compiled` runs as users run it.
    """
    if not ON_TENSORFLOW or request.node.get_closest_marker("compiled"):
        yield
        return
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(autouse=True, scope="module")
def _names_count_from_the_start():
    """So that a file's tests see the same, whatever ran before."""
    keras.utils.clear_session()
    yield
    gc.collect()
    gc.freeze()  # what is left stays, and is not looked at again


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def _layers_take_times_by_a_formula(request, monkeypatch):
    """1 ms for 1,000 weights, and as much for each slice.

    Real times differ from run to run, and so would the ranks that
    `compress_model` chooses. What is marked `timed` takes real ones.
    """
    if not request.node.get_closest_marker("timed"):
        monkeypatch.setattr(latency, "milliseconds", _formula)


def _formula(layer, shape):
    groups = getattr(getattr(layer, "down", None), "groups", 1)
    return groups * layer.count_params() / 1000


@pytest.fixture(autouse=True)
def _traced_steps_are_forgotten():
    """TensorFlow's registry of gradients keeps every traced step for good.

    Some thousand objects for each `fit`: after a thousand tests, looking for
    garbage took longer than the tests.
    """
    yield
    if ON_TENSORFLOW:
        from tensorflow.python.framework import ops

        gradients = ops.gradient_registry._registry
        for name in [name for name in gradients if "-" in name]:
            del gradients[name]  # not one of an operation, but of a function
