"""What every adapter promises, on one layer of every view.

Those of whole blocks have a contract of their own, `block_contract_test.py`.
A new adapter is picked up from `keras_spectral.__all__`; its own test file
names the variants of its options, see `variants.py`, and then it passes all
of this.
"""

import keras
import layer_cases
import numpy as np
import pytest
import variants
from keras import ops

import keras_spectral as ks
from keras_spectral.blocks import BlockAdapter
from keras_spectral.layers import METHODS
from keras_spectral.layers.member import own_weights
from keras_spectral.layers.multi_kernel import MultiKernelLoRA

VARIANTS = variants.collected("layers")
FIRST = list({v.adapter: v for v in reversed(VARIANTS)}.values())


def _cases(variant):
    """On PyTorch all, elsewhere one per view, or one if it is no first."""
    if keras.backend.backend() == "torch" or variant in FIRST:
        return layer_cases.on_this_backend(variant.cases)
    return [layer_cases.simplest(variant.cases)]


PAIRS = [
    pytest.param(
        variant,
        case,
        id=f"{variant.name}-{case.name}",
        # On TensorFlow each variant compiles one kind of layer, and groups,
        # which have no gradients elsewhere.
        marks=[pytest.mark.compiled]
        * (
            case is layer_cases.simplest(variant.cases)
            or case.name.endswith("groups")
        ),
    )
    for variant in VARIANTS
    for case in _cases(variant)
]
CONTRACT = pytest.mark.parametrize(("variant", "case"), PAIRS)
# What hangs less on the kind of layer is tried on one off PyTorch. Two of a
# variant on one layer, and each beside a LoRA: of each variant on one kind of
# layer, on PyTorch the two on one for each view.
ALONE = [
    pytest.param(variant, layer_cases.simplest(variant.cases), id=variant.name)
    for variant in VARIANTS
]
FEW, LESS = ALONE, pytest.mark.parametrize(("variant", "case"), ALONE)
if keras.backend.backend() == "torch":
    LESS = CONTRACT
    FEW = [p for p in PAIRS if p.values[1] in layer_cases.ONE_PER_VIEW]
MERGING = pytest.mark.parametrize(
    ("variant", "case"), [pair for pair in PAIRS if pair.values[0].merges]
)


MERGING_LESS = pytest.mark.parametrize(
    ("variant", "case"), [p for p in LESS.args[1] if p.values[0].merges]
)


def test_no_adapter_skips_the_contract():
    without = variants.without_variants(ks, ks.AdapterLayer, VARIANTS)
    # Several kernels of one layer: `layers/multi_kernel_test.py`.
    others = BlockAdapter, MultiKernelLoRA
    blocks = {
        name
        for name in ks.__all__
        if isinstance(getattr(ks, name), type)
        and issubclass(getattr(ks, name), others)
    }
    assert set(without) == blocks | {
        "AdapterLayer",
        "KernelAdapter",
        "SoftPrompt",
    }
    names = [variant.name for variant in VARIANTS]
    assert len(names) == len(set(names))


def test_every_method_is_exported():
    for name, cls in METHODS.items():
        if cls.__module__.startswith("keras_spectral."):
            assert getattr(ks, cls.__name__, None) is cls, name


def _model(case, dtype=None):
    """Input -> the case's layer, with a frozen copy of its plain outputs."""
    kind = "int32" if case.tokens else dtype and "float32"
    inputs = keras.Input(case.shape[1:], dtype=kind)
    layer = case.make()
    if dtype:
        layer = type(layer).from_config({**layer.get_config(), "dtype": dtype})
    model = keras.Model(inputs, layer(inputs))
    # Fresh biases are zero, and fresh scales of norms one.
    rng = np.random.default_rng(2)
    for name in ("bias", "beta", "gamma"):
        weight = getattr(layer, name, None)
        if isinstance(weight, keras.Variable):
            weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    return model, layer


def _wrapped(variant, case, dtype=None):
    model, layer = _model(case, dtype)
    plain = _numpy(model(case.inputs()))
    cls = variant.adapter
    ks.wrap_model(model, cls, target=lambda x: x is layer, **variant.options)
    adapter = next(x for x in model.layers if isinstance(x, cls))
    return model, adapter, plain


def _randomize(variant, adapter):
    rng = np.random.default_rng(5)
    for weight in adapter.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    variant.settle(adapter)


def _numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def _check_close(got, expected, atol=1e-5):
    scale = max(1.0, np.abs(_numpy(expected)).max())
    np.testing.assert_allclose(
        _numpy(got), _numpy(expected), atol=atol * scale, rtol=0
    )


@CONTRACT
def test_starts_as_the_base_with_the_right_count(variant, case):
    model, adapter, _ = _wrapped(variant, case)
    base = adapter.layer
    got = model(case.inputs())
    with ks.unwrapped(model):
        expected = model(case.inputs())
    error = np.abs(_numpy(got) - _numpy(expected)).max()
    allowed = 0.0 if variant.exact_start else 1e-5
    assert (error <= allowed) == variant.starts_as_base
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert count == variant.size(case, base)
    assert not base.trainable_weights


