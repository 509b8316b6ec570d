"""Compression that looks at what layers are given."""

import io

import keras
import numpy as np
import pytest
import rich.console
from keras import ops

import keras_spectral as ks
from keras_spectral.kernels import kernel_view

QUIET = rich.console.Console(quiet=True)
RNG = np.random.default_rng(0)
# Inputs that lie near a few directions, away from 0.
MIX = RNG.normal(size=(32, 32)) * 0.7 ** np.arange(32)
X = np.float32(RNG.normal(size=(256, 32)) @ MIX.T + 0.5)


def _model(depth=4, bias=True, activation="relu"):
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(32, activation, use_bias=bias, name=f"layer_{i}")
        for i in range(depth)
    ]
    model = keras.Sequential([keras.Input((32,)), *layers])
    for layer in layers if bias else ():
        layer.bias.assign(RNG.normal(size=32) / 10)
    return model


def _out(model, x=X):
    return np.float64(ops.convert_to_numpy(model(x)))


def _error(model, small, x=X):
    wanted = _out(model, x)
    return np.linalg.norm(_out(small, x) - wanted) / np.linalg.norm(wanted)


def _report(small):
    return ks.compression_report(small, QUIET).layers


@pytest.mark.parametrize("method", ["uniform", "energy", "global", "alds"])
def test_outputs_change_less_than_by_the_plain_svd(method):
    model = _model(1)
    options = {"ratio": 0.6, "method": method}
    plain = ks.compress_model(model, **options)
    small = ks.compress_model(model, calibration=X, **options)
    assert plain.count_params() >= small.count_params()
    errors = [_error(model, x) for x in (plain, small)]
    assert errors[1] < 0.5 * errors[0]


def test_the_report_says_how_far_the_outputs_are():
    model = _model(1, activation=None)
    (layer,) = model.layers
    for option in (True, False):
        small = ks.compress_model(
            model, 0.6, calibration=X, compensate_bias=option
        )
        (row,) = _report(small)
        kernel, bias = layer.kernel.numpy(), layer.bias.numpy()
        wanted = X @ kernel
        if option:
            wanted = wanted - wanted.mean(axis=0)
        left = np.linalg.norm(_out(small) - X @ kernel - bias)
        left /= np.linalg.norm(wanted)
        np.testing.assert_allclose(row.error, left, rtol=1e-3)
        same = np.array_equal(small.layers[0].bias.numpy(), bias)
        assert same is not option
    console = rich.console.Console(width=120, file=io.StringIO())
    assert ks.compression_report(small, console).measure == "outputs"
    assert "of the outputs" in " ".join(console.file.getvalue().split())


def test_a_bias_takes_up_the_mean():
    model = _model(1, activation=None)
    options = {"ratio": 0.7, "calibration": X, "method": "uniform"}
    small = ks.compress_model(model, **options)
    np.testing.assert_allclose(
        _out(small).mean(axis=0), _out(model).mean(axis=0), atol=1e-3
    )
    other = ks.compress_model(model, compensate_bias=False, **options)
    assert _error(model, small) < _error(model, other)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_after_layer_is_better_than_all_at_once(bias):
    model = _model(4, bias)
    options = {"ratio": 0.6, "method": "uniform", "calibration": X}
    before = [w.numpy().copy() for w in model.weights]
    first = ks.compress_model(model, **options)
    small = ks.compress_model(model, sequential=True, **options)
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, new.numpy())
    assert _error(model, small) < 0.95 * _error(model, first)
    assert small.count_params() == first.count_params()
    whole = ks.compress_model(
        model, sequential=True, batch_size=len(X), **options
    )
    np.testing.assert_allclose(_out(whole), _out(small), atol=2e-3)
    assert all(0 < row.error < 1 for row in _report(small))


@pytest.mark.once
def test_layers_are_fitted_to_what_they_get():
    """Two linear layers, each by least squares in numpy."""
    model = _model(2, activation=None)
    small = ks.compress_model(
        model, 0.6, method="uniform", calibration=X, sequential=True
    )
    before, after = np.float64(X), np.float64(X)
    for layer, pair in zip(model.layers, small.layers):
        kernel = np.float64(layer.kernel.numpy())
        wanted = before @ kernel + layer.bias.numpy()
        left = after - after.mean(axis=0)
        between = (before - before.mean(axis=0) + left) / 2
        best = np.linalg.lstsq(left, between @ kernel, rcond=None)[0]
        _, _, vt = np.linalg.svd(left @ best, full_matrices=False)
        v = vt[: pair.down.units].T
        after = left @ best @ v @ v.T + wanted.mean(axis=0)
        before = wanted
    got = _out(small)
    scale = np.linalg.norm(before - before.mean(axis=0))
    # But for the damping.
    assert np.linalg.norm(got - after) < 2e-2 * scale
    assert np.linalg.norm(got - before) < 1.02 * np.linalg.norm(after - before)


