"""What every adapter promises, on every kind of layer it fits.

Those of whole blocks have a contract of their own, `block_contract_test.py`.
A new adapter is picked up from `keras_spectral.__all__`; it has to name its
layer kinds and the variants of its options here, and then passes all of this.
"""

import dataclasses
import inspect
from collections.abc import Callable

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.blocks import BlockAdapter
from keras_spectral.kernels import kernel_view
from keras_spectral.surgery import own_variables

KINDS = {
    "AdaLoRADense": layer_cases.ALL,
    "LoRADense": layer_cases.ALL,
    "ConvLoRA": layer_cases.PLAIN_CONV,
    "DecayingLoRA": layer_cases.ALL,
    "DyLoRADense": layer_cases.ALL,
    "SpectralDense": layer_cases.ALL,
    "GatedSpectralDense": layer_cases.ALL,
    "ConditionalSpectralDense": layer_cases.ALL,
}


def _lora_size(case, layer):
    return 2 * case.size


def _loralib_size(case, layer):
    size, _, c_in, c_out = layer.kernel.shape
    return 2 * size**2 * (c_in * layer.groups + c_out // layer.groups)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Options of an adapter, and how many weights it then trains."""

    adapter: str
    name: str
    options: dict
    size: Callable
    fits: Callable = lambda case: True
    exact_start: bool = True
    starts_as_base: bool = True
    merges: bool = True

    def make(self, layer):
        cls = getattr(ks, self.adapter)
        seed = {"seed": 3} if "seed" in cls.option_names() else {}
        return cls(layer, **self.options, **seed)


def _all_values(case, layer):
    view = kernel_view(layer)
    return min(view.n_in, view.n_out)


def _conditional_size(case, layer):
    rank, hidden, embedding = 2, 8, 3
    inner = (rank + embedding) * hidden + hidden + hidden * rank + rank
    return inner + embedding


def _square_2d(case):
    names = ("conv_2d", "conv_2d_strided", "conv_2d_1x1", "conv_2d_groups")
    return case.name in names


def _one_per_view(case):
    return case.name in (
        "dense",
        "einsum_kernel_last",
        "einsum_batched",
        "conv_2d_strided",
        "conv_2d_groups",
        "conv_separable",
        "conv_transpose",
        "embedding",
    )


VARIANTS = [
    Variant("LoRADense", "lora", {"rank": 2}, _lora_size),
    Variant(
        "LoRADense",
        "rslora",
        {"rank": 2, "scaling": "rslora", "alpha": 3},
        _lora_size,
        fits=lambda case: case.name in ("dense", "conv_2d"),
    ),
    Variant(
        "LoRADense",
        "pissa",
        {"rank": 2, "initializer": "pissa"},
        _lora_size,
        fits=_one_per_view,
        exact_start=False,
    ),
    Variant("ConvLoRA", "channel", {"rank": 2, "alpha": 4}, _lora_size),
    Variant(
        "ConvLoRA",
        "loralib",
        {"rank": 2, "factorization": "loralib"},
        _loralib_size,
        fits=_square_2d,
    ),
    Variant(
        "DecayingLoRA",
        "decaying",
        {"rank": 2, "alpha": 3, "end_step": 4},
        _lora_size,
        exact_start=False,
    ),
    Variant(
        "DecayingLoRA",
        "decaying_bias",
        {
            "rank": 2,
            "end_step": 4,
            "schedule": "cosine",
            "min_decay": 0.1,
            "residual": "full",
            "decay_bias": True,
        },
        _lora_size,
        fits=_one_per_view,
        starts_as_base=False,
    ),
    Variant("DyLoRADense", "dylora", {"rank": 2, "alpha": 3}, _lora_size),
    Variant(
        "DyLoRADense",
        "dylora_frozen",
        {"rank": 2, "frozen": True},
        _lora_size,
        fits=lambda case: case.name in ("dense", "conv_2d_strided"),
    ),
    Variant(
        "AdaLoRADense",
        "adalora",
        {"rank": 2, "alpha": 3},
        lambda case, layer: 2 * case.size + 2,
    ),
    Variant("SpectralDense", "additive", {"rank": 2}, _lora_size),
    Variant(
        "SpectralDense",
        "columns",
        {"rank": 2, "columns": [2, 0]},
        _lora_size,
        fits=lambda case: case.name in ("dense", "conv_2d"),
    ),
    Variant(
        "SpectralDense",
        "rotate",
        {"rank": 2, "mode": "rotate"},
        lambda case, layer: 10,
        fits=_one_per_view,
    ),
    Variant(
        "SpectralDense",
        "values",
        {"mode": "values"},
        _all_values,
        fits=_one_per_view,
    ),
    Variant(
        "GatedSpectralDense",
        "gated",
        {"directions": 2},
        lambda case, layer: 2,
    ),
    Variant(
        "ConditionalSpectralDense",
        "conditional",
        {"rank": 2, "hidden": 8, "embedding": 3, "alpha": 1.0},
        _conditional_size,
        merges=False,
    ),
]


def _runs(variant, case):
    """LoRA proves the views on all backends, torch all adapters on all
    kinds; where each case is compiled, the other adapters run on a few."""
    everywhere = variant.adapter in ("LoRADense", "ConvLoRA")
    everywhere = everywhere or keras.backend.backend() == "torch"
    few = ("dense", "einsum_batched", "conv_2d_strided", "embedding")
    return variant.fits(case) and (everywhere or case.name in few)


PAIRS = [
    pytest.param(variant, case, id=f"{variant.name}-{case.name}")
    for variant in VARIANTS
    for case in KINDS[variant.adapter]
    if _runs(variant, case)
]
CONTRACT = pytest.mark.parametrize(("variant", "case"), PAIRS)
MERGING = pytest.mark.parametrize(
    ("variant", "case"), [pair for pair in PAIRS if pair.values[0].merges]
)


def test_no_adapter_skips_the_contract():
    adapters = {
        name
        for name in ks.__all__
        if inspect.isclass(getattr(ks, name))
        and issubclass(getattr(ks, name), ks.AdapterLayer)
        and not issubclass(getattr(ks, name), BlockAdapter)
    } - {"AdapterLayer"}
    assert adapters == set(KINDS) == {variant.adapter for variant in VARIANTS}


def _model(case, dtype=None):
    """Input -> the case's layer, with a frozen copy of its plain outputs."""
    kind = "int32" if case.tokens else dtype and "float32"
    inputs = keras.Input(case.shape[1:], dtype=kind)
    layer = case.make()
    if dtype:
        layer = type(layer).from_config({**layer.get_config(), "dtype": dtype})
    return keras.Model(inputs, layer(inputs)), layer


def _wrapped(variant, case, dtype=None):
    model, layer = _model(case, dtype)
    plain = _numpy(model(case.inputs()))
    cls = getattr(ks, variant.adapter)
    ks.wrap_model(model, cls, target=lambda x: x is layer, **variant.options)
    adapter = next(x for x in model.layers if isinstance(x, cls))
    return model, adapter, plain


def _randomize(adapter):
    rng = np.random.default_rng(5)
    for weight in adapter.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    if isinstance(adapter, ks.DecayingLoRA):
        adapter.step.assign(2)  # half of the way


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
    _randomize(adapter)
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
    effective = adapter.view.to_matrix(getattr(adapter, _kernel_name(adapter)))
    ks.unwrap_model(model)
    assert base in model.layers and base.trainable
    for weight, value in zip(base.weights, values):
        np.testing.assert_array_equal(weight.numpy(), value)
    np.testing.assert_array_equal(_numpy(model(case.inputs())), _numpy(plain))
    # The adapter still exists: fold it in by hand, then see its outputs.
    adapter.hold()
    adapter.merge()
    adapter.release()
    _check_close(model(case.inputs()), adapted)
    _check_close(adapter.view.matrix(), effective)


def _kernel_name(adapter):
    return adapter.view.kernel_name


@MERGING
def test_merge_model_gives_plain_layers_with_the_same_outputs(variant, case):
    model, adapter, _ = _wrapped(variant, case)
    _randomize(adapter)
    adapted = model(case.inputs())
    ks.merge_model(model)
    assert adapter not in model.layers and adapter.layer in model.layers
    _check_close(model(case.inputs()), adapted)


@MERGING
def test_equals_its_formula(variant, case):
    """The output is the base's with `K + delta` for a kernel."""
    model, adapter, _ = _wrapped(variant, case)
    _randomize(adapter)
    got = model(case.inputs())
    matrix = _numpy(adapter.view.matrix()) + oracle(variant, adapter)
    ks.unwrap_model(model)
    adapter.view.assign(matrix)
    bias = getattr(adapter.layer, "bias", None)
    if variant.options.get("decay_bias") and bias is not None:
        bias.assign(bias * 0.55)
    _check_close(got, model(case.inputs()))


def oracle(variant, adapter):
    """The added matrix, in numpy float64 from the method's own formula."""
    own = own_variables(adapter)
    weights = {w.name: np.float64(_numpy(w)) for w in own}
    del weights["scale"]
    if "u" in weights:
        delta, scale = _spectral_oracle(variant, **weights), 1.0
    else:
        rank = variant.options["rank"]
        alpha = variant.options.get("alpha", rank)
        root = variant.options.get("scaling") == "rslora"
        scale = alpha / np.sqrt(rank) if root else alpha / rank
        if variant.adapter == "AdaLoRADense":
            scale = alpha / (rank + 1e-5)
            weights["lora_a"] *= weights["lora_e"]
        if variant.options.get("factorization") == "loralib":
            return _loralib_oracle(adapter, scale, **weights)
        delta = weights["lora_a"] @ weights["lora_b"]
    if variant.adapter == "DecayingLoRA":
        return _decaying_oracle(variant, adapter, scale, delta, weights)
    if variant.options.get("initializer") == "pissa":
        delta -= weights["start_a"] @ weights["start_b"]
    return np.float32(scale * delta * _blocks(adapter, delta.shape))


def _blocks(adapter, shape):
    """Ones where a grouped convolution has weights."""
    groups = getattr(adapter.layer, "groups", 1)
    ones = np.ones((shape[0] // groups, shape[1] // groups))
    return np.kron(np.eye(groups), ones)


def _decaying_oracle(variant, adapter, scale, delta, weights):
    share, low = 0.5, variant.options.get("min_decay", 0.0)
    decay = 1 - (1 - low) * share  # of the cosine as well, half of the way
    kernel = np.float64(_numpy(adapter.view.matrix()))
    if "start_a" in weights:
        delta = delta - decay * (weights["start_a"] @ weights["start_b"])
    delta = scale * delta * _blocks(adapter, delta.shape)
    return np.float32(delta - (1 - decay) * kernel)


def _loralib_oracle(adapter, scale, lora_a, lora_b):
    size, _, c_in, c_out = adapter.layer.kernel.shape
    flat = (lora_b @ lora_a).reshape(-1)
    kernel = np.zeros((size, size, c_in, c_out))
    for i, j, c, o in np.ndindex(*kernel.shape):
        kernel[i, j, c, o] = flat[((o * c_in + c) * size + i) * size + j]
    return _numpy(adapter.view.to_matrix(np.float32(scale * kernel)))


def _spectral_oracle(variant, u, s, v, **weights):
    """K' - K; of K only the triplets u, s, v change."""
    new_u, new_s, new_v = u, s, v
    if "gates" in weights:
        new_s = s * (1 + weights["gates"])
    elif "delta_s" in weights:
        new_s = np.maximum(s + weights["delta_s"], 0)
    elif "delta_u" in weights:
        new_u, new_v = u + weights["delta_u"], v + weights["delta_v"]
    else:
        new_u = u @ _rotation(weights["angles_u"])
        new_v = v @ _rotation(weights["angles_v"])
        new_s = s * weights["stretch"]
    return new_u @ np.diag(new_s) @ new_v.T - u @ np.diag(s) @ v.T


def _rotation(x):
    z, eye = (x - x.T) / 2, np.eye(len(x))
    return (eye - z) @ np.linalg.inv(eye + z)


@CONTRACT
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
    _randomize(adapter)
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


@CONTRACT
def test_mixed_bfloat16(variant, case):
    model, adapter, plain = _wrapped(variant, case, "mixed_bfloat16")
    assert adapter.compute_dtype == "bfloat16"
    assert all(w.dtype == "float32" for w in adapter.trainable_weights)
    _randomize(adapter)
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


@CONTRACT
def test_adapter_file_round_trip(variant, case, tmp_path):
    model, adapter, _ = _wrapped(variant, case)
    _randomize(adapter)
    adapted = model(case.inputs())
    ks.save_adapters(model, tmp_path / "adapters.safetensors")
    ks.unwrap_model(model)
    ks.load_adapters(model, tmp_path / "adapters.safetensors")
    _check_close(model(case.inputs()), adapted, 1e-6)


@CONTRACT
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
