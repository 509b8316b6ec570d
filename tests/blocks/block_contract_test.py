"""What every adapter of a block promises."""

import block_cases
import keras
import numpy as np
import pytest
import variants
from block_cases import TOKENS
from block_cases import WIDTH
from keras import ops

import keras_spectral as ks
from keras_spectral.blocks import BlockAdapter
from keras_spectral.layers.member import own_weights
from keras_spectral.model.hosts import adapter_places

VARIANTS = variants.collected("blocks")
# TensorFlow compiles one variant of each method, and runs the others eagerly;
# off PyTorch files, dtypes and pairs are tried with one of each method.
FIRST = list({v.adapter: v for v in reversed(VARIANTS)}.values())
ON_TORCH = keras.backend.backend() == "torch"
PARAMS = [
    pytest.param(v, id=v.name, marks=[pytest.mark.compiled] * (v in FIRST))
    for v in VARIANTS
]
CONTRACT = pytest.mark.parametrize("variant", PARAMS)
PAIRED = pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=v.name) for v in VARIANTS if ON_TORCH or v in FIRST],
)


def test_no_adapter_of_blocks_skips_the_contract():
    # SoftPrompt is around a whole backbone: `soft_prompt_test.py`.
    without = variants.without_variants(ks, BlockAdapter, VARIANTS)
    assert without == []


def _numpy(x):
    return ops.convert_to_numpy(ops.cast(x, "float32"))


def _outputs(model):
    return _numpy(model(block_cases.inputs()))


def _options(variant):
    seeded = "seed" in variant.adapter.option_names()
    return {**variant.options, **({"seed": 1} if seeded else {})}


def _wrapped(variant, dtype=None, adapter="default"):
    model = block_cases.model(dtype=dtype)
    plain = _outputs(model)
    cls = variant.adapter
    ks.wrap_model(model, cls, adapter=adapter, **_options(variant))
    adapters = [place.layer for place in adapter_places(model)]
    assert [type(adapter) for adapter in adapters] == [cls, cls]
    return model, adapters, plain


def _randomize(adapters):
    rng = np.random.default_rng(5)
    for adapter in adapters:
        for weight in adapter.trainable_weights:
            weight.assign(weight + rng.normal(0, 0.5, weight.shape))


def _fit(model, variant, y):
    model.compile(optimizer=keras.optimizers.Adam(0.05), loss="mse")
    # TensorFlow traces a step twice if the optimizer makes its variables in it.
    model.optimizer.build(model.trainable_variables)
    # Gumbel gates leave a part out of some steps.
    epochs = 8 if variant.name == "gumbel" else 2
    model.fit(block_cases.inputs(), y, epochs=epochs, verbose=0)


@CONTRACT
def test_starts_as_the_base_with_the_right_count(variant):
    model, _, plain = _wrapped(variant)
    got = _outputs(model)
    assert np.array_equal(got, plain) == variant.starts_as_base
    assert np.isfinite(got).all()
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert count == 2 * variant.size


@CONTRACT
def test_fit_moves_the_adapters_and_nothing_else(variant):
    model, adapters, plain = _wrapped(variant)
    frozen = [w.numpy() for a in adapters for w in a.layer.weights]
    before = [w.numpy() for w in model.trainable_weights]
    model.trainable = True  # must not thaw the base
    _fit(model, variant, 2 * plain + 1)
    after = [w for a in adapters for w in a.layer.weights]
    for weight, value in zip(after, frozen):
        np.testing.assert_array_equal(weight.numpy(), value)
    for weight, value in zip(model.trainable_weights, before):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path


@CONTRACT
def test_disabled_and_unwrapped(variant):
    model, adapters, plain = _wrapped(variant)
    _randomize(adapters)
    adapted = _outputs(model)
    assert np.abs(adapted - plain).max() > 1e-3
    with ks.adapters_disabled(model):
        # A prefix that is masked leaves the last digit of a sum to chance.
        np.testing.assert_allclose(_outputs(model), plain, atol=1e-6)
    with ks.unwrapped(model):
        np.testing.assert_array_equal(_outputs(model), plain)
    np.testing.assert_allclose(_outputs(model), adapted, atol=1e-6)
    with pytest.raises(ValueError, match="cannot be merged"):
        ks.merge_model(model)
    ks.unwrap_model(model)
    np.testing.assert_array_equal(_outputs(model), plain)
    for name in ("block_0", "block_1"):
        block = model.get_layer(name)
        assert len(block.trainable_weights) == len(block.weights)


@CONTRACT
def test_padding_is_without_effect(variant):
    if not variant.options.get("mask_padding", True):
        return
    model, adapters, _ = _wrapped(variant)
    _randomize(adapters)
    inputs = block_cases.inputs()
    kept = inputs["mask"] == 1
    before = _outputs(model)[kept]
    inputs["x"] = np.where(kept[..., None], inputs["x"], 7.0)
    np.testing.assert_allclose(_numpy(model(inputs))[kept], before, atol=1e-5)


