import io
import os
import pathlib

import keras
import layer_cases
import numpy as np
import pytest
import rich.console
from elsewhere import outputs_elsewhere
from keras import ops

import keras_spectral as ks
from keras_spectral._internal.linalg import truncated_svd
from keras_spectral.compression import compress
from keras_spectral.compression.pairs import low_rank_layer
from keras_spectral.compression.rules import RULES
from keras_spectral.compression.saved import put_low_rank
from keras_spectral.kernels import kernel_view

QUIET = rich.console.Console(quiet=True)
METHODS = tuple(name for name in RULES if name != "sensitivity")
# Grouped convolutions run but do not train on TensorFlow's CPU.
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
CASES = pytest.mark.parametrize(
    "case",
    layer_cases.on_this_backend(layer_cases.ALL),
    ids=lambda case: case.name,
)
ON_JAX = keras.backend.backend() == "jax"


def _numpy(x):
    return ops.convert_to_numpy(x)


def _pair(view, rank, slices=1):
    u, s, v = truncated_svd(view.parts(view.matrix(), slices), rank)
    return u * s[..., None, :], ops.swapaxes(v, -1, -2)


def _built(case):
    keras.utils.set_random_seed(0)
    layer = case.make()
    layer(case.inputs())
    if getattr(layer, "bias", None) is not None:
        rng = np.random.default_rng(1)
        layer.bias.assign(rng.normal(size=layer.bias.shape))
    return layer


def _image_model():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(16, 3, padding="same", name="first")(inputs)
    x = layers.BatchNormalization(name="norm")(x)
    y = layers.Conv2D(16, 3, padding="same", activation="relu", name="twin")(x)
    x = layers.Add(name="add")([x, y])
    x = layers.Conv2D(24, 3, strides=2, name="down")(x)
    x = layers.Flatten(name="flat")(x)
    outputs = layers.Dense(10, name="head")(x)
    return keras.Model(inputs, outputs, name="image_model")


def _images(count=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 8, 8, 4)).astype("float32")


def _snapshot(model):
    return [w.numpy().copy() for w in model.weights]


@pytest.mark.once
@CASES
def test_full_rank_equals_the_layer(case, tmp_path):
    layer = _built(case)
    view = kernel_view(layer)
    thin = low_rank_layer(view, *_pair(view, view.max_rank))
    x = case.inputs()
    np.testing.assert_allclose(
        _numpy(thin(x)), _numpy(layer(x)), atol=1e-5, rtol=1e-5
    )
    assert thin.compute_output_shape(x.shape) == tuple(layer(x).shape)
    kernels = [kernel_view(half).num_weights for half in (thin.down, thin.up)]
    assert sum(kernels) == view.pair_weights(view.max_rank)
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), thin])
    model.save(tmp_path / "thin.keras")
    again = keras.saving.load_model(tmp_path / "thin.keras")
    np.testing.assert_array_equal(_numpy(again(x)), _numpy(model(x)))


