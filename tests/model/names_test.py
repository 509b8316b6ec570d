"""Several adapters on one model: switching, mixing, files, mixed batches."""

import block_cases
import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks

X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
# Beside a second adapter the thin products are wider, and on some processors
# XLA then adds up in another order.
ROUNDING = 1e-6 if keras.backend.backend() == "jax" else 0.0


def _model():
    keras.utils.set_random_seed(3)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu", name="one"),
            layers.Dense(8, name="two"),
            layers.Dense(2, name="head"),
        ]
    )


def _add(model, name, method="lora", target=("one", "two"), **options):
    options = {"rank": 2, "trainable": "head", **options}
    return ks.wrap_model(model, method, list(target), adapter=name, **options)


def _train(model, y=Y, epochs=3):
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(X, y, epochs=epochs, verbose=0, shuffle=False)
    return _out(model)


def _out(model):
    return ops.convert_to_numpy(model(X))


def _two(method="spectral"):
    """A model with two trained adapters, and what it does with each."""
    model = _model()
    base = _out(model)
    first = _train(_add(model, "first", seed=1))
    second = _train(_add(model, "second", method, ["two"]), -Y)
    return model, base, first, second


def assert_same(got, expected, atol=0.0):
    np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


def test_each_alone_is_what_it_was_and_none_is_the_base():
    model, base, first, second = _two()
    assert ks.adapter_names(model) == ["first", "second"]
    assert np.abs(first - second).max() > 0.1
    for _ in range(2):
        assert_same(_out(ks.set_adapters(model, "first")), first, ROUNDING)
        assert_same(_out(ks.set_adapters(model, ["second"])), second)
        assert_same(_out(ks.set_adapters(model, [])), base)
    with ks.unwrapped(model):
        assert_same(_out(model), base)


def test_a_new_one_is_the_only_active_one():
    model = _model()
    base = _out(model)
    _train(_add(model, "first"))
    _add(model, "second")
    assert_same(_out(model), base)
    assert {w.path.split("/")[-2] for w in model.trainable_weights} == {
        "second"
    }


@pytest.mark.parametrize("method", ["spectral", "loha", "dora"])
def test_strengths_mix_kernels_and_heads(method):
    model, *_ = _two(method)
    strengths = {"first": 0.7, "second": -0.3}
    ks.set_adapters(model, strengths)
    kernels = {}
    for name in ("one", "two", "head"):
        layer = model.get_layer(name)
        kernels[name] = base = layer.layer.kernel.numpy().astype("float64")
        for member in layer.members():
            if name == "head":
                change = member.weights[0].numpy() - base
            else:
                change = ops.convert_to_numpy(member.delta_matrix())
            strength = strengths[member.adapter_name]
            kernels[name] = kernels[name] + strength * change
        got = ops.convert_to_numpy(layer.kernel)
        np.testing.assert_allclose(got, kernels[name], atol=1e-6)
    mixed = _out(model)
    with ks.merged(model):
        np.testing.assert_allclose(
            model.get_layer("two").kernel.numpy(), kernels["two"], atol=1e-6
        )
        assert_same(_out(model), mixed, 1e-5)
    assert_same(_out(model), mixed)
    ks.merge_model(model)
    assert [type(layer) for layer in model.layers] == 3 * [keras.layers.Dense]
    assert_same(_out(model), mixed, 1e-5)


def test_off_not_even_nan_shows_beside_another():
    model, base, first, _ = _two()
    ks.set_adapters(model, "second")
    for weight in model.trainable_weights:
        weight.assign(np.full(weight.shape, np.nan))
    assert_same(_out(ks.set_adapters(model, "first")), first, ROUNDING)
    assert_same(_out(ks.set_adapters(model, [])), base)


