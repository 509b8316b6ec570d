import contextlib
import types

import keras
import pytest

import keras_spectral as ks
from keras_spectral._internal.layouts import AdapterLayoutMap
from keras_spectral._internal.layouts import split_axes
from keras_spectral.kernels import kernel_view

ON_JAX = keras.backend.backend() == "jax"


def _rules(**given):
    devices = ["cpu:0"]
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), devices)
    rules = keras.distribution.LayoutMap(mesh)
    for pattern, axes in given.items():
        rules[pattern] = axes
    return rules


@contextlib.contextmanager
def _parallel(rules):
    parallel = keras.distribution.ModelParallel(
        layout_map=ks.adapter_layout(_rules(**rules)), batch_dim_name="batch"
    )
    keras.distribution.set_distribution(parallel)
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


def _axes(rules, path):
    layout = rules[path]
    return None if layout is None else tuple(layout.axes)


@pytest.mark.once
def test_rules_are_kept():
    rules = _rules(**{".*one/kernel": (None, "model")})
    completed = ks.adapter_layout(rules)
    assert completed is not rules and len(rules) == 1
    assert isinstance(completed, AdapterLayoutMap)
    assert completed.device_mesh is rules.device_mesh
    assert _axes(completed, "one/kernel") == (None, "model")
    assert completed["other"] is None
    with pytest.raises(ValueError, match="Expected a `keras.distribution"):
        ks.adapter_layout({".*": (None,)})


@pytest.mark.skipif(not ON_JAX, reason="Keras distributes on JAX alone")
@pytest.mark.parametrize(
    "rules, a, b",
    [
        ({".*hidden/kernel": ("batch", "model")}, "batch", "model"),
        # It fits the adapter as well, but was written for the kernel.
        ({".*hidden.*": (None, "model")}, None, "model"),
        (
            {".*hidden/kernel": ("model", None), ".*lora_b": ("batch", None)},
            0,
            0,
        ),
        ({}, None, None),
    ],
)
def test_pairs_follow_their_kernel(rules, a, b):
    with _parallel(rules):
        hidden = keras.layers.Dense(4, use_bias=False, name="hidden")
        model = keras.Sequential([keras.Input((6,)), hidden])
        ks.wrap_model(model, "lora", "hidden", rank=2)
    layer = model.layers[0]
    found = [tuple(w._layout.axes) for w in (layer.lora_a, layer.lora_b)]
    if a == 0:  # the user's own rule for B
        assert found == [("model", None), ("batch", None)]
    else:
        assert found == [(a, None), (None, b)]
    assert tuple(layer.adapter_scale._layout.axes) == ()


@pytest.mark.skipif(not ON_JAX, reason="Keras distributes on JAX alone")
@pytest.mark.parametrize(
    "layer, shape, axes, a, b",
    [
        (
            keras.layers.Conv2DTranspose(4, 3, name="hidden"),
            (5, 5, 2),
            ("batch", None, None, "model"),
            "model",
            "batch",
        ),
        (
            keras.layers.Conv2D(4, 3, name="hidden"),
            (5, 5, 2),
            (None, None, None, "model"),
            None,
            "model",
        ),
        (
            keras.layers.EinsumDense(
                "abc,dce->abde", (None, 2, 3), name="hidden"
            ),
            (5, 4),
            ("batch", "model", None),
            "model",
            "batch",
        ),
        # The second of a kernel's own row axes splits no stretch of rows.
        (
            keras.layers.Conv2D(4, 3, name="hidden"),
            (5, 5, 2),
            (None, None, "model", None),
            None,
            None,
        ),
        (
            keras.layers.Conv2D(4, 3, name="hidden"),
            (5, 5, 2),
            ("batch", None, "model", None),
            None,
            None,
        ),
    ],
    ids=["transposed", "convolution", "einsum", "channels", "both"],
)
def test_axes_of_kernels(layer, shape, axes, a, b):
    with _parallel({".*hidden/kernel": axes}):
        config = layer.get_config()
        model = keras.Sequential(
            [keras.Input(shape), type(layer).from_config(config)]
        )
        ks.wrap_model(model, "lora", "hidden", rank=1)
    pair = model.layers[0].lora_a, model.layers[0].lora_b
    found = [tuple(weight._layout.axes) for weight in pair]
    assert found == [(a, None), (None, b)]


@pytest.mark.skipif(not ON_JAX, reason="Keras distributes on JAX alone")
def test_copies_are_split_as_their_originals():
    with _parallel({".*head/kernel": (None, "model")}):
        layers = [
            keras.layers.Dense(4, name="hidden"),
            keras.layers.Dense(2, name="head"),
        ]
        model = keras.Sequential([keras.Input((6,)), *layers])
        ks.wrap_model(model, "lora", "hidden", rank=1, trainable=["head"])
    (copy,) = [v for v in model.variables if v.path.endswith("default/kernel")]
    assert tuple(copy._layout.axes) == (None, "model")


@pytest.mark.once
@pytest.mark.parametrize("devices, rows", [(2, "model"), (4, None)])
def test_devices_divide_what_is_split(devices, rows):
    layer = keras.layers.Dense(3)
    layer.build((None, 6))
    view = kernel_view(layer)
    layer._kernel._layout = types.SimpleNamespace(axes=("model", None))
    mesh = types.SimpleNamespace(axis_names=["model"], shape=[devices])
    assert split_axes(view, mesh) == [rows, None]
