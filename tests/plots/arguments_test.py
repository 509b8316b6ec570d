import keras
import pytest

from keras_spectral import plots

pytestmark = pytest.mark.once

NOTHING = [None, 3, [], [1], {"a": 1.5}, "text", keras.Sequential()]
DRAW = [
    plots.plot_gate_bars,
    plots.plot_gate_map,
    plots.plot_gate_histogram,
    plots.plot_gate_history,
    plots.plot_learning,
    plots.plot_rank_history,
    plots.plot_rank_map,
    plots.plot_sensitivity,
    plots.plot_transfer,
]
RANKS = {"a/b": 1}


@pytest.mark.parametrize("data", NOTHING, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("draw", DRAW, ids=lambda f: f.__name__)
def test_what_cannot_be_drawn(draw, data):
    with pytest.raises(ValueError, match="Expected|lacks"):
        draw(data)


@pytest.mark.parametrize("model", [None, 3, {}])
def test_pictures_of_models_need_one(model):
    for draw in (
        plots.plot_gates,
        plots.plot_posterior,
        lambda model: plots.plot_spectrum(model, ".*"),
    ):
        with pytest.raises(ValueError, match="Expected a Keras model"):
            draw(model)


def test_other_arguments():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="path=3"):
        plots.plot_spectrum(model, 3)
    with pytest.raises(ValueError, match="bins=0"):
        plots.plot_posterior(model, bins=0)
    with pytest.raises(ValueError, match="bins=True"):
        plots.plot_gate_histogram({"a": {"b": [1]}}, bins=True)
    with pytest.raises(ValueError, match="ax=3"):
        plots.plot_rank_map(RANKS, ax=3)