@keras.saving.register_keras_serializable("calibrated_test")
class _Block(keras.layers.Layer):
    """Layers with one input, in a layer of its own, in another order."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.last = keras.layers.Dense(16, name="last")
        self.query = keras.layers.EinsumDense(
            "abc,cde->abde", (None, 4, 4), bias_axes="de", name="query"
        )
        self.key = keras.layers.EinsumDense(
            "abc,cde->abde", (None, 4, 4), name="key"
        )

    def build(self, shape):
        for layer in (self.last, self.query, self.key):
            layer.build(shape)

    def call(self, x):
        query, key = self.query(x), self.key(x)
        scores = ops.softmax(ops.einsum("btnh,bsnh->bnts", query, key))
        mixed = ops.einsum("bnts,bsnh->btnh", scores, query)
        return x + self.last(ops.reshape(mixed, ops.shape(x)))


def _attending(mask=False):
    keras.utils.set_random_seed(0)
    x = keras.Input((6, 16), name="x")
    inputs = {"x": x}
    outputs = x
    for i in range(2):
        outputs = _Block(name=f"block_{i}")(outputs)
    if mask:
        inputs["padding_mask"] = keras.Input((6,), name="padding_mask")
        column = keras.layers.Reshape((6, 1))(inputs["padding_mask"])
        outputs = keras.layers.Multiply()([outputs, column])
    return keras.Model(inputs, outputs)


def test_layers_inside_of_others():
    model = _attending()
    x = {"x": RNG.normal(size=(64, 6, 16)).astype("float32")}
    wanted, errors = _out(model, x), []
    for options in (
        {},
        {"calibration": x},
        {"calibration": x, "sequential": True},
    ):
        small = ks.compress_model(model, 0.5, method="uniform", **options)
        errors.append(np.linalg.norm(_out(small, x) - wanted))
    assert errors[0] > errors[1] > errors[2]
    assert isinstance(small.get_layer("block_0").query, ks.LowRank)


@pytest.mark.once
def test_layers_of_one_input_share_a_pass(monkeypatch):
    from keras_spectral.compression import sequential

    runs = []
    run = sequential._run

    def counted(model, batch, members):
        runs.append([m.fit.view.layer.name for m in members])
        run(model, batch, members)

    monkeypatch.setattr(sequential, "_run", counted)
    x = {"x": RNG.normal(size=(64, 6, 16)).astype("float32")}
    options = {"method": "uniform", "calibration": x, "sequential": True}
    ks.compress_model(_attending(), 0.5, **options)
    pair = ["query", "key"], ["last"]
    assert runs == [pair[0], pair[0], pair[1], pair[1]] * 2
    del runs[:]
    ks.compress_model(_attending(), 0.5, batch_size=64, **options)
    assert len(runs) == 1


@pytest.mark.parametrize("sequential", [False, True])
def test_masked_tokens_do_not_count(sequential):
    model = _attending(mask=True)
    x = RNG.normal(size=(64, 6, 16)).astype("float32")
    mask = np.ones((64, 6), "float32")
    mask[:, 4:] = 0
    found = []
    for noise in (0, 100):
        noisy = x.copy()
        noisy[:, 4:] += noise * RNG.normal(size=(64, 2, 16))
        # The block attends to all, so only the first layers see masks alone.
        data = {"x": noisy, "padding_mask": mask}
        small = ks.compress_model(
            model,
            0.5,
            method="uniform",
            target="block_0/(query|key)",
            calibration=data,
            sequential=sequential,
        )
        pair = small.get_layer("block_0").key
        found.append(ops.convert_to_numpy(kernel_view(pair).matrix()))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def _convolutions():
    """A model, and images that are smooth."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.Conv2D(16, 3, strides=2),
            layers.Conv2D(8, 1),
            layers.Flatten(),
            layers.Dense(10, name="head"),
        ]
    )
    rough = RNG.normal(size=(64, 2, 2, 4)).repeat(4, axis=1).repeat(4, axis=2)
    return model, rough.astype("float32")