@pytest.mark.once
@CASES
def test_a_low_rank_layer_is_its_matrix(case):
    """Rank 2, against the layer itself with that kernel."""
    layer = _built(case)
    view = kernel_view(layer)
    a, b = _pair(view, min(2, view.max_rank))
    thin = low_rank_layer(view, a, b)
    x = case.inputs()
    got = _numpy(thin(x))
    matrix = kernel_view(thin).matrix()
    view.assign(matrix)
    np.testing.assert_allclose(got, _numpy(layer(x)), atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_of_the_input_channels(slices):
    """Each slice's own truncated SVD, summed, in numpy."""
    keras.utils.set_random_seed(0)
    layer = keras.layers.Conv2D(6, 3, strides=2, padding="same")
    x = _images(2)
    layer(x)
    view = kernel_view(layer)
    assert view.slicings() == [1, 2, 4]
    thin = low_rank_layer(view, *_pair(view, 2, slices))
    kernel = np.float64(layer.kernel.numpy())
    cut = np.zeros_like(kernel)
    width = 4 // slices
    for i in range(slices):
        part = kernel[:, :, i * width : (i + 1) * width]
        u, s, v = np.linalg.svd(part.reshape(-1, 6), full_matrices=False)
        low = (u[:, :2] * s[:2]) @ v[:2]
        cut[:, :, i * width : (i + 1) * width] = low.reshape(part.shape)
    got = _numpy(thin(x))
    layer.kernel.assign(cut)
    np.testing.assert_allclose(got, _numpy(layer(x)), atol=5e-5)
    assert thin.down.kernel.shape == (3, 3, width, 2 * slices)
    assert sum(int(np.prod(w.shape)) for w in thin.weights) == (
        view.pair_weights(2, slices) + 6
    )


@pytest.mark.filterwarnings("ignore:.*have seen fewer rows")
@pytest.mark.parametrize("method", METHODS)
def test_compression_keeps_the_model_and_meets_the_ratio(method):
    model = _image_model()
    model.compile("adam", "mse")
    before, layers = _snapshot(model), list(model.layers)
    expected = model.predict(_images(), verbose=0)
    data = _images() if method == "sensitivity" else None
    small = ks.compress_model(model, ratio=0.4, method=method, calibration=data)
    for old, new in zip(before, _snapshot(model)):
        np.testing.assert_array_equal(old, new)
    assert model.layers == layers and model.optimizer is not None
    np.testing.assert_array_equal(model.predict(_images(), verbose=0), expected)
    report = ks.compression_report(small, QUIET)
    kernels = [np.array(layer.weights) for layer in report.layers]
    kept, left = np.sum(kernels, axis=0)
    assert 0.3 * kept < left <= 0.6 * kept
    assert report.weights == (model.count_params(), small.count_params())
    got = small.predict(_images(), verbose=0)
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert type(small) is type(model)


def test_the_report_is_true():
    model = _image_model()
    small = ks.compress_model(model, max_error=0.5, exclude="head")
    report = ks.compression_report(small, QUIET)
    assert [x.path for x in report.layers] == ["first", "twin", "down"]
    positions = {"first": 64, "twin": 64, "down": 9}
    for layer in report.layers:
        old = kernel_view(model.get_layer(layer.path))
        new = kernel_view(small.get_layer(layer.path))
        assert layer.shape == (old.n_in, old.n_out)
        assert layer.bound <= 0.5
        if layer.rank is not None:
            pair = small.get_layer(layer.path)
            size = pair.down.count_params() + int(np.prod(pair.up.kernel.shape))
            assert layer.weights[1] == size < layer.weights[0]
            assert pair.down.groups == layer.slices
        assert layer.flops == tuple(
            2 * positions[layer.path] * w for w in layer.weights
        )
    matched = [x for x in report.layers if x.slices == 1 and x.rank]
    for layer in matched:
        old = _numpy(kernel_view(model.get_layer(layer.path)).matrix())
        new = _numpy(kernel_view(small.get_layer(layer.path)).matrix())
        for order, stated in ((2, layer.bound), ("fro", layer.error)):
            dropped = np.linalg.norm(old - new, order)
            dropped /= np.linalg.norm(old, order)
            np.testing.assert_allclose(dropped, stated, atol=1e-5)
    assert "factorised" in repr(report)


def test_no_error_is_above_one_and_the_table_says_what_it_is():
    model = _image_model()
    small = ks.compress_model(model, ratio=0.9, max_slices=16)
    report = ks.compression_report(small, QUIET)
    assert max(layer.bound for layer in report.layers) > 1
    assert all(0 < layer.error < 1 for layer in report.layers)
    console = rich.console.Console(width=80, file=io.StringIO())
    console.print(report)
    text = " ".join(console.file.getvalue().split())
    assert "rel." in text and "by the Frobenius norm" in text
    for layer in report.layers:
        assert f"{layer.error:.3f}" in text


def test_the_error_before_a_lora_is_that_of_the_smaller_rank():
    model = _image_model()
    options = {"ratio": 0.4, "method": "energy", "exclude": "head"}
    whole = ks.compress_model(model, **options)
    small = ks.compress_model(model, recover="lora", recover_rank=3, **options)
    found = [ks.compression_report(m, QUIET).layers for m in (whole, small)]
    for before, layer in zip(*found):
        assert layer.bound == before.bound and layer.rank == before.rank
        if layer.rank is None:
            continue
        adapter = small.get_layer(layer.path)
        old = _numpy(kernel_view(model.get_layer(layer.path)).matrix())
        new = _numpy(adapter.view.matrix())
        dropped = np.linalg.norm(old - new) / np.linalg.norm(old)
        np.testing.assert_allclose(dropped, layer.error, atol=1e-5)
        assert layer.error > before.error


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_is_named(bad):
    model = _image_model()
    kernel = model.get_layer("down").kernel
    values = kernel.numpy().copy()
    values[0, 0, 0, 0] = bad
    kernel.assign(values)
    before = _snapshot(model)
    with pytest.raises(ValueError, match="At 'down': .*'down'.* NaN or inf"):
        ks.compress_model(model, 0.5)
    for old, new in zip(before, _snapshot(model)):
        np.testing.assert_array_equal(old, new)
    small = ks.compress_model(model, 0.5, exclude="down")
    assert isinstance(small.get_layer("twin"), ks.LowRank)


def test_a_kernel_that_a_wrapper_holds_is_refused():
    layers = keras.layers
    normalised = layers.SpectralNormalization(layers.Dense(32, name="d"))
    model = keras.Sequential(
        [keras.Input((16,)), normalised, layers.Dense(16, name="last")]
    )
    model(np.ones((2, 16)))
    for target in (None, layers.Dense, ".*/d"):
        with pytest.raises(ValueError, match="SpectralNorm.*exclude"):
            ks.compress_model(model, 0.3, target=target)
    small = ks.compress_model(model, 0.3, exclude=".*/d")
    assert isinstance(small.layers[0], layers.SpectralNormalization)
    assert small.count_params() < model.count_params()


def test_wrappers_that_hold_the_layer_alone_are_compressed():
    layers = keras.layers
    inner = layers.Dense(32, activation="tanh", name="d")
    model = keras.Sequential(
        [keras.Input((3, 16)), layers.TimeDistributed(inner)]
    )
    small = ks.compress_model(model, max_error=0.9)
    assert isinstance(small.layers[0].layer, ks.LowRank)
    report = ks.compression_report(small, QUIET)
    assert report.weights == (model.count_params(), small.count_params())


@keras.saving.register_keras_serializable("compress_test")
class _Borrowing(keras.layers.Dense):
    """Uses a variable of another layer."""

    def build(self, input_shape):
        super().build(input_shape)
        name, lender = self.lent
        self._untrack_variable(getattr(self, name))
        setattr(self, name, getattr(lender(), name))


@keras.saving.register_keras_serializable("compress_test")
class _Sharing(keras.Model):
    """Two layers of one kernel or one bias."""

    def __init__(self, name_shared):
        super().__init__()
        self.name_shared = name_shared
        self.one = keras.layers.Dense(24, name="one")
        self.two = _Borrowing(24, name="two")
        self.two.lent = (name_shared, lambda: self.one)

    def build(self, input_shape):
        self.one.build(input_shape)
        self.two.build(input_shape)

    def call(self, x):
        return self.two(self.one(x))

    def get_config(self):
        return {"name_shared": self.name_shared}


@pytest.mark.parametrize(
    ("name", "match"),
    [("_kernel", "is held by 'two'"), ("bias", "should have")],
)
def test_weights_that_two_layers_share(name, match):
    model = _Sharing(name)
    model.build((None, 24))
    model(np.ones((2, 24)))
    with pytest.raises(ValueError, match=f"{match}.*exclude"):
        ks.compress_model(model, 0.5, target=keras.layers.Dense)


def test_budget_counts_the_whole_model_and_ends_are_kept():
    model = _image_model()
    budget = model.count_params() - 4000
    small = ks.compress_model(model, budget=budget, keep_ends=True)
    assert 0.75 * budget < small.count_params() <= budget
    assert isinstance(small.get_layer("first"), keras.layers.Conv2D)
    assert isinstance(small.get_layer("head"), keras.layers.Dense)


def test_a_copy_has_numbers_of_its_own_and_only_once(monkeypatch):
    """JAX gives buffers away in training; kernels are freed as pairs come."""
    found = []

    def put(model, swaps, config):
        found.extend(layer.kernel for layer in swaps)
        put_low_rank(model, swaps, config)

    monkeypatch.setattr(compress, "put_low_rank", put)
    model = _image_model()
    small = ks.compress_model(model, 0.5, method="uniform", keep_ends=True)
    for name in ("first", "head"):
        for old, new in zip(
            model.get_layer(name).weights, small.get_layer(name).weights
        ):
            assert old.value is not new.value
            np.testing.assert_array_equal(old.numpy(), new.numpy())
    assert found
    for kernel in found:
        value = kernel._value
        assert value is None or value.numel() == 0


def test_chosen_layers_that_stay_whole_have_their_kernels():
    """Kernels of a copy are gone while ranks are chosen."""
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16)])
    model.add(keras.layers.Dense(1, name="whole"))
    old, x = model.get_layer("whole"), np.ones((4, 16))
    before = old.kernel.numpy()
    small = ks.compress_model(model, 0.4)
    report = ks.compression_report(small, QUIET)
    rows = {row.path: row for row in report.layers}
    assert rows["whole"].rank is None
    new = small.get_layer("whole")
    np.testing.assert_array_equal(before, new.kernel.numpy())
    small.compile("sgd", "mse")
    small.fit(x, np.ones((4, 1)), verbose=0)
    assert not np.array_equal(before, new.kernel.numpy())
    np.testing.assert_array_equal(before, old.kernel.numpy())