@PAIRED
def test_hand_built_layers_round_trip_and_go_on_learning(variant, tmp_path):
    cls = variant.adapter
    layers = [
        cls(block_cases.Block(name=f"block_{i}"), **_options(variant))
        for i in range(2)
    ]
    model = block_cases.model(layers)
    _randomize(layers)
    expected = _outputs(model)
    assert model.output_shape == (None, TOKENS, WIDTH)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_outputs(again), expected, atol=1e-6)
    other = again.get_layer("block_0")
    assert other.options() == layers[0].options()
    before = [w.numpy() for w in other.trainable_weights]
    again.compile(optimizer="sgd", loss="mse")
    again.fit(block_cases.inputs(), np.ones_like(expected), verbose=0)
    after = [w.numpy() for w in other.trainable_weights]
    assert any(np.abs(x - y).max() > 0 for x, y in zip(before, after))


@PAIRED
def test_adapter_file_round_trip(variant, tmp_path):
    model, adapters, _ = _wrapped(variant)
    _randomize(adapters)
    adapted = _outputs(model)
    ks.save_adapters(model, tmp_path / "adapters.safetensors")
    fresh = block_cases.model()
    for new, old in zip(
        fresh.weights, model.get_layer("block_0").layer.weights
    ):
        assert new.shape == old.shape
    ks.unwrap_model(model)
    ks.load_adapters(model, tmp_path / "adapters.safetensors")
    np.testing.assert_allclose(_outputs(model), adapted, atol=1e-6)


@PAIRED
def test_mixed_bfloat16(variant):
    expected = _outputs(_wrapped(variant)[0])
    model, _, plain = _wrapped(variant, "mixed_bfloat16")
    outputs = model(block_cases.inputs())
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert all(w.dtype == "float32" for w in model.trainable_weights)
    np.testing.assert_allclose(_numpy(outputs), expected, atol=0.1)
    model.compile(optimizer="adam", loss="mse")
    model.fit(block_cases.inputs(), plain, verbose=0)


def _with_another(variant, other):
    """Two adapters by name, "one" moved; "two" is active, as it starts."""
    model, adapters, plain = _wrapped(variant, adapter="one")
    start = _outputs(model)
    _randomize(adapters)
    alone = _outputs(model)
    kind, options = variant.adapter, _options(variant)
    if other == "bottleneck":
        kind, start = ks.BottleneckAdapter, plain
        options = {"size": 3, "seed": 1}
    ks.wrap_model(model, kind, adapter="two", **options)
    # A prefix that is masked leaves the last digit of a sum to chance.
    np.testing.assert_allclose(_outputs(model), start, atol=1e-6)
    return model, plain, alone


OTHER = pytest.mark.parametrize("other", ["bottleneck", "itself"])


@OTHER
@PAIRED
def test_two_adapters_mix_and_part(variant, other, tmp_path):
    model, plain, alone = _with_another(variant, other)
    places = adapter_places(model, names=["two"])
    _randomize([place.layer for place in places])
    second = _outputs(model)
    for active, expected in (("one", alone), ("two", second), ([], plain)):
        ks.set_adapters(model, active)
        np.testing.assert_allclose(_outputs(model), expected, atol=1e-6)
    ks.set_adapters(model, {"one": 0.5, "two": 1.0})
    mixed = _outputs(model)
    for other_outputs in (alone, second, plain):
        assert np.abs(mixed - other_outputs).max() > 1e-3
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_outputs(again), mixed, atol=1e-6)
    ks.save_adapters(model, tmp_path / "one.safetensors", adapter="one")
    ks.delete_adapter(model, "two")
    ks.set_adapters(model, "one")
    np.testing.assert_allclose(_outputs(model), alone, atol=1e-6)
    ks.unwrap_model(model)
    np.testing.assert_array_equal(_outputs(model), plain)
    ks.load_adapters(model, tmp_path / "one.safetensors")
    np.testing.assert_allclose(_outputs(model), alone, atol=1e-6)


@OTHER
@PAIRED
def test_of_two_adapters_the_active_one_trains(variant, other):
    model, plain, _ = _with_another(variant, other)
    places = adapter_places(model, names=["one"])
    still = [w for place in places for w in own_weights(place.layer)]
    still += [w for place in places for w in place.layer.layer.weights]
    before = [w.numpy() for w in still]
    trained = [w.numpy() for w in model.trainable_weights]
    _fit(model, variant, 2 * plain + 1)
    for weight, value in zip(still, before):
        np.testing.assert_array_equal(weight.numpy(), value, weight.path)
    for weight, value in zip(model.trainable_weights, trained):
        assert np.abs(weight.numpy() - value).max() > 0, weight.path


def test_an_unknown_block_raises_with_the_way_out():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="register_block"):
        ks.wrap_model(model, "prefix", target="dense.*")
    with pytest.raises(ValueError, match="Nothing in model"):
        ks.wrap_model(model, "prefix")


def test_lora_inside_of_a_wrapped_block_trains_as_well():
    pfeiffer = next(v for v in VARIANTS if v.name == "pfeiffer")
    model, _, plain = _wrapped(pfeiffer)
    ks.wrap_model(model, "lora", target=r"block_\d/attention/query", rank=2)
    assert len(adapter_places(model)) == 4
    extra = 2 * 2 * 2 * WIDTH
    count = sum(np.prod(w.shape) for w in model.trainable_weights)
    assert count == 2 * pfeiffer.size + extra
    model.compile(optimizer="adam", loss="mse")
    model.trainable = True
    assert sum(np.prod(w.shape) for w in model.trainable_weights) == count
    model.fit(block_cases.inputs(), plain + 1, verbose=0)
    ks.unwrap_model(model)
    np.testing.assert_array_equal(_outputs(model), plain)