@CONTRACT
def test_fit_moves_the_adapter_and_nothing_else(variant, case):
    model, adapter, plain = _wrapped(variant, case)
    frozen = [w.numpy() for w in adapter.layer.weights]
    before = [w.numpy() for w in adapter.trainable_weights]
    model.trainable = True  # must not thaw the base
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    # TensorFlow traces a step twice if the optimizer makes its variables in it.
    model.optimizer.build(model.trainable_variables)
    # Three, so that one of two pairs that take turns is met twice.
    model.fit(case.inputs(), plain + 1.0, epochs=3, verbose=0)
    for weight, value in zip(adapter.layer.weights, frozen):
        np.testing.assert_array_equal(weight.numpy(), value)
    for weight, value in zip(adapter.trainable_weights, before):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path


@MERGING
def test_disabled_unwrapped_and_merged(variant, case):
    model, adapter, _ = _wrapped(variant, case)
    base, values = adapter.layer, [w.numpy() for w in adapter.layer.weights]
    _randomize(variant, adapter)
    adapted = model(case.inputs())
    with ks.unwrapped(model):
        assert base in model.layers
        plain = model(case.inputs())
    _check_close(model(case.inputs()), adapted, 1e-6)
    assert np.abs(_numpy(adapted) - _numpy(plain)).max() > 1e-3
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(
            _numpy(model(case.inputs())), _numpy(plain)
        )
    name = adapter.view.kernel_name
    effective = adapter.view.to_matrix(getattr(adapter, name))
    with ks.merged(model):
        assert base in model.layers
        _check_close(model(case.inputs()), adapted)
        _check_close(adapter.view.matrix(), effective)
    ks.unwrap_model(model)
    assert base in model.layers and base.trainable
    for weight, value in zip(base.weights, values):
        np.testing.assert_array_equal(weight.numpy(), value)
    np.testing.assert_array_equal(_numpy(model(case.inputs())), _numpy(plain))


@CONTRACT
def test_switched_off_not_even_nan_shows(variant, case):
    model, adapter, plain = _wrapped(variant, case)
    for weight in adapter.trainable_weights:
        weight.assign(np.full(weight.shape, np.nan))
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(_numpy(model(case.inputs())), plain)


@MERGING_LESS
def test_merge_model_gives_plain_layers_with_the_same_outputs(variant, case):
    model, adapter, _ = _wrapped(variant, case)
    _randomize(variant, adapter)
    adapted = model(case.inputs())
    ks.merge_model(model)
    assert adapter not in model.layers and adapter.layer in model.layers
    _check_close(model(case.inputs()), adapted)


@MERGING
def test_equals_its_formula(variant, case):
    """The output is the base's with `K + delta` for a kernel."""
    model, adapter, _ = _wrapped(variant, case)
    _randomize(variant, adapter)
    got = model(case.inputs())
    matrix = _numpy(adapter.view.matrix()) + variant.matrix(adapter)
    ks.unwrap_model(model)
    adapter.view.assign(matrix)
    bias = adapter.view.bias_of()
    if bias is not None:
        value = ops.convert_to_numpy(bias)
        bias.assign(variant.bias(variant, adapter, value))
    _check_close(got, model(case.inputs()))


@LESS
def test_hand_built_layer_round_trips_and_goes_on_learning(
    variant, case, tmp_path
):
    inputs = keras.Input(case.shape[1:], dtype="int32" if case.tokens else None)
    adapter = variant.make(case.make())
    symbolic = adapter(inputs)
    model = keras.Model(inputs, symbolic)
    eager = model(case.inputs())
    assert symbolic.shape[1:] == eager.shape[1:]
    assert symbolic.dtype == keras.backend.standardize_dtype(eager.dtype)
    _randomize(variant, adapter)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    _check_close(again(case.inputs()), model(case.inputs()), 1e-6)
    other = next(x for x in again.layers if isinstance(x, ks.AdapterLayer))
    assert other.options() == adapter.options()
    again.compile(optimizer="sgd", loss="mse")
    again.fit(case.inputs(), np.ones(eager.shape), verbose=0)
    assert any(
        np.abs(new.numpy() - old.numpy()).max() > 0
        for new, old in zip(other.trainable_weights, adapter.trainable_weights)
    )
    clone = keras.models.clone_model(model)
    assert clone(case.inputs()).shape == eager.shape


@LESS
def test_mixed_bfloat16(variant, case):
    model, adapter, plain = _wrapped(variant, case, "mixed_bfloat16")
    assert adapter.compute_dtype == "bfloat16"
    assert all(w.dtype == "float32" for w in adapter.trainable_weights)
    _randomize(variant, adapter)
    outputs = model(case.inputs())
    if variant.merges:
        ks.merge_model(model)
    else:
        with ks.adapters_disabled(model):
            plain = model(case.inputs())
        assert outputs.dtype == plain.dtype
        return
    merged = model(case.inputs())
    assert outputs.dtype == merged.dtype
    expected = _numpy(merged)
    error = np.abs(_numpy(outputs) - expected).max()
    assert error <= 0.03 * max(1.0, np.abs(expected).max())