def test_frozen_layers_stay_frozen():
    model = _image_model()
    model.get_layer("twin").trainable = False
    small = ks.compress_model(model, ratio=0.5, method="global")
    assert isinstance(small.get_layer("twin"), ks.LowRank)
    assert not small.get_layer("twin").trainable_weights
    assert small.get_layer("down").trainable_weights


def test_nothing_shrinks_where_almost_all_is_kept():
    model = _image_model()
    small = ks.compress_model(model, max_error=1e-6)
    report = ks.compression_report(small, QUIET)
    assert all(layer.rank is None for layer in report.layers)
    np.testing.assert_allclose(
        small.predict(_images(), verbose=0),
        model.predict(_images(), verbose=0),
        atol=1e-6,
    )


@pytest.mark.once
def test_files_load_where_nothing_else_is_imported(tmp_path):
    small = ks.compress_model(_image_model(), ratio=0.3)
    again = outputs_elsewhere(small, _images(), tmp_path)
    expected = small.predict(_images(), verbose=0)
    np.testing.assert_allclose(again, expected, atol=1e-6)


@pytest.mark.skipif(not ON_TENSORFLOW, reason="SavedModel is TensorFlow's")
def test_export(tmp_path):
    import tensorflow as tf

    small = ks.compress_model(_image_model(), ratio=0.4)
    small.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(
        loaded.serve(_images()).numpy(),
        small.predict(_images(), verbose=0),
        atol=1e-5,
    )