def test_one_fit_moves_the_active_one_only():
    model, *_ = _two()
    ks.set_adapters(model, "first")
    kept = [
        (w, w.numpy())
        for w in model.weights
        if "/second/" in w.path or "first" not in w.path
    ]
    moved = [(w, w.numpy()) for w in model.trainable_weights]
    assert moved and all("/first/" in w.path for w, _ in moved)
    model.fit(X, Y, verbose=0)
    for weight, value in kept:
        np.testing.assert_array_equal(weight.numpy(), value)
    for weight, value in moved:
        assert np.abs(weight.numpy() - value).max() > 0, weight.path


def test_what_trains_can_be_chosen():
    model, *_ = _two()
    ks.set_adapters(model, ["first", "second"], train="second")
    names = {w.path.split("/")[-2] for w in model.trainable_weights}
    assert names == {"second"}
    model.trainable = False
    model.trainable = True
    assert {w.path.split("/")[-2] for w in model.trainable_weights} == names
    assert not ks.set_adapters(model, "first", train=[]).trainable_weights


@pytest.mark.compiled
def test_two_tasks_trained_in_turn_equal_two_models():
    """Each with its own head and its own state of the optimizer."""

    def alone(name, y):
        model = _add(_model(), name, seed=4)
        model.compile(keras.optimizers.Adam(0.05), "mse")
        for _ in range(2):
            model.fit(X, y, epochs=2, verbose=0, shuffle=False)
        return _out(model)

    expected = {"a": alone("a", Y), "b": alone("b", -Y)}
    model = _add(_add(_model(), "a", seed=4), "b", seed=4)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    for _ in range(2):
        for name, y in (("a", Y), ("b", -Y)):
            ks.set_adapters(model, name)
            model.fit(X, y, epochs=2, verbose=0, shuffle=False)
    for name, outputs in expected.items():
        assert_same(_out(ks.set_adapters(model, name)), outputs, 1e-6)


@pytest.mark.parametrize("end", ["delete", "unwrapped", "wrap"])
def test_an_optimizer_of_a_set_survives_others_coming_and_going(end):
    model = _add(_add(_model(), "a"), "b")
    model.compile(keras.optimizers.Adam(0.05), "mse")
    kept = {}
    for name in ("a", "b"):
        ks.set_adapters(model, name)
        model.fit(X, Y, epochs=2, verbose=0)
        kept[name] = model.optimizer
    if end == "delete":
        ks.delete_adapter(model, "b")
        assert model.optimizer is not kept["b"]
    elif end == "unwrapped":
        with ks.unwrapped(model):
            assert len(model.layers[0].weights) == 2
    else:
        _add(model, "c")
        assert not model.optimizer.built
    ks.set_adapters(model, "a")
    assert model.optimizer is kept["a"]
    before = [ops.convert_to_numpy(w) for w in model.trainable_weights]
    model.fit(X, Y, verbose=0)
    assert int(model.optimizer.iterations) == 3
    for old, weight in zip(before, model.trainable_weights):
        assert np.any(old != ops.convert_to_numpy(weight)), weight.path


@pytest.mark.compiled
def test_a_new_compile_ends_what_was_kept_for_a_set():
    model = _add(_add(_model(), "a"), "b")
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    old = model.optimizer
    ks.set_adapters(model, "a")
    model.compile("sgd", "mae")
    model.fit(X, Y, verbose=0)
    ks.set_adapters(model, "b")
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert model.optimizer is not old
    model.fit(X, Y, verbose=0)


@keras.saving.register_keras_serializable("tests")
class Counting(keras.layers.Layer):
    """Counts how often Python runs it: once for each trace."""

    traces = 0

    def call(self, x):
        type(self).traces += 1
        return x