@LESS
def test_adapter_file_round_trip(variant, case, tmp_path):
    model, adapter, _ = _wrapped(variant, case)
    _randomize(variant, adapter)
    adapted = model(case.inputs())
    ks.save_adapters(model, tmp_path / "adapters.safetensors")
    ks.unwrap_model(model)
    ks.load_adapters(model, tmp_path / "adapters.safetensors")
    _check_close(model(case.inputs()), adapted, 1e-6)


@LESS
def test_masks_pass_as_in_the_base(variant, case):
    layer = case.make()
    adapter = variant.make(case.make())
    assert adapter.supports_masking == layer.supports_masking
    if not layer.supports_masking:
        return
    x = ops.convert_to_tensor(case.inputs())
    mask = None if case.tokens else ops.ones(case.shape[:-1], "bool")
    expected = layer.compute_mask(x, mask)
    got = adapter.compute_mask(x, mask)
    assert (got is None) == (expected is None)
    if expected is not None:
        np.testing.assert_array_equal(
            ops.convert_to_numpy(got), ops.convert_to_numpy(expected)
        )


def _two(variant, case, other):
    """A model with adapters "one" and "two" on its layer, "one" moved.

    "two" is active, as it starts.
    """
    model, layer = _model(case)
    cls, options = variant.adapter, variant.options
    if other == "lora":
        cls, options = ks.LoRADense, {"rank": 2}
        if case in layer_cases.NORMS:
            cls, options = ks.SSF, {}
    starts = []
    for name, kind, given in (
        ("one", variant.adapter, variant.options),
        ("two", cls, options),
    ):
        ks.wrap_model(
            model, kind, target=lambda x: x is layer, adapter=name, **given
        )
        starts.append(_numpy(model(case.inputs())))
        if name == "one":
            _randomize(variant, _members(model)[0])
    return model, layer, starts


def _members(model):
    (host,) = (x for x in model.layers if getattr(x, "is_host", False))
    return host.members()


def _kernel(model, view):
    host = next(x for x in model.layers if getattr(x, "is_host", False))
    return _numpy(view.to_matrix(getattr(host, view.kernel_name)))


@pytest.mark.parametrize(("variant", "case"), FEW)
def test_two_of_itself_add_up(variant, case, tmp_path):
    _check_sum(variant, case, "itself", tmp_path)


@pytest.mark.parametrize(("variant", "case"), ALONE)
def test_it_adds_up_with_a_lora(variant, case, tmp_path):
    _check_sum(variant, case, "lora", tmp_path)


def _check_sum(variant, case, other, tmp_path):
    model, layer, starts = _two(variant, case, other)
    x = case.inputs()
    plain = _numpy(layer(x))
    if other == "itself":
        _check_close(starts[1], starts[0], 1e-6)
    else:
        np.testing.assert_array_equal(starts[1], plain)
    one, two = _members(model)
    rng = np.random.default_rng(6)
    for weight in two.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    alone, kernels, view = {}, {}, one.view
    for name in ("one", "two"):
        ks.set_adapters(model, name)
        alone[name] = _numpy(model(x))
        kernels[name] = _kernel(model, view)
    ks.set_adapters(model, [])
    np.testing.assert_array_equal(_numpy(model(x)), plain)
    base = _kernel(model, view)
    for strengths in ({"one": 0.5, "two": 1.0}, {"one": 1.0, "two": 0.5}):
        ks.set_adapters(model, strengths)
        mixed = model(x)
        total = sum(s * (kernels[n] - base) for n, s in strengths.items())
        _check_close(_kernel(model, view), base + total)
        if variant.merges:
            with ks.merged(model):
                _check_close(mixed, model(x))
    alone[None] = plain
    names = [("two", "one", None)[i % 3] for i in range(len(x))]
    with ks.mixed_batch(model, names):
        rows = _numpy(model(x))
    expected = [alone[name][i] for i, name in enumerate(names)]
    _check_close(rows, np.stack(expected))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    _check_close(again(x), mixed, 1e-6)
    ks.save_adapters(model, tmp_path / "one.safetensors", adapter="one")
    ks.delete_adapter(model, "two")
    ks.set_adapters(model, "one")
    _check_close(model(x), alone["one"], 1e-6)
    ks.unwrap_model(model)
    ks.load_adapters(model, tmp_path / "one.safetensors")
    assert ks.adapter_names(model) == ["one"]
    _check_close(model(x), alone["one"], 1e-6)


@pytest.mark.parametrize("other", ["lora", "itself"])
@pytest.mark.parametrize(("variant", "case"), ALONE)
def test_of_two_adapters_the_active_one_trains(variant, case, other):
    model, layer, starts = _two(variant, case, other)
    one, two = _members(model)
    still = [*layer.weights, *own_weights(one)]
    before = [w.numpy() for w in (*still, *two.trainable_weights)]
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    model.optimizer.build(model.trainable_variables)
    model.fit(case.inputs(), starts[1] + 1.0, epochs=3, verbose=0)
    for weight, value in zip(still, before):
        np.testing.assert_array_equal(weight.numpy(), value)
    for weight, value in zip(two.trainable_weights, before[len(still) :]):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path
