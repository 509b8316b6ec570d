import io

import keras
import numpy as np
import pytest
import rich.console

import keras_spectral as ks
from keras_spectral.compression import latency
from keras_spectral.compression.costs import fast_slicings
from keras_spectral.compression.latency import Timer
from keras_spectral.kernels import LowRank
from keras_spectral.kernels import kernel_view

QUIET = rich.console.Console(file=io.StringIO())


def _model(size=8):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Conv2D(16, 3, padding="same", name="one"),
        keras.layers.Conv2D(16, 3, padding="same", name="two"),
        keras.layers.Conv2D(16, 3, padding="same", name="three"),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(10, name="head"),
    ]
    return keras.Sequential([keras.Input((size, size, 16)), *layers])


@pytest.fixture
def clock(monkeypatch):
    """What was timed, by the formula of all tests."""
    timed, formula = [], latency.milliseconds

    def milliseconds(layer, shape):
        timed.append((layer, shape))
        return formula(layer, shape)

    monkeypatch.setattr(latency, "milliseconds", milliseconds)
    return timed


@pytest.mark.timed
def test_layers_take_time():
    view = kernel_view(_model().layers[0])
    timer = Timer(4)
    assert timer.whole(view) > 0 and timer.pair(view, 2, 4) > 0
    dense = keras.layers.Dense(8)
    dense.build((16,))
    view = kernel_view(dense)
    assert timer.whole(view) > 0 and timer.pair(view, 2) > 0
    embedding = keras.layers.Embedding(20, 8)
    embedding.build((None, 3))
    view = kernel_view(embedding)
    assert timer.whole(view) > 0 and timer.pair(view, 2) > 0


@pytest.mark.timed
def test_models_take_time():
    layers = [keras.layers.Dense(1024, name="wide"), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((1024,)), *layers])
    options = {"measure": "latency", "batch_size": 1024}
    # Far from what can be had, so that a busy machine cannot hide it.
    small = ks.compress_model(model, 0.1, method="energy", **options)
    assert isinstance(small.get_layer("wide"), LowRank)
    report = ks.compression_report(small, QUIET)
    assert min(report.milliseconds) > 0
    assert all(0 < ms < 10_000 for ms in report.latencies.values())


def test_equal_layers_are_timed_once(clock):
    model = _model()
    small = ks.compress_model(
        model, 0.5, method="energy", measure="latency", batch_size=4
    )
    wholes = [x for x, _ in clock if not isinstance(x, LowRank)]
    assert len(wholes) == 2  # a convolution and the head
    assert {shape for _, shape in clock} == {(4, 8, 8, 16), (4, 16)}
    report = ks.compression_report(small, QUIET)
    count = len(clock)
    ks.compress_model(
        model,
        0.5,
        method="energy",
        measure="latency",
        batch_size=4,
        latencies=report.latencies,
    )
    assert len(clock) == count
    ks.compress_model(model, 0.5, method="energy", latencies={})
    assert len(clock) > count  # another batch size


@pytest.mark.parametrize("method", ["uniform", "energy", "global", "alds"])
def test_time_is_the_budget(clock, method):
    model = _model()
    small = ks.compress_model(model, 0.5, method=method, measure="latency")
    report = ks.compression_report(small, QUIET)
    before, after = report.milliseconds
    np.testing.assert_allclose(before, (3 * 2320 + 170) / 1000)
    assert 0.3 * before < after <= 0.5 * before + 1e-9
    for row in report.layers:
        if row.rank is not None:
            assert row.milliseconds[1] < row.milliseconds[0]
    text = io.StringIO()
    rich.console.Console(width=120, file=text).print(report)
    assert "% less time" in text.getvalue() and " ms " in text.getvalue()
    asked = ks.compress_model(model, budget=3.0, measure="latency")
    assert ks.compression_report(asked, QUIET).milliseconds[1] <= 3


def _time_by_name(monkeypatch, milliseconds):
    """Times of layers of one shape are kept apart."""
    monkeypatch.setattr(latency, "milliseconds", milliseconds)
    monkeypatch.setattr(
        latency,
        "_key",
        lambda view, shape, *pair: f"{view.layer.name} {shape} {pair}",
    )


def test_layers_that_no_pair_makes_faster_stay(clock, monkeypatch):
    slow = latency.milliseconds

    def milliseconds(layer, shape):
        pair = isinstance(layer, LowRank) and layer.name == "two"
        return 100.0 if pair else slow(layer, shape)

    _time_by_name(monkeypatch, milliseconds)
    for measure, ratio in (("latency", 0.3), ("weights", 0.6)):
        small = ks.compress_model(_model(), ratio, measure=measure)
        assert not isinstance(small.get_layer("two"), LowRank)
        assert isinstance(small.get_layer("one"), LowRank)
    # Where a goal cannot be met without it, it is compressed as well.
    for goal in ({"ratio": 0.8}, {"max_error": 0.9}):
        small = ks.compress_model(_model(), **goal)
        assert isinstance(small.get_layer("two"), LowRank)


