import keras
import numpy as np
import pytest

import keras_spectral as ks

pytestmark = pytest.mark.once

PATHS = ("model/block_0/query", "model/block_0/value", "model/block_1/query")
RANKS = [dict(zip(PATHS, ranks)) for ranks in ((4, 4, 4), (1, 3, 0))]


def test_history_has_a_line_for_each_layer():
    ax = ks.plots.plot_rank_history(RANKS).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(lines) == ["block_0/query", "block_0/value", "block_1/query"]
    np.testing.assert_array_equal(lines["block_0/value"], [4, 3])


def test_map_is_layers_by_projections():
    ax = ks.plots.plot_rank_map(RANKS[-1]).axes[0]
    table = ax.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(table, [[1, 3], [0, np.nan]])
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "block_0",
        "block_1",
    ]


@pytest.mark.parametrize("scaled", [False, True])
def test_posterior_has_a_histogram_for_each_variable(scaled):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(1)]
    )
    optimizer = ks.optimizers.IVON(0.1, ess=100)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 2.0)
    model.compile(optimizer, "mse")
    with pytest.raises(ValueError, match="no posterior yet"):
        ks.plots.plot_posterior(model)
    model.fit(np.ones((8, 3)), np.ones((8, 1)), verbose=0)
    ax = ks.plots.plot_posterior(model).axes[0]
    assert len(ax.patches) == 4
    for patch in ax.patches:
        np.testing.assert_allclose(patch.get_data().values.sum(), 1)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Expected IVON"):
        ks.plots.plot_posterior(model)


@pytest.mark.parametrize(
    ("draw", "nothing", "expected"),
    [
        (ks.plots.plot_rank_history, [], "`budget.ranks` of"),
        (ks.plots.plot_rank_history, RANKS[-1], "`budget.ranks` of"),
        (ks.plots.plot_rank_map, {}, r"`budget.ranks\[-1\]` of"),
        (ks.plots.plot_rank_map, RANKS, r"`budget.ranks\[-1\]` of"),
    ],
)
def test_nothing_to_draw_raises(draw, nothing, expected):
    with pytest.raises(ValueError, match=expected):
        draw(nothing)