@pytest.mark.compiled
@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="PyTorch traces nothing"
)
def test_switching_traces_nothing_anew():
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, name="one")(Counting()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(x))
    for name in ("a", "b", "c"):
        _add(model, name, target=["one"])
    jit = keras.backend.backend() == "jax"
    model.compile("adam", "mse", jit_compile=jit)

    def visit(**options):
        for active in ("a", "b", {"a": 0.5, "c": 0.5}, [], "c"):
            ks.set_adapters(model, active, **options)
            model.predict(X, verbose=0)

    visit(train=[])
    Counting.traces = 0
    for _ in range(2):
        visit(train=[])
    assert Counting.traces == 0  # what serves is traced once for all

    for name in ("a", "b"):
        ks.set_adapters(model, name)
        model.fit(X, Y, verbose=0)
        model.predict(X, verbose=0)
    Counting.traces = 0
    for name in ("a", "b", "a", "b"):
        ks.set_adapters(model, name)
        model.fit(X, Y, verbose=0)
        model.predict(X, verbose=0)
    assert Counting.traces == 0  # what trains once for each


def test_dropping_and_renaming():
    model, base, first, second = _two()
    ks.rename_adapter(model, "first", "uno")
    assert ks.adapter_names(model) == ["uno", "second"]
    ks.set_adapters(model, "uno")
    assert {w.path.split("/")[-2] for w in model.trainable_weights} == {"uno"}
    model.fit(X, Y, verbose=0)  # the optimizer still knows them
    ks.delete_adapter(model, "uno")
    assert ks.adapter_names(model) == ["second"]
    assert type(model.get_layer("one")) is keras.layers.Dense
    assert type(model.get_layer("two")) is ks.SpectralDense
    assert_same(_out(model), base)
    assert_same(_out(ks.set_adapters(model, "second")), second)
    model.fit(X, Y, verbose=0)
    ks.unwrap_model(model, adapter="second")
    assert_same(_out(model), base)
    assert len(model.trainable_weights) == len(model.weights) == 6


def test_one_of_two_is_folded_in():
    model, _, first, second = _two()
    ks.set_adapters(model, {"first": 1.0, "second": 0.5})
    both = _out(model)
    ks.merge_model(model, adapter="first")
    assert ks.adapter_names(model) == ["second"]
    # The head of "second" stands by the base's, and that is another now.
    head = model.get_layer("head")
    np.testing.assert_allclose(
        head.layer.kernel.numpy() * 0.5
        + 0.5 * head.members()[0].weights[0].numpy(),
        ops.convert_to_numpy(head.kernel),
        atol=1e-6,
    )
    assert_same(_out(ks.set_adapters(model, [])), first, 1e-5)
    assert both.shape == first.shape


def test_left_out_for_a_moment():
    model, base, first, second = _two()
    ks.set_adapters(model, {"first": 1.0, "second": 1.0})
    both = _out(model)
    with ks.unwrapped(model, adapter="second"):
        assert ks.adapter_names(model) == ["first"]
        assert_same(_out(model), first)
    assert_same(_out(model), both)
    with ks.merged(model, adapter="first"):
        assert ks.adapter_names(model) == []
        assert_same(_out(model), first, 1e-5)
    assert_same(_out(model), both)
    with ks.adapters_disabled(model):
        assert_same(_out(model), base)
    assert_same(_out(model), both)


def test_files_by_name(tmp_path):
    model, base, first, second = _two()
    ks.set_adapters(model, {"first": 0.5, "second": 2.0})
    both = _out(model)
    ks.save_adapters(model, tmp_path / "all.safetensors")
    for name in ("first", "second"):
        file = tmp_path / f"{name}.safetensors"
        ks.save_adapters(model, file, adapter=name)
    fresh = ks.load_adapters(_model(), tmp_path / "all.safetensors")
    assert_same(_out(fresh), both)  # with the strengths it was saved with
    fresh = _model()
    ks.load_adapters(fresh, tmp_path / "first.safetensors")
    assert_same(_out(fresh), first, ROUNDING)
    ks.load_adapters(fresh, tmp_path / "second.safetensors", adapter="2nd")
    assert ks.adapter_names(fresh) == ["first", "2nd"]
    assert_same(_out(fresh), second)
    assert_same(_out(ks.set_adapters(fresh, "first")), first, ROUNDING)
    picked = ks.load_adapters(
        _model(), tmp_path / "all.safetensors", adapter=["second"]
    )
    assert_same(_out(picked), second)


