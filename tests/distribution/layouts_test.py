import keras
import pytest

import keras_spectral as ks
from keras_spectral._internal.layouts import AdapterLayoutMap

ON_JAX = keras.backend.backend() == "jax"


def _rules(**given):
    devices = ["cpu:0"]
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), devices)
    rules = keras.distribution.LayoutMap(mesh)
    for pattern, axes in given.items():
        rules[pattern] = axes
    return rules


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
    completed = ks.adapter_layout(_rules(**rules))
    parallel = keras.distribution.ModelParallel(
        layout_map=completed, batch_dim_name="batch"
    )
    keras.distribution.set_distribution(parallel)
    try:
        hidden = keras.layers.Dense(4, use_bias=False, name="hidden")
        model = keras.Sequential([keras.Input((6,)), hidden])
        ks.wrap_model(model, "lora", "hidden", rank=2)
    finally:
        keras.distribution.set_distribution(None)
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
            (None, None, None, "model"),
            "model",
            None,
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
    ],
    ids=["transposed", "convolution", "einsum", "channels"],
)
def test_axes_of_kernels(layer, shape, axes, a, b):
    completed = ks.adapter_layout(_rules(**{".*hidden/kernel": axes}))
    parallel = keras.distribution.ModelParallel(
        layout_map=completed, batch_dim_name="batch"
    )
    keras.distribution.set_distribution(parallel)
    try:
        config = layer.get_config()
        model = keras.Sequential(
            [keras.Input(shape), type(layer).from_config(config)]
        )
        ks.wrap_model(model, "lora", "hidden", rank=1)
    finally:
        keras.distribution.set_distribution(None)
    pair = model.layers[0].lora_a, model.layers[0].lora_b
    found = [tuple(weight._layout.axes) for weight in pair]
    assert found == [(a, None), (None, b)]