def test_convolutions_and_saving(tmp_path):
    model, x = _convolutions()
    errors = []
    for options in (
        {},
        {"calibration": x},
        {"calibration": (x, np.zeros(64)), "sequential": True},
    ):
        options |= {"method": "uniform", "exclude": "head"}
        small = ks.compress_model(model, 0.5, **options)
        errors.append(_error(model, small, x))
    assert errors[1] < 0.7 * errors[0] and errors[2] < errors[1]
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(_out(again, x), _out(small, x), atol=1e-6)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="no grouped convolution with gradients there",
)
def test_grouped_convolutions():
    keras.utils.set_random_seed(0)
    conv = keras.layers.Conv1D(12, 3, groups=2)
    model = keras.Sequential([keras.Input((9, 8)), conv])
    x = RNG.normal(size=(64, 9, 8)) * 0.5 ** np.arange(8)
    x = (x @ RNG.normal(size=(8, 8))).astype("float32")
    options = {"ratio": 0.5, "method": "uniform"}
    errors = [
        _error(model, ks.compress_model(model, **options, **more), x)
        for more in ({}, {"calibration": x, "sequential": True})
    ]
    assert errors[1] < 0.9 * errors[0]


def test_what_calibrate_gives_is_taken_as_well():
    model = _model(2)
    found = ks.calibrate(model, X, "all")
    options = {"ratio": 0.5, "method": "global"}
    first = ks.compress_model(model, calibration=X, **options)
    second = ks.compress_model(model, calibration=found, **options)
    np.testing.assert_allclose(_out(first), _out(second), atol=1e-5)


def test_layers_that_calibrate_has_not_seen_stay():
    model = _model(3)
    found = ks.calibrate(model, X, ["layer_0", "layer_2"])
    small = ks.compress_model(model, 0.5, calibration=found)
    kinds = [isinstance(layer, ks.LowRank) for layer in small.layers]
    assert kinds == [True, False, True]


def test_tables_are_truncated_as_without_data():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(50, 16, name="table"),
            keras.layers.Dense(16, name="one"),
        ]
    )
    x = RNG.integers(0, 50, (64, 5)).astype("int32")
    for sequential in (False, True):
        small = ks.compress_model(
            model,
            0.4,
            target="all",
            method="uniform",
            calibration=x,
            sequential=sequential,
        )
        table = ks.compress_model(model, 0.4, target="table", method="uniform")
        pair, plain = (m.layers[0] for m in (small, table))
        rank = pair.down.output_dim
        assert isinstance(pair, ks.LowRank)
        got = ops.convert_to_numpy(kernel_view(pair).matrix())
        kernel = ops.convert_to_numpy(model.layers[0].embeddings)
        u, s, vt = np.linalg.svd(kernel, full_matrices=False)
        low = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(got, low, atol=1e-4)
        assert isinstance(plain, ks.LowRank)


def test_a_single_batch_in_mixed_precision():
    """Its layers are solved while the model runs and casts its variables."""
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(32, activation, dtype="mixed_bfloat16")
        for activation in ("relu", "relu", None)
    ]
    model = keras.Sequential([keras.Input((32,)), *layers])
    options = {"calibration": X, "sequential": True, "method": "uniform"}
    small, whole = (
        ks.compress_model(model, 0.5, batch_size=size, **options)
        for size in (8, len(X))
    )
    errors = _error(model, small), _error(model, whole)
    assert errors[0] < 0.7
    np.testing.assert_allclose(*errors, rtol=0.05)
    for one, other in zip(_report(small), _report(whole)):
        assert one.rank == other.rank
        np.testing.assert_allclose(one.error, other.error, rtol=0.05)


def test_a_layer_of_several_calls_has_one_pair():
    keras.utils.set_random_seed(0)
    shared = keras.layers.Dense(32, "tanh", name="shared")
    inputs = keras.Input((32,))
    outputs = keras.layers.Dense(8, name="last")(shared(shared(inputs)))
    model = keras.Model(inputs, outputs)
    small = ks.compress_model(
        model, 0.5, calibration=X, sequential=True, method="uniform"
    )
    plain = ks.compress_model(model, 0.5, method="uniform")
    assert _error(model, small) < _error(model, plain)
    first = ks.compress_model(model, 0.5, calibration=X, method="uniform")
    pairs = [m.get_layer("shared").down.kernel.numpy() for m in (small, first)]
    np.testing.assert_array_equal(*pairs)


@pytest.mark.once
def test_recovery_after_calibration():
    model = _model(2)
    small = ks.compress_model(
        model,
        0.4,
        calibration=X,
        sequential=True,
        method="uniform",
        recover="lora",
        recover_rank=2,
    )
    before = _error(model, small)
    distiller = ks.distiller(small, model, label_weight=0)
    distiller.compile(keras.optimizers.Adam(3e-3))
    distiller.fit(X, epochs=10, verbose=0)
    assert _error(model, small) < before
    ks.finalize_transfer(small)


