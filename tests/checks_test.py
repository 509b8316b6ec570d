import json
import math

import block_cases
import keras
import numpy as np
import pytest
from keras import layers

import keras_spectral as ks
from keras_spectral._internal import checks
from keras_spectral.layers import METHODS
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.gate_network import GateNetwork

pytestmark = pytest.mark.once

BAD_NUMBERS = (math.nan, math.inf, -math.inf, True, "8", None, 1j)


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_numbers(value):
    for check in (checks.check_number, checks.check_alpha, checks.check_whole):
        with pytest.raises(ValueError, match="Received x=.*Expected"):
            check(value, "x")
    with pytest.raises(ValueError, match="Received x=.*whole number"):
        checks.check_rank(value, "x")


def test_numbers_become_pythons_own():
    for value, wanted in ((np.float32(0.5), 0.5), (np.int64(3), 3), (2, 2)):
        got = checks.check_number(value, "x")
        assert got == wanted and type(got) is type(wanted)
    assert type(checks.check_rank(np.int32(4))) is int
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        checks.check_number(1, "x", 0, 1)


def test_flags_are_not_words_nor_numbers():
    assert checks.check_flag(np.bool_(True), "x") is True
    for value in ("no", 0, 1, None, []):
        with pytest.raises(ValueError, match="Expected True or False"):
            checks.check_flag(value, "x")


def test_seeds():
    assert checks.check_seed(None) is None
    assert checks.check_seed(np.int64(7)) == 7
    for value in (True, -1, 1.0, "a", 2**31):
        with pytest.raises(ValueError, match="Received seed="):
            checks.check_seed(value)
    assert checks.derived_seed(None, "a") is None
    assert checks.derived_seed(0, "lora_a") == 1376562350
    assert checks.derived_seed(0, "a") != checks.derived_seed(0, "b")
    assert checks.derived_seed(0, "a") != checks.derived_seed(1, "a")


def test_choices_name_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'rslora'"):
        checks.check_choice("rsLoRA", "scaling", ("standard", "rslora"))
    for value in (True, ["rslora"], np.ones(2)):
        with pytest.raises(ValueError, match="Expected one of"):
            checks.check_choice(value, "scaling", ("standard", "rslora"))


def _dense(name="base"):
    return layers.Dense(8, name=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ks.LoRADense(_dense(), alpha=0),
        lambda: ks.LoRADense(_dense(), alpha=-math.inf),
        lambda: ks.LoRADense(_dense(), dropout=True),
        lambda: ks.LoRADense(_dense(), seed="a"),
        lambda: ks.AdaLoRADense(_dense(), alpha=0),
        lambda: ks.AdaLoRADense(_dense(), orthogonality=math.inf),
        lambda: ks.DyLoRADense(_dense(), alpha=0),
        lambda: ks.DyLoRADense(_dense(), frozen="no"),
        lambda: ks.DyLoRADense(_dense(), seed=True),
        lambda: ks.DecayingLoRA(_dense(), alpha=0),
        lambda: ks.DecayingLoRA(_dense(), decay_bias="no"),
        lambda: ks.DecayingLoRA(_dense(), end_step=2**40),
        lambda: ks.DecayingLoRA(_dense(), start_step=True),
        lambda: ks.ConvLoRA(layers.Conv1D(4, 3), alpha=0),
        lambda: ks.ConditionalSpectralDense(_dense(), alpha=0),
        lambda: ks.ConditionalSpectralDense(_dense(), network=3),
        lambda: ks.ConditionalSpectralDense(_dense(), temperature=math.inf),
        lambda: ks.GatedSpectralDense(_dense(), l1=math.inf),
        lambda: ks.GatedSpectralDense(_dense(), directions=True),
        lambda: ks.SpectralDense(_dense(), columns=[True, False]),
        lambda: GateNetwork(0),
        lambda: GateNetwork(2, seed=1.5),
        lambda: ks.LoRADense("dense"),
        lambda: ks.LoRADense(None),
        lambda: ks.BottleneckAdapter("block"),
        lambda: ks.SoftPrompt("backbone"),
        lambda: ks.LowRank(1, 2),
        lambda: ks.LowRank(_dense(), "up"),
        lambda: ks.blocks.register_block(layers.Dense, "kind"),
        lambda: ks.callbacks.GateMonitor(threshold="a"),
        lambda: ks.callbacks.GateMonitor(threshold=-1),
        lambda: ks.callbacks.GateRecorder(every=True),
        lambda: ks.callbacks.GateRecorder(every=0),
        lambda: ks.callbacks.GateRecorder(path=3),
    ],
)
def test_constructors_refuse(make):
    with pytest.raises(ValueError, match="Received .*Expected|expects"):
        make()


def _attention():
    return layers.MultiHeadAttention(2, 4, name="attention")


@pytest.mark.parametrize(
    "cls, options",
    [
        ("BottleneckAdapter", {"strength": 0}),
        ("BottleneckAdapter", {"strength": math.nan}),
        ("BottleneckAdapter", {"channel_scale": "no"}),
        ("BottleneckAdapter", {"activation": "gellu"}),
        ("BottleneckAdapter", {"activation": lambda x: x}),
        ("BottleneckAdapter", {"seed": -1}),
        ("PrefixTuning", {"length": True}),
        ("PrefixTuning", {"hidden": 0}),
        ("PrefixTuning", {"seed": "a"}),
        ("UniPELTBlock", {"lora": True}),
        ("UniPELTBlock", {"prefix_hidden": 1.5}),
        ("UniPELTBlock", {"mask_padding": "no"}),
        ("UniPELTBlock", {"temperature": math.inf}),
        ("UniPELTBlock", {"warmup_steps": 0.5}),
    ],
)
def test_blocks_refuse(cls, options):
    with pytest.raises(ValueError, match="Received"):
        getattr(ks, cls)(_attention(), **options)


