import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks

pytestmark = pytest.mark.once


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model():
    model = keras.Sequential(
        [
            keras.Input((12,)),
            keras.layers.Dense(16, "relu", name="hidden"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    model.compile("sgd", "mse")
    return model


def _data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, 12)), rng.normal(size=(24, 3))


def test_scan_equals_pruning_by_hand():
    model, data = _model(), _data()
    before = [_numpy(w) for w in model.weights]
    found = ks.sensitivity_scan(model, data, (0, 0.5, 1), "loss")
    assert list(found) == ["hidden", "head"]
    assert list(found["head"]) == [0.0, 0.5, 1.0]
    small = ks.prune_model(model, 0.5, target="hidden")
    small.compile("sgd", "mse")
    for value, expected in (
        (found["hidden"][0.0], model.evaluate(*data, verbose=0)),
        (found["hidden"][0.5], small.evaluate(*data, verbose=0)),
        (found["head"][1.0], np.mean(data[1] ** 2)),
    ):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, _numpy(new))


def test_a_failed_scan_leaves_the_model():
    model = _model()
    before = [_numpy(w) for w in model.weights]
    with pytest.raises(ValueError, match=r"gives \['loss'\]"):
        ks.sensitivity_scan(model, _data(), [0.9])
    for shares in ([], [1.5], 3, [-1]):
        with pytest.raises(ValueError, match="Received share"):
            ks.sensitivity_scan(model, _data(), shares, "loss")
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, _numpy(new))


def test_pictures():
    scan = {"a/b": {0.0: 0.9, 0.5: 0.8}, "a/c": {0.0: 0.9, 0.5: 0.1}}
    ax = ks.plots.plot_sensitivity(scan).axes[0]
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_array_equal(lines["c"], [[0, 0.9], [50, 0.1]])
    history = [
        {
            "round": i,
            "ranks": {"a": 5 - i},
            "distortion": {"a": 0.5 / (i + 1), "b": 0.1},
        }
        for i in range(3)
    ]
    left, right = ks.plots.plot_learning(history).axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), [5, 4, 3])
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["a", "b"]
    np.testing.assert_array_equal(right.lines[1].get_ydata(), [0.1] * 3)
