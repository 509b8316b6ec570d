import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks


def _model(*layers, shape=(6, 6, 4)):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input(shape), *layers])


def _conv_model():
    return _model(
        keras.layers.Conv2D(8, 3, activation="relu", name="conv"),
        keras.layers.Flatten(),
        keras.layers.Dense(12, activation="tanh", name="dense"),
        keras.layers.Dense(3, name="head"),
    )


def _randomize(model, rng=None):
    rng = rng or np.random.default_rng(5)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))


def _x(model, count=5):
    shape = (count, *model.input_shape[1:])
    return np.random.default_rng(1).normal(size=shape).astype("float32")


def _outputs(model):
    return ops.convert_to_numpy(model(_x(model)))


@pytest.mark.once
@pytest.mark.parametrize(
    ("method", "options", "rank"),
    [
        ("spectral", {"rank": 2}, 4),
        ("spectral", {"rank": 2, "columns": [3, 1]}, 4),
        ("spectral", {"rank": 3, "mode": "rotate"}, 3),
        ("gated_spectral", {"directions": 5}, 5),
        ("lora", {"rank": 3, "alpha": 12}, 3),
        ("lora", {"rank": 2, "initializer": "pissa"}, 4),
    ],
)
def test_to_lora_is_exact(method, options, rank):
    model = _conv_model()
    ks.wrap_model(
        model,
        method,
        target=["conv", "dense"],
        trainable=["head"],
        **options,
    )
    _randomize(model)
    expected = _outputs(model)
    assert ks.to_lora(model) == {"conv": 0.0, "dense": 0.0}
    got = _outputs(model)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    adapters = [x for x in model.layers if isinstance(x, ks.AdapterLayer)]
    assert [type(a) for a in adapters] == [ks.LoRADense] * 2
    assert [a.rank for a in adapters] == [rank, rank]
    names = {w.name for w in model.trainable_weights}
    assert names == {"lora_a", "lora_b", "kernel", "bias"}  # with the head
    model.compile("adam", "mse")
    model.fit(_x(model), got + 1, verbose=0)
    assert np.abs(_outputs(model) - got).max() > 1e-4
    ks.unwrap_model(model)
    assert all(w.trainable for w in model.get_layer("dense").weights)


def test_to_lora_truncates_values_and_says_by_how_much():
    model = _conv_model()
    ks.wrap_model(model, "spectral", target="dense", mode="values")
    _randomize(model)
    adapter = model.get_layer("dense")
    delta = ops.convert_to_numpy(adapter.delta_matrix())
    values = np.linalg.svd(delta, compute_uv=False)
    errors = ks.to_lora(model, rank=4)
    expected = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())
    np.testing.assert_allclose(errors["dense"], expected, rtol=1e-3)
    assert model.get_layer("dense").rank == 4


def test_to_lora_of_a_pair_wider_than_the_kernel_is_exact():
    model = _model(keras.layers.Dense(3, name="dense"), shape=(5,))
    ks.wrap_model(model, "spectral", target="dense", rank=2)
    _randomize(model)
    expected = _outputs(model)
    assert ks.to_lora(model)["dense"] < 1e-5
    assert model.get_layer("dense").rank == 3
    np.testing.assert_allclose(_outputs(model), expected, atol=1e-5)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow has no grouped convolution on a CPU",
)
@pytest.mark.parametrize("method", ["spectral", "conv_lora"])
def test_to_lora_of_a_grouped_convolution(method):
    model = _model(keras.layers.Conv2D(6, 3, groups=2, name="conv"))
    options = {"spectral": {}, "conv_lora": {"factorization": "loralib"}}
    ks.wrap_model(model, method, target="conv", rank=2, **options[method])
    _randomize(model)
    expected = _outputs(model)
    assert ks.to_lora(model)["conv"] < 1e-5
    np.testing.assert_allclose(_outputs(model), expected, atol=1e-5)


def test_to_lora_refuses_and_changes_nothing():
    model = _conv_model()
    with pytest.raises(ValueError, match="no adapters"):
        ks.to_lora(model)
    ks.wrap_model(model, "conditional_spectral", target="dense", rank=2)
    adapter = model.get_layer("dense")
    with pytest.raises(ValueError, match="freeze_gates"):
        ks.to_lora(model)
    assert model.get_layer("dense") is adapter
    ks.unwrap_model(model)
    ks.wrap_model(model, "spectral", target="dense", rank=2)
    with ks.adapters_disabled(model):
        with pytest.raises(ValueError, match="switched off"):
            ks.to_lora(model)
    ks.unwrap_model(model)
    ks.wrap_model(model, "decaying_lora", target="dense", rank=2)
    with pytest.raises(ValueError, match="Merge it instead"):
        ks.to_lora(model)
    assert isinstance(model.get_layer("dense"), ks.DecayingLoRA)
    with pytest.raises(ValueError, match="rank=0"):
        ks.to_lora(model, rank=0)


def test_freeze_gates_is_the_mean_mask_and_merges():
    model = _conv_model()
    ks.wrap_model(
        model,
        "conditional_spectral",
        target=["conv", "dense"],
        rank=3,
        alpha=0.5,
        context="mean",
    )
    adapter = model.get_layer("dense")
    adapter.network.logit_bias.assign([50.0, -50.0, 0.0])
    rng = np.random.default_rng(0)
    for weight in adapter.network.trainable_weights[::2]:
        weight.assign(rng.normal(0, 1, weight.shape))
    u = adapter.u.numpy()
    x = _x(model, 40)
    adapter.reset_gates()
    model.predict(x, verbose=0)
    share = ops.convert_to_numpy(adapter.mean_gates())
    assert share[0] == 1 and share[1] == 0 and 0 < share[2] < 1
    ks.freeze_gates(model, x)
    gated = model.get_layer("dense")
    assert isinstance(gated, ks.GatedSpectralDense)
    np.testing.assert_allclose(gated.gates.numpy(), 0.5 * share, atol=1e-6)
    np.testing.assert_array_equal(gated.u.numpy(), u)
    expected = _outputs(model)
    ks.merge_model(model)
    np.testing.assert_allclose(_outputs(model), expected, atol=1e-5)


def test_freeze_gates_where_all_examples_agree_keeps_the_outputs():
    model = _conv_model()
    ks.wrap_model(model, "conditional_spectral", target="dense", rank=3)
    model.get_layer("dense").network.logit_bias.assign([5.0, -5.0, 5.0])
    expected = _outputs(model)
    ks.freeze_gates(model, _x(model))
    np.testing.assert_allclose(_outputs(model), expected, atol=1e-5)


def test_freeze_gates_needs_gates():
    model = _conv_model()
    ks.wrap_model(model, "lora", target="dense", rank=2)
    with pytest.raises(ValueError, match="no adapters of method 'conditional"):
        ks.freeze_gates(model, _x(model))


@pytest.mark.parametrize("data", [None, [], np.ones((0, 6), "float32")])
def test_freeze_gates_needs_examples(data):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(6)])
    ks.wrap_model(model, "conditional_spectral", target="all", rank=2)
    with pytest.raises(ValueError, match="Expected at least one example"):
        ks.freeze_gates(model, data)
