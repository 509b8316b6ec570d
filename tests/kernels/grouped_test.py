import keras
import numpy as np
import pytest
from keras import ops

from keras_spectral.kernels import grouped
from keras_spectral.kernels import kernel_view

APART = keras.backend.backend() != "torch"
CASES = [
    ("Conv1D", (7, 6), {"kernel_size": 3, "padding": "causal"}),
    ("Conv1D", (7, 6), {"kernel_size": 3, "dilation_rate": 2}),
    ("Conv2D", (6, 5, 6), {"kernel_size": (3, 2), "strides": 2}),
    ("Conv2D", (6, 5, 6), {"kernel_size": 3, "padding": "same"}),
    ("Conv3D", (4, 4, 4, 6), {"kernel_size": 2, "padding": "same"}),
]


def _in_numpy(layer, inputs, groups):
    """The sum over the plain convolutions of each group."""
    kernel = ops.convert_to_numpy(layer.kernel)
    parts = zip(np.split(inputs, groups, -1), np.split(kernel, groups, -1))
    outputs = []
    for x, part in parts:
        config = layer.get_config()
        config |= {"filters": part.shape[-1], "groups": 1, "use_bias": False}
        config["activation"] = None
        plain = getattr(keras.layers, type(layer).__name__[7:])
        one = plain.from_config(config)
        one.build(x.shape)
        one.kernel.assign(part)
        outputs.append(ops.convert_to_numpy(one(x)))
    total = np.concatenate(outputs, -1) + ops.convert_to_numpy(layer.bias)
    return np.maximum(total, 0)


@pytest.mark.parametrize(("kind", "shape", "options"), CASES)
def test_groups_run_as_convolutions_of_their_own(kind, shape, options):
    inputs = np.random.default_rng(0).normal(size=(2, *shape))
    inputs = inputs.astype("float32")
    make = getattr(grouped, f"Grouped{kind}")
    layer = make(9, groups=3, activation="relu", **options)
    layer.build(inputs.shape)
    layer.bias.assign(np.arange(9) / 9 - 0.5)
    assert grouped.runs_apart(3) == APART
    expected = _in_numpy(layer, inputs, 3)
    got = ops.convert_to_numpy(layer(inputs))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert kernel_view(layer).groups == 3


def test_a_saved_model_trains_on(tmp_path):
    # A plain grouped convolution has no gradient eagerly on TensorFlow.
    model = keras.Sequential(
        [keras.Input((4, 4, 4)), grouped.GroupedConv2D(6, 3, groups=2)]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.ones((4, 4, 4, 4), "float32")
    y = np.ones((4, 2, 2, 6), "float32")
    losses = model.fit(x, y, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        again.predict(x, verbose=0), model.predict(x, verbose=0)
    )


def test_channels_first():
    layer = grouped.GroupedConv2D(
        4, 3, groups=2, data_format="channels_first", padding="same"
    )
    layer.build((2, 4, 5, 5))
    if not APART:
        assert not grouped.runs_apart(2)
    inputs = np.random.default_rng(0).normal(size=(2, 4, 5, 5))
    inputs = inputs.astype("float32")
    last = grouped.GroupedConv2D(4, 3, groups=2, padding="same")
    last.build((2, 5, 5, 4))
    last.kernel.assign(layer.kernel)
    expected = last(np.moveaxis(inputs, 1, -1))
    try:
        got = layer(inputs)
    except Exception as error:  # TensorFlow's CPU code knows no such order
        assert keras.backend.backend() == "tensorflow", error
        return
    np.testing.assert_allclose(
        ops.convert_to_numpy(got),
        np.moveaxis(ops.convert_to_numpy(expected), -1, 1),
        atol=1e-5,
    )