def test_soft_prompt_refuses():
    backbone = keras.Sequential(
        [keras.Input((None,), dtype="int32"), layers.Embedding(9, 4)]
    )
    for options in ({"length": 0}, {"position": True}, {"keep": "yes"}):
        with pytest.raises(ValueError, match="Received"):
            ks.SoftPrompt(backbone, **options)


@keras.saving.register_keras_serializable("tests")
def doubled(x):
    return 2 * x


@pytest.mark.parametrize(
    "given, name",
    [
        (keras.activations.gelu, "gelu"),
        ("swish", "swish"),
        (None, "linear"),
        (doubled, "tests>doubled"),
        ("tests>doubled", "tests>doubled"),
    ],
)
def test_activations_are_kept_by_name(given, name, tmp_path):
    inputs = keras.Input((3, 8))
    make = [keras.Model(inputs, _attention()(inputs, inputs)) for _ in "ab"]
    for model, other in [make]:
        other.set_weights(model.get_weights())
    options = {"placement": "post", "size": 2, "seed": 1}
    model = ks.wrap_model(make[0], "bottleneck", activation=given, **options)
    layer = model.get_layer("attention")
    assert layer.get_config()["activation"] == name
    layer.net.up[0].assign(np.ones((2, 8)))
    ks.save_adapters(model, tmp_path / "a.safetensors")
    ks.load_adapters(make[1], tmp_path / "a.safetensors")
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")
    wanted = keras.ops.convert_to_numpy(model(x))
    got = keras.ops.convert_to_numpy(make[1](x))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_options_can_be_written_as_json():
    options = {"rank": np.int64(2), "alpha": np.float32(4), "seed": np.int8(1)}
    layer = ks.LoRADense(_dense(), **options)
    kept = json.loads(json.dumps(layer.options()))
    assert (kept["rank"], kept["alpha"], kept["seed"]) == (2, 4.0, 1)


def test_a_method_is_not_registered_over_another():
    class Mine(ks.LoRADense):
        pass

    with pytest.raises(ValueError, match="'lora'.*Mine.*LoRADense"):
        register_method("lora")(Mine)
    assert METHODS["lora"] is ks.LoRADense
    again = type("LoRADense", (ks.LoRADense,), {})  # a module loaded anew
    again.__module__ = ks.LoRADense.__module__
    try:
        assert register_method("lora")(again) is METHODS["lora"]
    finally:
        register_method("lora")(ks.LoRADense)


def test_starts_of_one_seed_differ():
    keras.utils.set_random_seed(0)
    ada = ks.AdaLoRADense(layers.Dense(6), rank=3, seed=0)
    ada.build((None, 6))
    a, b = (keras.ops.convert_to_numpy(w) for w in (ada.lora_a, ada.lora_b))
    assert np.abs(a.ravel() - b.ravel()).max() > 1e-3
    decaying = ks.DecayingLoRA(
        layers.Dense(4), rank=4, initializer="fan_in", seed=0
    )
    decaying.build((None, 4))
    a, b = map(keras.ops.convert_to_numpy, (decaying.lora_a, decaying.lora_b))
    assert np.abs(a / np.abs(a).max() - b / np.abs(b).max()).max() > 1e-3
    network = GateNetwork(4, hidden=8, embedding=4, seed=0)
    network.build()
    first, last = (
        keras.ops.convert_to_numpy(w).ravel()
        for w in (network.hidden_kernel, network.logit_kernel)
    )
    assert abs(np.corrcoef(first[:32], last)[0, 1]) < 0.9


@pytest.mark.parametrize(
    "cls, options",
    [
        ("PrefixTuning", {"length": 8, "hidden": 16}),
        ("UniPELTBlock", {"lora": 2, "prefix": 3, "bottleneck": 0}),
    ],
)
def test_starts_within_a_block_differ(cls, options):
    block = _attention()
    x = np.ones((1, 3, 8), "float32")
    block(x, x)
    layer = getattr(ks, cls)(block, seed=0, **options)
    layer(x, x)
    _check_distinct(layer)


def test_starts_of_bottlenecks_differ():
    block = block_cases.Block()
    layer = ks.BottleneckAdapter(block, placement="houlsby", seed=0)
    layer(np.ones((1, 3, block_cases.WIDTH), "float32"))
    _check_distinct(layer)


def _check_distinct(layer):
    """No two starts are the same numbers, but for their scale."""
    starts = [
        keras.ops.convert_to_numpy(w).ravel() for w in layer.trainable_weights
    ]
    starts = [s / np.linalg.norm(s) for s in starts if np.ptp(s) > 0]
    assert len(starts) > 1
    for i, one in enumerate(starts):
        for other in starts[i + 1 :]:
            size = min(len(one), len(other))
            pair = one[:size], other[:size]
            scaled = [s / np.linalg.norm(s) for s in pair]
            assert size < 4 or abs(scaled[0] @ scaled[1]) < 0.95


def test_layers_of_one_wrap_start_apart_and_as_before():
    def starts(seed):
        model = keras.Sequential(
            [keras.Input((6,)), layers.Dense(6), layers.Dense(6)]
        )
        ks.wrap_model(model, "lora", target="all", rank=2, seed=seed)
        return [keras.ops.convert_to_numpy(x.lora_a) for x in model.layers]

    first, second = starts(3)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(starts(3)[0], first)  # names go on counting
    assert np.abs(starts(4)[0] - first).max() > 1e-3
