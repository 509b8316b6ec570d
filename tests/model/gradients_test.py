import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6)).astype("float32")
Y = RNG.normal(size=(12, 3)).astype("float32")


def _model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="one"),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, name="two"),
        ]
    )
    model.compile("adam", "mse")
    return model


def test_gradients_of_dense_layers():
    model = _model()
    one, _, two = model.layers
    hidden = np.maximum(X @ one.kernel.numpy(), 0)
    error = 2 * (hidden @ two.kernel.numpy() - Y) / Y.size
    found = ks.kernel_gradients(model, (X, Y), "all")
    assert list(found) == ["one", "two"]
    np.testing.assert_allclose(found["two"], hidden.T @ error, atol=1e-5)
    back = (error @ two.kernel.numpy().T) * (hidden > 0)
    np.testing.assert_allclose(found["one"], X.T @ back, atol=1e-5)


def test_sample_weights_and_one_batch():
    model = _model()
    first = ks.kernel_gradients(model, (X[:5], Y[:5]), "all")
    batch = ks.kernel_gradients(model, (X, Y), "all", batch_size=5)
    weights = np.zeros(10, "float32")
    weights[:5] = 2.0
    given = X[:10], Y[:10], weights
    weighed = ks.kernel_gradients(model, given, "all")
    for path in first:
        np.testing.assert_allclose(batch[path], first[path], atol=1e-6)
        np.testing.assert_allclose(weighed[path], first[path], atol=1e-6)


def test_a_frozen_wrapped_model_is_not_changed():
    model = _model()
    expected = ks.kernel_gradients(model, (X, Y), "all")
    ks.wrap_model(model, "lora", "two", rank=2)
    model.compile("adam", "mse")
    flags = [w.trainable for w in model.weights]
    values = [w.numpy() for w in model.weights]
    found = ks.kernel_gradients(model, (X, Y), "all")
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=1e-6)
    assert [w.trainable for w in model.weights] == flags
    for weight, value in zip(model.weights, values):
        np.testing.assert_array_equal(weight.numpy(), value)
    model.fit(X, Y, verbose=0)
    for weight, value, flag in zip(model.weights, values, flags):
        if not flag and "seed" not in weight.path:
            np.testing.assert_array_equal(weight.numpy(), value)


def test_other_kinds_of_layers():
    ids = RNG.integers(0, 9, (4, 5))
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(9, 6, name="table"),
            keras.layers.Conv1D(4, 3, name="conv"),
            keras.layers.EinsumDense("abc,cde->abde", (3, 2, 5), name="ein"),
        ]
    )
    model.compile("adam", "mse")
    y = np.ones((4, 3, 2, 5), "float32")
    found = ks.kernel_gradients(model, (ids, y), "all")
    shapes = {path: gradient.shape for path, gradient in found.items()}
    assert shapes == {"table": (9, 6), "conv": (18, 4), "ein": (4, 10)}
    # The slope of the loss along each is its length.
    for path, gradient in found.items():
        view = ks.kernels.kernel_view(model.get_layer(path))
        start, size = ops.copy(view.matrix()), np.linalg.norm(gradient)
        losses = []
        for step in (0.1, -0.1):
            along = ops.convert_to_tensor(step * gradient / size)
            view.assign(start + along)
            losses.append(model.evaluate(ids, y, verbose=0))
        slope = (losses[0] - losses[1]) / 0.2
        np.testing.assert_allclose(slope, size, rtol=1e-3)
        view.assign(start)


def test_what_it_refuses():
    model = _model()
    with pytest.raises(ValueError, match="at least one example"):
        ks.kernel_gradients(model, (X[:0], Y[:0]))
    with pytest.raises(ValueError, match="matches"):
        ks.kernel_gradients(model, (X, Y), "three")
    model.quantize("int8")
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="'one' is quantised"):
        ks.kernel_gradients(model, (X, Y), "one")
    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="not compiled"):
        ks.kernel_gradients(plain, (X, Y), "all")


@pytest.mark.compiled
@pytest.mark.parametrize("groups", [1, 2])
def test_lora_ga_steps_along_the_gradient(groups):
    keras.utils.set_random_seed(0)
    layer = keras.layers.Conv2D(8, 3, groups=groups, name="conv")
    model = keras.Sequential([keras.Input((5, 5, 4)), layer])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 5, 5, 4)).astype("float32")
    y = rng.normal(size=(6, 3, 3, 8)).astype("float32")
    found = ks.kernel_gradients(model, (x, y), "conv")
    plain = model.predict(x, verbose=0)
    options = {"initializer": "lora_ga", "gradients": found}
    ks.wrap_model(model, "lora", "conv", rank=2, alpha=4, **options)
    np.testing.assert_allclose(model.predict(x, verbose=0), plain, atol=1e-5)
    adapter = model.layers[0]
    before = ops.convert_to_numpy(adapter.delta_matrix())
    np.testing.assert_allclose(before, 0, atol=1e-6)
    model.fit(x, y, batch_size=6, verbose=0)
    moved = ops.convert_to_numpy(adapter.delta_matrix())
    # Two steps of size 1e-3 by s = 2 twice and by sqrt(n_out) / 16.
    blocks = adapter.view.blocks(found["conv"])
    u, s, vt = np.linalg.svd(ops.convert_to_numpy(blocks), full_matrices=False)
    best = (u[..., :4] * s[..., None, :4]) @ vt[..., :4, :]
    step = 1e-3 * 4 * np.sqrt(8) / 16
    got = ops.convert_to_numpy(adapter.view.blocks(moved))
    np.testing.assert_allclose(got, -step * best, atol=2e-3 * step)


def test_lora_ga_needs_room():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])
    model.compile("sgd", "mse")
    data = np.ones((4, 6), "float32"), np.ones((4, 5), "float32")
    found = ks.kernel_gradients(model, data, "all")
    options = {"initializer": "lora_ga", "gradients": found}
    with pytest.raises(ValueError, match="half of the kernel's rank, 2"):
        ks.wrap_model(model, "lora", "all", rank=3, **options)
