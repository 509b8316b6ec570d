import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant

import keras_spectral as ks


def _matrix(variant, adapter, gamma_delta, beta_delta=None):
    return gamma_delta.reshape(1, -1)


def _bias(variant, adapter, bias):
    return bias + ops.convert_to_numpy(adapter.beta_delta)


VARIANTS = [
    Variant(
        ks.TunedNorm,
        "tuned_norm",
        {},
        _matrix,
        lambda case, layer: sum(
            np.prod(getattr(layer, name).shape)
            for name in ("gamma", "beta", "scale")
            if isinstance(getattr(layer, name, None), keras.Variable)
        ),
        cases=layer_cases.NORMS,
        bias=_bias,
    )
]


class CentredNorm(keras.layers.Layer):
    """A scale that counts from one, as Gemma's."""

    def build(self, shape):
        self.scale = self.add_weight(shape=shape[-1:], initializer="zeros")

    def call(self, x):
        size = ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True))
        return x * size * (1 + self.scale)


def _model(norm):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(6, name="in"), norm]
    )


X = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")


@pytest.mark.parametrize("norm", [keras.layers.LayerNormalization, CentredNorm])
def test_norms_are_the_default_target(norm):
    model = ks.wrap_model(_model(norm(name="norm")), "tuned_norm")
    names = [w.path for w in model.trainable_weights]
    assert names and all("norm/" in name for name in names)
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.fit(X, np.ones((8, 6)), epochs=3, verbose=0)
    adapted = ops.convert_to_numpy(model(X))
    ks.merge_model(model)
    merged = ops.convert_to_numpy(model(X))
    np.testing.assert_allclose(merged, adapted, atol=1e-5)


def test_beside_a_shift_of_its_own():
    """BitFit and TunedNorm on one norm add up."""
    model = _model(keras.layers.LayerNormalization(name="norm"))
    ks.wrap_model(model, "tuned_norm", adapter="one")
    ks.wrap_model(model, "bitfit", "norm", adapter="two")
    rng = np.random.default_rng(1)
    one, two = model.get_layer("norm").members()
    one.gamma_delta.assign(rng.normal(size=6))
    one.beta_delta.assign(rng.normal(size=6))
    two.bias_delta.assign(rng.normal(size=6))
    ks.set_adapters(model, {"one": 0.5, "two": 2.0})
    adapted = ops.convert_to_numpy(model(X))
    ks.merge_model(model)
    merged = ops.convert_to_numpy(model(X))
    np.testing.assert_allclose(merged, adapted, atol=1e-5)


@pytest.mark.parametrize("layer", [keras.layers.Dense(3), keras.layers.ReLU()])
def test_what_is_no_norm_is_refused(layer):
    with pytest.raises(ValueError, match="Expected a norm"):
        ks.TunedNorm(layer)


def test_a_norm_without_a_scale_is_refused():
    layer = ks.TunedNorm(keras.layers.LayerNormalization(scale=False))
    with pytest.raises(ValueError, match="no trained scale"):
        layer.build((None, 4))
