import keras
import layer_cases
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral._internal.linalg import truncated_svd
from keras_spectral.compression.pairs import low_rank_layer
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view

pytestmark = pytest.mark.compiled
ON_TORCH = keras.backend.backend() == "torch"
CASES = pytest.mark.parametrize(
    "case",
    layer_cases.on_this_backend(layer_cases.ALL),
    ids=lambda case: case.name,
)


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model():
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(32, "relu", name="one"),
        keras.layers.Dense(32, "relu", name="two"),
        keras.layers.Dense(4, name="head"),
    ]
    return keras.Sequential([keras.Input((24,)), *layers])


def _small():
    return ks.compress_model(_model(), 0.3, method="uniform", exclude="head")


def _data(count=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 24)).astype("float32")
    return x, x @ rng.normal(size=(24, 4)).astype("float32")


def _pairs(model):
    return [x for x in model.layers if isinstance(x, LowRank)]


def _thin(case, slices=1):
    """A pair for a layer, and its factors."""
    keras.utils.set_random_seed(0)
    layer = case.make()
    layer(case.inputs())
    view = kernel_view(layer)
    u, s, v = truncated_svd(view.parts(view.matrix(), slices), view.max_rank)
    a, b = u * s[..., None, :], ops.swapaxes(v, -1, -2)
    return view, a, b, low_rank_layer(view, a, b)