def test_sensitivity_keeps_rank_where_outputs_hang_on_it():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = keras.Input((32,))
    loud = layers.Dense(32, name="loud")(x)
    quiet = layers.Rescaling(0.1)(layers.Dense(32, name="quiet")(x))
    model = keras.Model(x, layers.Add()([loud, quiet]))
    before = [w.numpy().copy() for w in model.weights]
    options = {"ratio": 0.6, "calibration": X}
    small = ks.compress_model(model, method="sensitivity", **options)
    ranks = {row.path: row.rank or 32 for row in _report(small)}
    assert ranks["loud"] > ranks["quiet"] + 2
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, new.numpy())
    other = ks.compress_model(model, method="uniform", **options)
    assert _error(model, small) < 0.7 * _error(model, other)


def test_sensitivity_slices_convolutions_and_loses_least():
    model, x = _convolutions()
    options = {"ratio": 0.3, "calibration": x, "exclude": "head"}
    options["max_slices"] = 16
    small = ks.compress_model(model, **options)
    least = _error(model, small, x)
    assert any(row.slices > 1 for row in _report(small))
    for method in ("uniform", "energy", "global", "alds"):
        other = ks.compress_model(model, method=method, **options)
        assert least < 1.0001 * _error(model, other, x)


class _NaN(keras.layers.Layer):
    def call(self, x):
        return x + np.nan


class _OtherWay(keras.layers.Layer):
    """Puts time first."""

    def call(self, x):
        return ops.swapaxes(x, 0, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sequential": True}, "sequential=True without `calibration`"),
        ({"method": "sensitivity"}, "'sensitivity' without `calibration`"),
        ({"calibration": X[:0]}, "calibration.*at least one example"),
        ({"calibration": []}, "calibration.*at least one example"),
        ({"calibration": X[:, :5]}, "cannot be run on `calibration`"),
        ({"calibration": X, "sequential": 1}, "sequential=1"),
        ({"calibration": X, "compensate_bias": "no"}, "compensate_bias='no'"),
        ({"calibration": X, "batch_size": 0}, "batch_size=0"),
        ({"calibration": "found", "sequential": True}, "data themselves"),
        ({"calibration": "found", "method": "sensitivity"}, "data themselves"),
        ({"calibration": "other"}, "is of 16 inputs, and its kernel takes 32"),
        ({"calibration": "less", "target": "all"}, "no layer 'layer_1'"),
    ],
)
def test_what_it_refuses(options, match):
    model = _model(2)
    layers = [keras.layers.Dense(16, name=f"layer_{i}") for i in range(2)]
    other = keras.Sequential([keras.Input((16,)), *layers])
    if isinstance(options.get("calibration"), str):
        found = {
            "found": lambda: ks.calibrate(model, X, "all"),
            "less": lambda: ks.calibrate(model, X, "layer_0"),
            "other": lambda: ks.calibrate(other, X[:, :16], "all"),
        }[options["calibration"]]()
        options = {**options, "calibration": found}
    with pytest.raises(ValueError, match=match):
        ks.compress_model(model, 0.5, **options)
    assert all(isinstance(x, keras.layers.Dense) for x in model.layers)


def test_activations_that_are_not_finite_name_the_layer():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((32,)),
            layers.Dense(32, name="good"),
            _NaN(),
            layers.Dense(32, name="bad"),
        ]
    )
    with keras.saving.custom_object_scope({"_NaN": _NaN}):
        with pytest.raises(ValueError, match="'bad' is given on .* holds NaN"):
            ks.compress_model(model, 0.5, calibration=X)


def test_few_rows_are_noted():
    model = _model(2)
    with pytest.warns(UserWarning, match="2 of 2 layers .* 10 rows and 32"):
        small = ks.compress_model(
            model, 0.5, calibration=X[:10], sequential=True
        )
    assert np.isfinite(_out(small)).all()


def test_examples_that_are_not_rows_are_refused():
    model = keras.Sequential(
        [
            keras.Input((6, 16)),
            _OtherWay(),
            keras.layers.Dense(16, name="turned"),
        ]
    )
    x = RNG.normal(size=(64, 6, 16)).astype("float32")
    options = {"calibration": x, "target": "turned"}
    with keras.saving.custom_object_scope({"_OtherWay": _OtherWay}):
        with pytest.raises(ValueError, match="'turned'.*batch as first axis"):
            ks.compress_model(model, 0.5, sequential=True, **options)
        ks.compress_model(model, 0.5, **options)
