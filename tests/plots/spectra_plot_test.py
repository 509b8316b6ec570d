import keras
import numpy as np
import pytest

import keras_spectral as ks

pytestmark = pytest.mark.once


def _model(method, **options):
    model = keras.Sequential(
        [
            keras.Input((9,)),
            keras.layers.Dense(12, name="one"),
            keras.layers.Dense(8, name="two"),
        ]
    )
    ks.wrap_model(model, method, target=["one", "two"], **options)
    for weight in model.trainable_weights:
        weight.assign(np.full(weight.shape, 0.1))
    return model


def test_spectrum_draws_both_spectra_and_marks_directions():
    model = _model("spectral", columns=[1, 4])
    figure = ks.plots.plot_spectrum(model, "two")
    (ax,) = figure.axes
    base, adapted = (line.get_ydata() for line in ax.lines)
    layer = model.get_layer("two")
    values = np.linalg.svd(layer.layer.kernel.numpy(), compute_uv=False)
    np.testing.assert_allclose(base, values, atol=1e-5)
    assert np.abs(base - adapted).max() > 1e-3
    marks = sorted(patch.get_x() for patch in ax.patches)
    assert marks == [0.5, 3.5]


def test_gates_are_a_heat_map_of_layers_and_directions():
    figure = ks.plots.plot_gates(_model("gated_spectral", directions=5))
    table = figure.axes[0].images[0].get_array()
    assert table.shape == (2, 5)
    np.testing.assert_allclose(table, 0.1, atol=1e-6)


def test_pictures_of_what_is_not_there():
    model = _model("lora", rank=2)
    with pytest.raises(ValueError, match="'gated_spectral' or"):
        ks.plots.plot_gates(model)
    with pytest.raises(ValueError, match="matches 0"):
        ks.plots.plot_spectrum(model, "three")
    with pytest.raises(ValueError, match="matches 2"):
        ks.plots.plot_spectrum(model, ".*")
    assert ks.plots.plot_spectrum(model, "one").axes