@CASES
def test_fewer_codes_are_a_pair_of_lower_rank(case):
    view, a, b, thin = _thin(case)
    x = case.inputs()
    assert thin.rank == a.shape[-1]
    for rank in {1, (thin.rank + 1) // 2}:
        thin.active_rank = rank
        lower = low_rank_layer(view, a[..., :rank], b[..., :rank, :])
        np.testing.assert_allclose(
            _numpy(thin(x)), _numpy(lower(x)), atol=1e-5, rtol=1e-5
        )
        matrices = [_numpy(kernel_view(y).matrix()) for y in (thin, lower)]
        np.testing.assert_allclose(*matrices, atol=1e-5)
        for got, wanted in zip(kernel_view(thin).pair(), (a, b[..., :rank, :])):
            wanted = wanted[..., : got.shape[-1]]
            np.testing.assert_allclose(_numpy(got), _numpy(wanted), atol=1e-5)
        narrow = kernel_view(thin)
        finished = low_rank_layer(narrow, *narrow.pair())
        assert finished.rank == rank
        np.testing.assert_allclose(
            _numpy(finished(x)), _numpy(lower(x)), atol=1e-5, rtol=1e-5
        )
    thin.active_rank = None
    np.testing.assert_allclose(
        _numpy(thin(x)), _numpy(view.layer(x)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("slices", [2, 4])
def test_each_slice_keeps_its_first_codes(slices):
    keras.utils.set_random_seed(0)
    layer = keras.layers.Conv2D(6, 3, padding="same")
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 8)).astype("float32")
    layer(x)
    view = kernel_view(layer)
    u, s, v = truncated_svd(view.parts(view.matrix(), slices), 3)
    a, b = u * s[..., None, :], ops.swapaxes(v, -1, -2)
    thin, lower = low_rank_layer(view, a, b), None
    lower = low_rank_layer(view, a[..., :2], b[..., :2, :])
    thin.active_rank = 2
    np.testing.assert_allclose(_numpy(thin(x)), _numpy(lower(x)), atol=1e-5)
    matrices = [_numpy(kernel_view(y).matrix()) for y in (thin, lower)]
    np.testing.assert_allclose(*matrices, atol=1e-5)


@CASES
def test_a_step_draws_its_codes(case):
    """Each drawn output is that of some rank; all ranks from low to whole."""
    _, _, _, thin = _thin(case)
    config = thin.get_config() | {"lowest": 0.5, "whole": 0.3, "seed": 3}
    drawing = LowRank.from_config(config)
    x = case.inputs()
    drawing(x)
    for new, old in zip(drawing.weights, thin.weights):
        new.assign(old)
    np.testing.assert_array_equal(_numpy(drawing(x)), _numpy(thin(x)))
    known = {}
    for rank in range(1, thin.rank + 1):
        thin.active_rank = rank
        known[rank] = _numpy(thin(x))
    found = set()
    for _ in range(12):
        got = _numpy(drawing(x, training=True))
        gaps = {r: np.abs(got - y).max() for r, y in known.items()}
        nearest = min(gaps, key=gaps.get)
        assert gaps[nearest] < 1e-4 * (1 + np.abs(got).max())
        found.add(nearest)
    assert min(found) >= thin.rank / 2 and thin.rank in found
    assert len(found) > 1 or thin.rank < 3


def test_all_layers_draw_alike():
    small = ks.nest_ranks(_small(), lowest=0.0, whole=0.0, seed=1)
    one, two = _pairs(small)
    draws = []
    for _ in range(20):
        pair = [
            float(ops.sum(layer._drawn(ops.ones((1, layer.rank))))) / layer.rank
            for layer in (one, two)
        ]
        assert abs(pair[0] - pair[1]) < 1.01 / min(one.rank, two.rank)
        draws.append(pair[0])
    assert len(set(draws)) > 3
    again = ks.nest_ranks(_small(), lowest=0.0, whole=0.0)
    seeds = {layer.seed for layer in _pairs(again)}
    assert len(seeds) == 1 and None not in seeds


def test_training_at_several_ranks_helps_the_lower_ones():
    x, y = _data(256)
    losses = {}
    for nested in (False, True):
        small = _small()
        if nested:
            small = ks.nest_ranks(small, lowest=0.2, seed=0)
        small.compile(keras.optimizers.Adam(0.01), "mse")
        small.fit(x, y, epochs=40, batch_size=64, verbose=0, shuffle=False)
        for share in (0.25, 1.0):
            ks.set_rank(small, share)
            losses[nested, share] = small.evaluate(x, y, verbose=0)
    assert losses[True, 0.25] < 0.5 * losses[False, 0.25]
    assert losses[True, 1.0] < losses[True, 0.25]


def test_compiled_models_follow():
    small = _small()
    x, y = _data()
    small.compile(keras.optimizers.SGD(0.01), "mse")
    whole = small.predict(x, verbose=0)
    traces = []
    layer = small.get_layer("one")
    call = layer.call
    layer.call = lambda *args, **kwargs: (
        traces.append(1) or call(*args, **kwargs)
    )
    ks.set_rank(small, 0.5)
    half = small.predict(x, verbose=0)
    assert not np.allclose(half, whole)
    np.testing.assert_allclose(half, _numpy(small(x)), atol=1e-5)
    count = len(traces)
    small.predict(x, verbose=0)
    if not ON_TORCH:
        assert len(traces) == count  # traced once for the new rank
    before = _numpy(layer.down.kernel)
    small.fit(x, y, verbose=0)
    rank = layer.active_rank
    after = _numpy(layer.down.kernel)
    np.testing.assert_array_equal(after[:, rank:], before[:, rank:])
    assert not np.allclose(after[:, :rank], before[:, :rank])
    ks.set_rank(small, 1.0)
    assert layer.active_rank == layer.rank
    _, y = _data()
    small.fit(x, y, verbose=0)
    assert not np.allclose(_numpy(layer.down.kernel)[:, rank:], after[:, rank:])


def test_ranks_are_saved_and_finished(tmp_path):
    small = ks.nest_ranks(_small(), lowest=0.3, whole=0.4, seed=7)
    x, y = _data()
    ks.set_rank(small, 0.4)
    wanted = small.predict(x, verbose=0)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(again.predict(x, verbose=0), wanted)
    layer = again.get_layer("one")
    assert (layer.lowest, layer.whole, layer.seed) == (0.3, 0.4, 7)
    matrix = _numpy(kernel_view(layer).matrix())
    np.testing.assert_allclose(_numpy(layer.kernel), matrix, atol=1e-5)
    whole = again.count_params()
    assert ks.finalize_ranks(again) is again
    np.testing.assert_allclose(again.predict(x, verbose=0), wanted, atol=1e-5)
    assert again.count_params() < 0.7 * whole
    layer = again.get_layer("one")
    assert layer.lowest is None and layer.active_rank is None
    again.compile("adam", "mse")
    again.fit(x, y, verbose=0)


def test_a_trained_optimizer_keeps_to_the_new_layers():
    small = _small()
    x, y = _data()
    small.compile("adam", "mse")
    small.fit(x, y, verbose=0)
    outputs = small.predict(x, verbose=0)
    ks.nest_ranks(small, seed=0)
    np.testing.assert_array_equal(small.predict(x, verbose=0), outputs)
    small.fit(x, y, epochs=2, verbose=0)
    assert all(layer.lowest == 0.25 for layer in _pairs(small))


def test_what_was_set_before_stays():
    small = _small()
    ks.set_rank(small, 0.5)
    small.get_layer("one").trainable = False
    ranks = [layer.active_rank for layer in _pairs(small)]
    for function in (ks.nest_ranks, ks.finalize_ranks):
        function(small)
        one, two = _pairs(small)
        assert not one.trainable_weights and two.trainable_weights
        if function is ks.nest_ranks:
            assert [one.active_rank, two.active_rank] == ranks
        else:
            assert [one.rank, two.rank] == ranks


def test_adapters_stand_on_the_codes_in_use():
    small = ks.compress_model(
        _model(), 0.3, method="uniform", exclude="head", recover="lora"
    )
    x, y = _data()
    ks.set_rank(small, 0.5)
    for function in (ks.nest_ranks, ks.finalize_ranks):
        with pytest.raises(ValueError, match="has adapters"):
            function(small)
    small.compile("adam", "mse")
    small.fit(x, y, verbose=0)
    wanted = small.predict(x, verbose=0)
    small = ks.finalize_transfer(small)
    np.testing.assert_allclose(small.predict(x, verbose=0), wanted, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), "half", True])
def test_bad_shares(share):
    small = _small()
    with pytest.raises(ValueError, match="share="):
        ks.set_rank(small, share)
    assert small.get_layer("one").active_rank is None


@pytest.mark.once
def test_what_cannot_be_nested():
    for function in (ks.nest_ranks, ks.finalize_ranks):
        with pytest.raises(ValueError, match="has no LowRank layers"):
            function(_model())
        with pytest.raises(ValueError, match="Received a list"):
            function([1])
    with pytest.raises(ValueError, match="has no LowRank layers"):
        ks.set_rank(_model(), 0.5)
    for options in ({"lowest": 1.0}, {"whole": 1.0}, {"seed": 0.5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ks.nest_ranks(_small(), **options)
    small = _small()
    small.get_layer("one").down.quantize("int8")
    with pytest.raises(ValueError, match="quantised.*finalize_ranks"):
        ks.set_rank(small, 0.5)