def test_a_layer_that_seemed_slow_is_judged_again(clock, monkeypatch):
    """Pairs of a larger rank are timed later, and the layer beside them."""
    formula, wholes = latency.milliseconds, []

    def milliseconds(layer, shape):
        if isinstance(layer, LowRank):
            return 3.0 if layer.name == "two" else 0.01
        wholes.append(layer.name)
        slow = layer.name == "two" and wholes.count("two") < 3
        return 50.0 if slow else formula(layer, shape)

    _time_by_name(monkeypatch, milliseconds)
    small = ks.compress_model(_model(), 0.045, target=["two", "head"])
    assert wholes.count("two") >= 3
    assert not isinstance(small.get_layer("two"), LowRank)
    assert isinstance(small.get_layer("head"), LowRank)


@pytest.mark.parametrize("method", ["uniform", "energy", "global", "alds"])
def test_an_error_is_kept_where_pairs_are_slow(clock, monkeypatch, method):
    fast = latency.milliseconds

    def milliseconds(layer, shape):
        pair = isinstance(layer, LowRank)
        return (2 if pair else 1) * fast(layer, shape)

    monkeypatch.setattr(latency, "milliseconds", milliseconds)
    for goal in ({"max_error": 0.6}, {"ratio": 0.6}):
        small = ks.compress_model(_model(), method=method, **goal)
        rows = ks.compression_report(small, QUIET).layers
        if "ratio" in goal:
            assert any(row.rank for row in rows)
        if "max_error" in goal:
            assert max(row.bound for row in rows) <= 0.6


def test_slices_have_to_be_fast(clock):
    view = kernel_view(_model().layers[0])
    # A pair of rank r and n slices: r (144 + 16 n) weights, times n slices.
    found = fast_slicings(view, view.slicings(), Timer(2))
    assert found[1] is not None and set(found) == {1, 2, 4}
    assert 2 * found[2] * (144 + 32) <= 0.9 * 2320
    small = ks.compress_model(_model(), 0.5)
    for row in ks.compression_report(small, QUIET).layers:
        assert row.slices <= 4
        if row.rank is not None:
            limit = found[row.slices] if row.kind == "Conv2D" else 10
            assert row.rank <= limit
    forced = ks.compress_model(_model(), 0.5, max_slices=16)
    rows = ks.compression_report(forced, QUIET).layers
    assert max(row.slices for row in rows) > 4
    plain = ks.compress_model(_model(), 0.5, max_slices=1)
    rows = ks.compression_report(plain, QUIET).layers
    assert {row.slices for row in rows} == {1}


@pytest.mark.once
def test_sizes_that_are_open(clock):
    model = _model(None)
    small = ks.compress_model(model, 0.5)
    rows = ks.compression_report(small, QUIET).layers
    assert {row.slices for row in rows} == {1}
    assert {len(shape) for _, shape in clock} == {2}  # the head's
    with pytest.raises(ValueError, match=r"'one'.*unknown_size"):
        ks.compress_model(model, 0.5, measure="latency")
    small = ks.compress_model(model, 0.5, measure="latency", unknown_size=6)
    assert (32, 6, 6, 16) in {shape for _, shape in clock}
    assert ks.compression_report(small, QUIET).milliseconds is not None


@pytest.mark.once
def test_operations_are_the_budget():
    inputs = keras.Input((16, 16, 8))
    x = keras.layers.Conv2D(16, 3, name="large")(inputs)
    x = keras.layers.Conv2D(32, 3, strides=8, name="small")(x)
    model = keras.Model(inputs, keras.layers.Flatten()(x))
    found = {}
    for measure in ("weights", "flops"):
        small = ks.compress_model(
            model, 0.6, method="uniform", measure=measure, max_slices=1
        )
        report = ks.compression_report(small, QUIET)
        assert report.milliseconds is None
        found[measure] = report.flops[1] / report.flops[0]
    assert found["flops"] <= 0.4
    budget = 0.5 * report.flops[0]
    small = ks.compress_model(model, budget=budget, measure="flops")
    assert ks.compression_report(small, QUIET).flops[1] <= budget


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"measure": "size"}, "measure='size'"),
        ({"max_slices": 0}, "max_slices=0"),
        ({"unknown_size": -1}, "unknown_size=-1"),
        ({"measure": "flops", "budget": 1.0}, "FLOPs are left"),
    ],
)
def test_bad_options(options, match):
    goal = {} if "budget" in options else {"ratio": 0.5}
    with pytest.raises(ValueError, match=match):
        ks.compress_model(_model(), **goal, **options)
