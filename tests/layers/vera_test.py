import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks
from keras_spectral.layers.vera import VeRAPair


def _matrix(variant, adapter, vera_d, vera_v):
    a, b = (
        np.float64(ops.convert_to_numpy(x))
        for x in (adapter.pair.vera_a, adapter.pair.vera_b)
    )
    view = adapter.view
    a, b = a[: view.n_in] * vera_d, b[:, : view.n_out] * vera_v
    return on_blocks(adapter, a @ b)


VARIANTS = [
    Variant(
        ks.VeRADense,
        "vera",
        {"rank": 7},
        _matrix,
        lambda case, layer: 7 + layer_cases.columns(layer),
    )
]


def test_golden_numbers():
    arrays = golden.arrays_of("vera.npz", "one_layer")
    pair = VeRAPair(12, 16, 7)
    pair.build()
    pair.vera_a.assign(arrays["buffer.lin.vera_A"].T)
    pair.vera_b.assign(arrays["buffer.lin.vera_B"].T)
    layer = ks.VeRADense(golden.dense_of(arrays), rank=7, pair=pair)
    layer.build(arrays["x"].shape)
    layer.vera_d.assign(arrays["param.lin.vera_lambda_d"])
    layer.vera_v.assign(arrays["param.lin.vera_lambda_b"])
    gradients = {
        "vera_d": arrays["grad.lin.vera_lambda_d"],
        "vera_v": arrays["grad.lin.vera_lambda_b"],
    }
    golden.check_dense(layer, arrays, gradients)


def _model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, "relu", name="one"),
            keras.layers.Dense(3, name="two"),
        ]
    )


X = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")


def _out(model):
    return ops.convert_to_numpy(model(X))


def _train(model):
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(X, np.ones((8, 3)), epochs=3, verbose=0)
    return _out(model)


def test_one_pair_serves_all_layers_and_is_saved_once(tmp_path):
    model = ks.wrap_model(_model(), "vera", "all", rank=9, seed=3)
    one, two = model.layers
    assert one.pair is two.pair
    assert (one.pair.n_in, one.pair.n_out) == (6, 6)
    # Each takes the first rows and columns.
    for layer, n_in, n_out in ((one, 5, 6), (two, 6, 3)):
        a = ops.convert_to_numpy(layer.factors()[0])
        expected = 0.1 * layer.pair.vera_a.numpy()[:n_in]
        np.testing.assert_allclose(a, expected, atol=1e-6)
        layer.vera_v.assign(np.ones(n_out))
        b = ops.convert_to_numpy(layer.factors()[1])
        expected = layer.pair.vera_b.numpy()[:, :n_out]
        np.testing.assert_allclose(b, expected, atol=1e-6)
        layer.vera_v.assign(np.zeros(n_out))
    trained = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert trained == 9 + 6 + 9 + 3
    assert ks.adapter_summary(model).trainable == trained
    outputs = _train(model)
    ks.save_adapters(model, tmp_path / "file.safetensors")
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "file.safetensors")
    shapes = sorted(t.shape for name, t in tensors.items() if "vera_" in name)
    assert shapes == [(3,), (6,), (6, 9), (9,), (9,), (9, 6)]
    again = ks.load_adapters(_model(), tmp_path / "file.safetensors")
    np.testing.assert_allclose(_out(again), outputs, atol=1e-6)
    assert again.layers[0].pair is again.layers[1].pair
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_out(again), outputs, atol=1e-6)
    assert again.layers[0].pair is again.layers[1].pair


def test_starts():
    layer = ks.VeRADense(keras.layers.Dense(40), rank=64, seed=1)
    layer.build((None, 60))
    a, b = (w.numpy() for w in (layer.pair.vera_a, layer.pair.vera_b))
    assert 0.9 < np.abs(a).max() / np.sqrt(6 / 60) <= 1
    assert 0.9 < np.abs(b).max() / np.sqrt(6 / 64) <= 1
    assert not layer.pair.trainable_weights
    np.testing.assert_array_equal(layer.vera_d.numpy(), np.float32(0.1))


def test_a_later_layer_must_fit_the_pair():
    model = ks.wrap_model(_model(), "vera", "two", rank=4)
    with pytest.raises(ValueError, match="kernel of 5 x 6.*serves 6 x 3"):
        ks.wrap_model(model, "vera", "one", rank=4)
    with pytest.raises(ValueError, match="Expected the same for all"):
        ks.wrap_model(model, "vera", "one", rank=5)
    ks.wrap_model(model, "vera", "one", rank=5, adapter="other")


def test_it_becomes_a_lora():
    model = ks.wrap_model(_model(), "vera", "two", rank=2, seed=3)
    outputs = _train(model)
    ks.to_lora(model)
    assert model.layers[1].method == "lora"
    np.testing.assert_allclose(_out(model), outputs, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank=0"),
        ({"d_initial": 0}, "d_initial=0"),
        ({"dropout": 1.0}, "dropout=1"),
        ({"pair": 3}, "Expected a VeRAPair"),
        ({"rank": 2, "pair": VeRAPair(4, 3, 5)}, "'rank': 5"),
    ],
)
def test_what_it_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        ks.VeRADense(keras.layers.Dense(3), **options)