@pytest.mark.compiled
def test_loading_over_a_name_swaps_values(tmp_path):
    file = tmp_path / "file.safetensors"
    model = _add(_model(), "task")
    trained = _train(model)
    ks.save_adapters(model, file)
    _train(model, -Y)
    variables = [id(w) for w in model.weights]
    function, optimizer = model.predict_function, model.optimizer
    ks.load_adapters(model, file)
    assert [id(w) for w in model.weights] == variables
    assert model.predict_function is function
    assert model.optimizer is optimizer
    assert_same(_out(model), trained)


def test_whole_models_hold_all_adapters(tmp_path):
    model, *_, second = _two()
    ks.set_adapters(model, {"first": 0.5, "second": 2.0}, train="first")
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert ks.adapter_names(again) == ["first", "second"]
    assert_same(_out(again), _out(model), 1e-6)
    assert_same(_out(ks.set_adapters(again, "second")), second, 1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    other = _add(_add(_model(), "first"), "second", "spectral", ["two"])
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(_out(other), _out(model), 1e-6)


def test_each_example_through_its_own():
    model, base, first, second = _two()
    names = ["first", "second", None, "first"] * 2
    with ks.mixed_batch(model, names):
        eager = _out(model)
        compiled = model.predict(X, verbose=0)
        with pytest.raises(ValueError, match="on 4 rows.*8 names"):
            model(X[:4])
    expected = {"first": first, "second": second, None: base}
    for i, name in enumerate(names):
        assert_same(eager[i], expected[name][i], 1e-5)
        assert_same(compiled[i], expected[name][i], 1e-5)
    assert_same(_out(model), second)


@pytest.mark.parametrize("method", ["bottleneck", "prefix", "unipelt"])
def test_blocks_by_name(method):
    model = block_cases.model()
    base = ops.convert_to_numpy(model(block_cases.inputs()))

    def out():
        return ops.convert_to_numpy(model(block_cases.inputs()))

    rng, alone = np.random.default_rng(0), {}
    for name, kind in (("a", method), ("b", "bottleneck")):
        ks.wrap_model(model, kind, adapter=name, seed=1)
        for weight in model.trainable_weights:
            weight.assign(weight + rng.normal(0, 0.3, weight.shape))
        alone[name] = out()
    for name, expected in alone.items():
        ks.set_adapters(model, name)
        assert_same(out(), expected, 1e-6)
    with ks.mixed_batch(model, ["b", None, "a"]):
        got = out()
    for i, expected in enumerate((alone["b"], base, alone["a"])):
        assert_same(got[i], expected[i], 1e-5)
    ks.set_adapters(model, [])
    assert_same(out(), base, 1e-6)


def test_soft_prompts_by_name():
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(9, 4),
            keras.layers.Conv1D(3, 3, padding="causal"),
        ],
        name="backbone",
    )
    inputs = keras.Input((None,), dtype="int32")
    model = keras.Model(inputs, backbone(inputs))
    ids = np.arange(12).reshape(2, 6) % 9
    outputs = {"base": ops.convert_to_numpy(model(ids))}
    for name in ("a", "b"):
        ks.wrap_model(model, "soft_prompt", backbone, length=3, adapter=name)
        for weight in model.trainable_weights:
            weight.assign(weight + 0.5)
        outputs[name] = ops.convert_to_numpy(model(ids))
    for name in ("a", "b"):
        ks.set_adapters(model, name)
        assert_same(ops.convert_to_numpy(model(ids)), outputs[name], 1e-6)
    assert_same(
        ops.convert_to_numpy(ks.set_adapters(model, [])(ids)), outputs["base"]
    )
    ks.set_adapters(model, ["a", "b"])
    assert model(ids).shape == (2, 6, 3)