@pytest.mark.skipif(ON_JAX, reason="its converter brings Flax and Equinox")
@pytest.mark.filterwarnings("default")
def test_export_to_onnx(tmp_path):
    import onnxruntime

    small = ks.compress_model(_image_model(), ratio=0.4, method="alds")
    small.export(
        tmp_path / "small.onnx",
        format="onnx",
        verbose=False,
        input_signature=[keras.InputSpec("float32", (5, 8, 8, 4))],
    )
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    (given,) = session.get_inputs()
    (got,) = session.run(None, {given.name: _images()})
    expected = small.predict(_images(), verbose=0)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize(
    ("can_be_cut", "calibrated", "goal", "expected"),
    [
        (True, False, "ratio", "alds"),
        (True, True, "ratio", "sensitivity"),
        (True, "found", "ratio", "alds"),
        (False, False, "ratio", "alds"),
        (False, True, "ratio", "sensitivity"),
        (False, "found", "ratio", "uniform"),
        (False, True, "max_error", "alds"),
    ],
)
def test_the_rule_by_default(can_be_cut, calibrated, goal, expected):
    model = _image_model() if can_be_cut else _uneven_model()
    options = {goal: 0.4}
    if calibrated:
        rng = np.random.default_rng(0)
        options["calibration"] = (
            _images(256) if can_be_cut else rng.normal(size=(64, 16))
        )
    if calibrated == "found":
        options["calibration"] = ks.calibrate(
            model, options["calibration"], "all"
        )

    def choices(**more):
        small = ks.compress_model(model, **options, **more)
        rows = ks.compression_report(small, QUIET).layers
        return [(row.rank, row.slices) for row in rows]

    names = {"alds", "uniform"} | {expected}
    found = {name: choices(method=name) for name in names}
    assert len({str(choice) for choice in found.values()}) == len(names)
    assert choices() == found[expected]


