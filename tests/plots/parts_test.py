import numpy as np
import pytest

import keras_spectral as ks

pytestmark = pytest.mark.once

GATES = {
    "model/block_0": {
        "prefix": np.array([0.1, 0.3]),
        "adapter": np.array([0.8, 0.6]),
    },
    "model/block_1": {"adapter": np.array([0.5, 0.5])},
}
RECORDS = [
    {"step": s, "gates": {"a": {"prefix": [0.5 / s, 0.1]}}} for s in (1, 2)
]


def test_bars_show_means():
    figure = ks.plots.plot_gate_bars(GATES)
    (ax,) = figure.axes
    heights = [p.get_height() for p in ax.patches]
    np.testing.assert_allclose(heights, [0.2, np.nan, 0.7, 0.5])
    assert [t.get_text() for t in ax.get_xticklabels()] == [
        "block_0",
        "block_1",
    ]


def test_map_shows_means():
    figure = ks.plots.plot_gate_map(GATES)
    ax = figure.axes[0]
    values = ax.images[0].get_array().filled(np.nan)
    np.testing.assert_allclose(values, [[0.2, 0.7], [np.nan, 0.5]])
    assert "0.70" in [text.get_text() for text in ax.texts]


def test_histogram_counts_examples():
    figure = ks.plots.plot_gate_histogram(GATES, bins=2)
    assert len(figure.axes[0].patches) == 2


def test_history_draws_each_block_and_the_mean():
    figure = ks.plots.plot_gate_history(RECORDS)
    lines = figure.axes[0].lines
    assert len(lines) == 2
    np.testing.assert_allclose(lines[1].get_xydata(), [[1, 0.5], [2, 0.25]])


@pytest.mark.parametrize(
    "draw",
    [
        ks.plots.plot_gate_bars,
        ks.plots.plot_gate_map,
        ks.plots.plot_gate_histogram,
        ks.plots.plot_gate_history,
    ],
)
def test_nothing_to_draw_raises(draw):
    with pytest.raises(ValueError, match="Received (gates|records)={}"):
        draw({})