def test_norms_train_as_copies_of_their_own():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, name="one"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(2, name="head"),
        ]
    )
    base = model.predict(X, verbose=0)
    outputs = {}
    for name, y in (("a", Y), ("b", -Y)):
        ks.wrap_model(
            model, "lora", "one", rank=2, adapter=name, trainable="norms"
        )
        model.compile("adam", "mse")
        model.fit(X, y, epochs=2, verbose=0)
        outputs[name] = model.predict(X, verbose=0)
    for name in ("a", "b", "a"):
        ks.set_adapters(model, name)
        assert_same(model.predict(X, verbose=0), outputs[name], 1e-6)
    ks.set_adapters(model, [])
    assert_same(model.predict(X, verbose=0), base, 1e-6)
    ks.set_adapters(model, "a")
    ks.merge_model(model)
    assert_same(model.predict(X, verbose=0), outputs["a"], 1e-5)


def test_biases_beside_copies_are_refused_or_train_whole():
    model = _add(_model(), "first")
    with pytest.raises(ValueError, match="'head' train whole"):
        _add(model, "second", trainable="biases")
    _add(model, "second", trainable=["biases", "head"])
    names = {"/".join(w.path.split("/")[1:]) for w in model.trainable_weights}
    assert {"head/second/kernel", "one/second/bias_delta"} <= names


@pytest.mark.once
@pytest.mark.parametrize(
    ("act", "match"),
    [
        (lambda m: ks.set_adapters(m, "frist"), "Did you mean 'first'"),
        (lambda m: ks.set_adapters(m, {"first": float("nan")}), "finite"),
        (lambda m: ks.set_adapters(m, {"first": True}), "finite number"),
        (lambda m: ks.set_adapters(m, 3), "a list of names"),
        (lambda m: ks.set_adapters(m, "first", train="x"), "no adapter 'x'"),
        (lambda m: _add(m, "first"), "Already wrapped.*'first'"),
        (lambda m: _add(m, "a/b"), "letters, digits"),
        (lambda m: _add(m, ""), "letters, digits"),
        (lambda m: _add(m, 3), "letters, digits"),
        (lambda m: ks.delete_adapter(m, "third"), "no adapter 'third'"),
        (lambda m: ks.rename_adapter(m, "first", "second"), "already"),
        (lambda m: ks.rename_adapter(m, "first", "a b"), "letters, digits"),
        (lambda m: ks.merge_model(m, adapter="first"), "not active"),
        (
            lambda m: ks.merge_model(m, adapter="second", dtype="float32"),
            "one of them",
        ),
        (lambda m: ks.unwrap_model(m, adapter="x"), "no adapter 'x'"),
        (lambda m: ks.save_adapters(m, "f", adapter="x"), "no adapter 'x'"),
        (lambda m: ks.mixed_batch(m, []).__enter__(), "no names"),
        (lambda m: ks.mixed_batch(m, ["x"]).__enter__(), "no adapter 'x'"),
    ],
)
def test_bad_input_changes_nothing(act, match):
    model, *_, second = _two()
    trained = [id(w) for w in model.trainable_weights]
    with pytest.raises(ValueError, match=match):
        act(model)
    assert_same(_out(model), second)
    assert [id(w) for w in model.trainable_weights] == trained


@pytest.mark.once
def test_the_last_is_not_deleted_and_two_are_not_one(tmp_path):
    model, *_ = _two()
    file = tmp_path / "two.safetensors"
    ks.save_adapters(model, file)
    with pytest.raises(ValueError, match=r"holds the adapters \['first'"):
        ks.load_adapters(_model(), file, adapter="one")
    with pytest.raises(ValueError, match="Did you mean 'first'"):
        ks.load_adapters(_model(), file, adapter=["firts"])
    ks.delete_adapter(model, "first")
    with pytest.raises(ValueError, match="only adapter"):
        ks.delete_adapter(model, "second")
    with pytest.raises(ValueError, match="no adapters"):
        ks.set_adapters(_model(), [])