def _uneven_model():
    """One kernel has equal singular values, the other a few large ones."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(16), keras.layers.Dense(16)]
    )
    model.layers[0].kernel.assign(np.eye(16))
    model.layers[1].kernel.assign(np.diag(2.0 ** -np.arange(16)))
    return model


def test_recovery_by_training_the_factors():
    model = _image_model()
    small = ks.compress_model(
        model, ratio=0.5, method="global", recover="train", exclude="head"
    )
    assert {w.path.split("/")[0] for w in small.trainable_weights} == {
        "first",
        "twin",
        "down",
    }
    head = small.get_layer("head").kernel.numpy()
    small.compile(keras.optimizers.Adam(0.01), "mse")
    y = np.ones((5, 10))
    losses = small.fit(_images(), y, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(small.get_layer("head").kernel.numpy(), head)


def test_sliced_layers_are_joined_with_an_adapter():
    keras.utils.set_random_seed(0)
    conv = keras.layers.Conv2D(6, 3, activation="relu", name="conv")
    conv(_images())
    view = kernel_view(conv)
    thin = low_rank_layer(view, *_pair(view, 2, 2))
    model = keras.Sequential([keras.Input((8, 8, 4)), thin])
    plain = model.predict(_images(), verbose=0)
    ks.wrap_model(model, "lora", target=ks.LowRank, rank=3, alpha=5)
    np.testing.assert_array_equal(model.predict(_images(), verbose=0), plain)
    with pytest.raises(ValueError, match="finalize_transfer"):
        ks.merge_model(model)
    adapter = model.layers[0]
    adapter.lora_b.assign(np.random.default_rng(0).normal(size=(3, 6)))
    expected = model.predict(_images(), verbose=0)
    ks.finalize_transfer(model)
    assert model.layers[0].down.kernel.shape == (3, 3, 2, 10)
    np.testing.assert_allclose(
        model.predict(_images(), verbose=0), expected, atol=1e-5
    )
    assert np.abs(expected - plain).max() > 0.1


@pytest.mark.once
@pytest.mark.parametrize("decay_bias", [False, True])
@CASES
def test_finished_transfer_is_the_pair_alone(case, decay_bias):
    if ON_TENSORFLOW and "groups" in case.name:
        pytest.skip("TensorFlow has no grouped convolution on a CPU")
    layer = _built(case)
    layer.name = "base"
    x = case.inputs()
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=x.dtype), layer])
    options = {"end_step": 5, "decay_bias": decay_bias, "alpha": 3}
    ks.wrap_model(model, "decaying_lora", target="base", rank=2, **options)
    adapter = model.layers[0]
    with pytest.raises(ValueError, match="factor is 1 at step 0 of 5"):
        ks.finalize_transfer(model)
    assert model.layers[0] is adapter
    adapter.step.assign(5)
    adapter.lora_b.assign(adapter.lora_b * 1.5)
    expected = _numpy(model(x))
    ks.finalize_transfer(model)
    assert isinstance(model.layers[0], ks.LowRank)
    np.testing.assert_allclose(_numpy(model(x)), expected, atol=1e-5)


_UNBUILT = keras.Sequential([keras.layers.Dense(3)])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "exactly one of"),
        ({"ratio": 0.5, "budget": 3}, "exactly one of"),
        ({"ratio": 1.0}, "ratio=1.0"),
        ({"ratio": 0}, "ratio=0"),
        ({"ratio": True}, "ratio=True"),
        ({"max_error": 1.5}, "max_error=1.5"),
        ({"budget": 0.5}, "budget=0.5"),
        ({"budget": 10}, "At rank 1 everywhere"),
        ({"ratio": 0.999}, "At rank 1 everywhere"),
        ({"ratio": 0.5, "method": "best"}, "method='best'"),
        ({"ratio": 0.5, "recover": "all"}, "recover='all'"),
        ({"ratio": 0.5, "recover_rank": 0}, "recover_rank=0"),
        ({"ratio": 0.5, "target": "nothing"}, "Nothing in model"),
        ({"ratio": 0.5, "target": "norm"}, "BatchNormalization"),
        ({"ratio": 0.5, "target": "twin", "keep_ends": True}, "Nothing is"),
    ],
)
def test_bad_input_is_refused(options, match):
    model = _image_model()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=match):
        ks.compress_model(model, **options)
    for old, new in zip(before, _snapshot(model)):
        np.testing.assert_array_equal(old, new)


def test_models_that_cannot_be_compressed():
    with pytest.raises(ValueError, match="built Keras model"):
        ks.compress_model(_UNBUILT, 0.5)
    model = _image_model()
    ks.wrap_model(model, "lora", target="head", rank=2)
    with pytest.raises(ValueError, match="has adapters"):
        ks.compress_model(model, 0.5)
    with pytest.raises(ValueError, match="Expected a DecayingLoRA"):
        ks.finalize_transfer(model)
    ks.unwrap_model(model)
    with pytest.raises(ValueError, match="no adapters"):
        ks.finalize_transfer(model)
    with pytest.raises(ValueError, match="no report"):
        ks.compression_report(model, QUIET)
    table = keras.layers.ReversibleEmbedding(9, 4, name="table")
    tied = keras.Sequential([keras.Input((3,), dtype="int32"), table])
    with pytest.raises(ValueError, match="two directions"):
        ks.compress_model(tied, 0.5, target=keras.layers.ReversibleEmbedding)

    class Secret(keras.Model):
        def __init__(self, width):
            super().__init__()
            self.dense = keras.layers.Dense(width)

        def call(self, x):
            return self.dense(x)

    secret = Secret(8)
    secret(np.ones((2, 8)))
    with pytest.raises(ValueError, match="needs `get_config`"):
        ks.compress_model(secret, 0.5)


@pytest.mark.once
def test_golden_convolution_at_full_rank():
    root = os.environ.get("KERAS_SPECTRAL_GOLDEN", "golden")
    path = pathlib.Path(root, "convlora_g1.npz")
    if not path.exists():
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    golden = np.load(path)
    kernel = golden["W_oihw"].transpose(2, 3, 1, 0)
    x = golden["x_nchw"].transpose(0, 2, 3, 1).astype("float32")
    layer = keras.layers.Conv2D(kernel.shape[-1], kernel.shape[0], name="conv")
    layer.build(x.shape)
    layer.kernel.assign(kernel)
    layer.bias.assign(golden["bias"])
    view = kernel_view(layer)
    for slices in view.slicings():
        parts = view.parts(view.matrix(), slices)
        pair = _pair(view, min(parts.shape[-2:]), slices)
        thin = low_rank_layer(view, *pair)
        np.testing.assert_allclose(_numpy(thin(x)), _numpy(layer(x)), atol=1e-5)


def test_distillation_from_the_original():
    model = _image_model()
    small = ks.compress_model(
        model, ratio=0.6, method="global", recover="train"
    )
    x = _images(64)
    wanted = model.predict(x, verbose=0).argmax(axis=1)

    def agreement():
        return (small.predict(x, verbose=0).argmax(axis=1) == wanted).mean()

    before = agreement()
    distiller = ks.distiller(small, model, label_weight=0.0)
    distiller.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    weights = _snapshot(model)
    distiller.fit(x, wanted, epochs=20, verbose=0)
    for old, new in zip(weights, _snapshot(model)):
        np.testing.assert_array_equal(old, new)
    assert before < 0.7 and agreement() > before + 0.2


@pytest.mark.once
@pytest.mark.parametrize("kind", ["dense", "conv2d"])
def test_a_pair_draws_no_random_weights(kind, monkeypatch):
    x = keras.random.uniform((2, 8, 8, 6))
    layer = {
        "dense": keras.layers.Dense(12),
        "conv2d": keras.layers.Conv2D(12, 3),
    }[kind]
    layer(x)
    factors = _pair(kernel_view(layer), 4)

    def draw(*args, **kwargs):
        raise AssertionError("random weights")

    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", draw)
    with pytest.raises(AssertionError, match="random weights"):
        keras.layers.Dense(3).build((None, 2))
    low_rank_layer(kernel_view(layer), *factors)


def test_pairs_keep_their_initializers():
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16)])
    small = ks.compress_model(model, 0.5)
    for half in (small.layers[0].down, small.layers[0].up):
        initializer = half.kernel_initializer
        assert isinstance(initializer, keras.initializers.GlorotUniform)
