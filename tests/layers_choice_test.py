import keras
import numpy as np
import pytest

import keras_spectral as ks

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6)).astype("float32")
Y = RNG.normal(size=(12, 3)).astype("float32")


def _model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, name="block_1_dense"),
            keras.layers.BatchNormalization(name="block_1_norm"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.compile("adam", "mse")
    return model


def _by_hand(model, x, y):
    """The gradients of the loss, in inference, by all that learns."""
    first, norm, head = (
        [np.float64(w) for w in layer.get_weights()] for layer in model.layers
    )
    pre = x @ first[0] + first[1]
    gain = norm[0] / np.sqrt(norm[3] + model.layers[1].epsilon)
    hat = (pre - norm[2]) * gain + norm[1]
    error = 2 * (hat @ head[0] + head[1] - y) / y.size
    back = error @ head[0].T
    return {
        "head": [hat.T @ error, error.sum(0)],
        "block_1_norm": [
            (back * (pre - norm[2]) * gain / norm[0]).sum(0),
            back.sum(0),
        ],
        "block_1_dense": [x.T @ (back * gain), (back * gain).sum(0)],
    }


def _norm(arrays):
    return np.sqrt(sum(np.square(a).sum() for a in arrays))


def _weights(model):
    return {x.name: x.get_weights()[:2] for x in model.layers}


@pytest.mark.parametrize("frozen", [False, True])
def test_relative_gradient_norms(frozen):
    model = _model()
    model.layers[0].trainable = not frozen
    before = model.get_weights()
    found = ks.choose_layers(model, (X, Y), batch_size=6)
    halves = [_by_hand(model, X[i : i + 6], Y[i : i + 6]) for i in (0, 6)]
    weights = _weights(model)
    for name, score in found.items():
        mean = np.mean([_norm(half[name]) for half in halves])
        np.testing.assert_allclose(score, mean / _norm(weights[name]), 1e-3)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(found) == 3
    for old, new in zip(before, model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_fisher_in_groups():
    model = _model()
    found = ks.choose_layers(
        model, (X, Y), "fisher", groups=r"(block_\d)|head", batch_size=12
    )
    grads = _by_hand(model, X, Y)
    block = grads["block_1_norm"] + grads["block_1_dense"]
    size = sum(g.size for g in block)
    np.testing.assert_allclose(found["block_1"], _norm(block) ** 2 / size, 1e-3)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"by": "size"}, "by='size'"),
        ({"groups": "("}, "no regex"),
        ({"groups": "conv"}, "match 'conv'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ks.choose_layers(_model(), (X, Y), **options)


@pytest.mark.once
def test_a_model_without_loss():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="not compiled"):
        ks.choose_layers(model, (X, Y))
    with pytest.raises(ValueError, match="at least one example"):
        ks.choose_layers(_model(), (X[:0], Y[:0]))
