import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks
from keras_spectral.compression.codebook import k_means
from keras_spectral.compression.codebook import quantize_by
from keras_spectral.compression.codebook import quantize_linear


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model():
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(6, "tanh", name="hidden"),
            layers.Dense(3, name="head"),
        ]
    )
    return model


def _data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 12)), rng.normal(size=(24, 3))
    return x.astype("float32"), y.astype("float32")


def _output_gradient(model, kernel):
    """Of the mean squared error by the head's kernel, in numpy."""
    x, y = _data()
    hidden = np.tanh(x @ _numpy(model.weights[0]) + _numpy(model.weights[1]))
    error = hidden @ kernel + _numpy(model.weights[3]) - y
    return 2 * hidden.T @ error / y.size


@pytest.mark.compiled
def test_codebooks_train_by_the_sum_of_their_weights():
    model, (x, y) = _model(), _data()
    small = ks.cluster_weights(model, 2, target="head")
    kernel = np.float64(_numpy(model.get_layer("head").kernel))
    values = k_means(kernel, 4)
    codes = np.abs(kernel[..., None] - values).argmin(axis=-1)
    head = small.get_layer("head")
    np.testing.assert_array_equal(_numpy(head.codes), codes)
    gradient = _output_gradient(model, values[codes])
    small.compile(keras.optimizers.SGD(0.1), "mse")
    small.fit(x, y, batch_size=24, verbose=0)
    moved = values - 0.1 * np.bincount(codes.ravel(), gradient.ravel(), 4)
    np.testing.assert_allclose(_numpy(head.codebook), moved, atol=1e-5)
    expected = small.predict(x, verbose=0)
    plain = ks.finalize_quantized(small)
    assert type(plain.get_layer("head")) is layers.Dense
    np.testing.assert_allclose(
        _numpy(plain.get_layer("head").kernel), moved[codes], atol=1e-5
    )
    np.testing.assert_allclose(plain.predict(x, verbose=0), expected, atol=1e-6)
    assert len(plain.trainable_weights) == 4


@pytest.mark.compiled
def test_rounded_kernels_train_straight_through(tmp_path):
    model, (x, y) = _model(), _data()
    trainer = ks.fake_quantize(model, 3, target="head")
    kernel = np.float64(_numpy(model.get_layer("head").kernel))
    gradient = _output_gradient(model, quantize_linear(kernel, 3))
    trainer.compile(keras.optimizers.SGD(0.1), "mse")
    trainer.fit(x, y, batch_size=24, verbose=0)
    moved = kernel - 0.1 * gradient
    got = _numpy(trainer.get_layer("head").layer.kernel)
    np.testing.assert_allclose(got, moved, atol=1e-5)
    expected = trainer.predict(x, verbose=0)
    trainer.save(tmp_path / "trainer.keras")
    again = keras.saving.load_model(tmp_path / "trainer.keras")
    np.testing.assert_allclose(again.predict(x, verbose=0), expected, atol=1e-6)
    plain = ks.finalize_quantized(again)
    np.testing.assert_allclose(
        _numpy(plain.get_layer("head").kernel),
        quantize_linear(np.float64(got), 3),
        atol=1e-6,
    )
    np.testing.assert_allclose(plain.predict(x, verbose=0), expected, atol=1e-5)


@pytest.mark.once
def test_every_kind_of_layer_and_both_halves():
    def make():
        return keras.Sequential(
            [
                keras.Input((7,)),
                layers.Embedding(9, 6, mask_zero=True, name="table"),
                layers.EinsumDense("abc,dce->abde", (7, 2, 4), name="einsum"),
                layers.Conv2D(4, 2, groups=2, name="grouped"),
                layers.Conv2DTranspose(3, 2, name="transpose"),
                layers.SeparableConv2D(3, 2, name="separable"),
                layers.Flatten(),
                layers.Dense(12, name="head"),
            ]
        )

    model = ks.compress_model(make(), 0.5, target="head")
    names = ["table", "einsum", "grouped", "transpose", "separable", "head"]
    ids = np.random.default_rng(0).integers(1, 9, (2, 7))
    for function, count in ((ks.cluster_weights, 4), (ks.fake_quantize, None)):
        trainer = function(model, 2, target=names)
        trainer.compile("sgd", "mse")
        trainer.fit(ids, np.ones((2, 12)), verbose=0)
        expected = trainer.predict(ids, verbose=0)
        plain = ks.finalize_quantized(trainer)
        np.testing.assert_allclose(
            plain.predict(ids, verbose=0), expected, atol=1e-5
        )
        head = plain.get_layer("head")
        assert isinstance(head, ks.LowRank)
        for kernel in (head.down.kernel, head.up.kernel):
            kernel = _numpy(kernel)
            if count:
                assert len(np.unique(kernel)) == count
            else:
                steps = np.abs(kernel) / np.abs(kernel).max(axis=0)
                assert set(np.round(steps, 4).ravel()) == {0.0, 1.0}


@pytest.mark.once
def test_keras_stores_eight_bits_exactly():
    plain = ks.finalize_quantized(ks.fake_quantize(_model(), 8))
    kernel = _numpy(plain.get_layer("hidden").kernel)
    plain.quantize("int8")
    layer = plain.get_layer("hidden")
    stored = _numpy(layer._kernel) / _numpy(layer.kernel_scale)
    np.testing.assert_allclose(stored, kernel, atol=1e-6)


@pytest.mark.once
def test_the_model_given_stays_as_it_is():
    model = _model()
    before = [_numpy(w) for w in model.weights]
    small = ks.finalize_quantized(ks.cluster_weights(model, 1))
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, _numpy(new))
    kernel = before[0]
    np.testing.assert_allclose(
        _numpy(small.get_layer("hidden").kernel),
        quantize_by(k_means(kernel, 2), kernel),
        atol=1e-6,
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: ks.cluster_weights(m, 0), "bits=0"),
        (lambda m: ks.cluster_weights(m, 9), "bits=9"),
        (lambda m: ks.fake_quantize(m, 1), "bits=1"),
        (lambda m: ks.fake_quantize(m, 4, target="nothing"), "nothing"),
        (lambda m: ks.cluster_weights(3), "Received 3"),
        (ks.finalize_quantized, "Expected a model that `cluster_weights`"),
        (lambda m: ks.finalize_quantized(3), "Received 3"),
    ],
)
def test_bad_options(call, match):
    with pytest.raises(ValueError, match=match):
        call(_model())


@pytest.mark.once
@pytest.mark.parametrize("make", [ks.cluster_weights, ks.fake_quantize])
def test_frozen_layers_stay_frozen(make):
    layers = [keras.layers.Dense(4, name=name) for name in ("one", "two")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.layers[0].trainable = False
    plain = ks.finalize_quantized(make(model, 3))
    flags = [[v.trainable for v in x.variables] for x in plain.layers]
    assert flags == [[False, False], [True, True]]
