import keras
import numpy as np
import pytest
from golden import folder
from keras import ops

import keras_spectral as ks
from keras_spectral._internal.products import thin_equations
from keras_spectral.layers import METHODS
from keras_spectral.layers.member import own_weights
from keras_spectral.layers.multi_kernel import MultiKernelLoRA

RNG = np.random.default_rng(0)


@keras.saving.register_keras_serializable("tests")
class TwoExperts(keras.layers.Layer):
    """Two kernels an expert, with a bias, as KerasHub's banks are written."""

    def __init__(self, width=10, count=4, **kwargs):
        super().__init__(**kwargs)
        self.width, self.count = width, count

    def build(self, shape):
        n = shape[-1]
        self.up = self.add_weight(shape=(self.count, n, self.width), name="up")
        self.up_bias = self.add_weight(
            shape=(self.count, self.width), name="up_bias"
        )
        self._down = self.add_weight(
            shape=(self.count, self.width, n), name="down"
        )

    def call(self, x):
        hidden = ops.einsum("th,ehm->etm", x, ops.cast(self.up, x.dtype))
        hidden = ops.tanh(hidden + self.up_bias[:, None])
        return ops.einsum("eti,eih->eth", hidden, self._down)

    def compute_output_shape(self, shape):
        return (self.count, *shape)

    def get_config(self):
        own = {"width": self.width, "count": self.count}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable("tests")
class Mixture(keras.layers.Layer):
    """Routes tokens to all experts, by weights from the input."""

    def build(self, shape):
        self.router = keras.layers.Dense(4, name="router")
        self.router.build(shape)
        self.bank = TwoExperts(name="experts")
        self.bank.build((None, shape[-1]))

    def call(self, x):
        flat = ops.reshape(x, (-1, x.shape[-1]))
        weights = ops.transpose(ops.softmax(self.router(flat)))
        total = ops.sum(self.bank(flat) * weights[..., None], axis=0)
        return ops.reshape(total, ops.shape(x))

    def compute_output_shape(self, shape):
        return shape


def _mixture():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3, 6))
    x = Mixture(name="moe")(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def _recurrent(kind=keras.layers.LSTM, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 6))
    x = kind(4, name="rnn", **options)(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="head")(x))


def _bidirectional():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((5, 6))
    x = layers.Masking(name="mask")(inputs)
    x = layers.Bidirectional(layers.GRU(4, name="gru"), name="both")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


CASES = {
    "experts": (_mixture, "lora_experts", "experts"),
    "lstm": (_recurrent, "lora_recurrent", "recurrent"),
    "gru": (
        lambda: _recurrent(keras.layers.GRU, unroll=True),
        "lora_recurrent",
        "recurrent",
    ),
    "simple": (
        lambda: _recurrent(keras.layers.SimpleRNN, dropout=0.1),
        "lora_recurrent",
        "recurrent",
    ),
    "both": (_bidirectional, "lora_recurrent", "recurrent"),
}
ALL = pytest.mark.parametrize("case", CASES)


def _inputs(model):
    return RNG.normal(size=(8, *model.input_shape[1:])).astype("float32")


def _np(x):
    return ops.convert_to_numpy(x)


def _wrapped(case, adapter="default"):
    make, method, target = CASES[case]
    model = make()
    x = _inputs(model)
    plain = _np(model(x))
    ks.wrap_model(model, method, target, rank=2, alpha=6, adapter=adapter)
    return model, x, plain


def _members(model):
    from keras_spectral.model.hosts import members

    return members(model)


def _move(model):
    for weight in model.trainable_weights:
        weight.assign(weight + RNG.normal(0, 0.3, weight.shape))


def test_no_adapter_of_several_kernels_is_left_out():
    several = {
        name
        for name, kind in METHODS.items()
        if issubclass(kind, MultiKernelLoRA)
    }
    assert several == {method for _, method, _ in CASES.values()}


@ALL
def test_contract(case, tmp_path):
    model, x, plain = _wrapped(case)
    np.testing.assert_array_equal(_np(model(x)), plain)
    base = [w.numpy() for m in _members(model) for w in m.layer.weights]
    y = np.ones((8, *model.output_shape[1:]))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    before = [w.numpy() for w in model.trainable_weights]
    assert len(before) == 4 * len(_members(model))
    model.fit(x, y, epochs=3, verbose=0)
    for old, weight in zip(before, model.trainable_weights):
        assert np.abs(old - weight.numpy()).max() > 0, weight.path
    after = [w.numpy() for m in _members(model) for w in m.layer.weights]
    for old, new in zip(base, after):
        np.testing.assert_array_equal(old, new)
    _move(model)
    adapted = _np(model(x))
    assert np.abs(adapted - plain).max() > 1e-3
    np.testing.assert_allclose(model.predict(x, verbose=0), adapted, atol=1e-5)
    with ks.adapters_disabled(model):
        np.testing.assert_array_equal(_np(model(x)), plain)
    ks.save_adapters(model, tmp_path / "file.safetensors")
    again = ks.load_adapters(CASES[case][0](), tmp_path / "file.safetensors")
    np.testing.assert_allclose(_np(again(x)), adapted, atol=1e-6)
    with ks.merged(model):
        np.testing.assert_allclose(_np(model(x)), adapted, atol=1e-5)
    ks.adapter_summary(model)
    ks.merge_model(model)
    np.testing.assert_allclose(_np(model(x)), adapted, atol=1e-5)


@ALL
def test_two_adapters_add_up(case):
    model, x, plain = _wrapped(case, "one")
    _move(model)
    _, method, target = CASES[case]
    ks.wrap_model(model, method, target, rank=3, adapter="two")
    np.testing.assert_allclose(_np(model(x)), plain, atol=1e-6)
    _move(model)
    for strengths in ({"one": 1.0}, {"one": 0.5, "two": -1.0}):
        ks.set_adapters(model, strengths)
        adapted = _np(model(x))
        with ks.merged(model):
            np.testing.assert_allclose(_np(model(x)), adapted, atol=1e-5)
    ks.set_adapters(model, [])
    np.testing.assert_array_equal(_np(model(x)), plain)
    for weight in model.get_layer("head").weights:
        assert np.isfinite(weight.numpy()).all()
    for member in _members(model):
        for weight in own_weights(member):
            if len(weight.shape):
                weight.assign(np.full(weight.shape, np.nan))
    np.testing.assert_array_equal(_np(model(x)), plain)


@pytest.mark.parametrize("case", ["lstm", "gru"])
def test_each_example_through_its_own(case):
    model, x, plain = _wrapped(case, "one")
    _move(model)
    adapted = _np(model(x))
    with ks.mixed_batch(model, ["one", None] * 4):
        rows = _np(model(x))
    np.testing.assert_allclose(rows[::2], adapted[::2], atol=1e-5)
    np.testing.assert_allclose(rows[1::2], plain[1::2], atol=1e-5)


@pytest.mark.parametrize("case", ["lstm", "gru", "simple"])
def test_whole_models_are_saved(case, tmp_path):
    model, x, _ = _wrapped(case)
    _move(model)
    adapted = _np(model(x))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_np(again(x)), adapted, atol=1e-6)


def test_golden_numbers():
    """HF PEFT's factors of stacked experts give its outputs."""
    if not (folder() / "lora_experts.npz").exists():
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    found = np.load(folder() / "lora_experts.npz")
    arrays = {k.removeprefix("out_in/"): found[k] for k in found.files}

    class StackedExperts(keras.layers.Layer):
        def build(self, shape):
            self.up = self.add_weight(shape=(4, 6, 10))
            self.down = self.add_weight(shape=(4, 10, 6))

        def call(self, x):
            hidden = ops.tanh(ops.einsum("etn,enm->etm", x, self.up))
            return ops.einsum("etm,emn->etn", hidden, self.down)

    layer = StackedExperts()
    layer.build((4, None, 6))
    layer.up.assign(arrays["up"].transpose(0, 2, 1))
    layer.down.assign(arrays["down"].transpose(0, 2, 1))
    kernels = {"up": "experts.base_layer", "down": "experts"}
    pairs = {}
    for name, key in kernels.items():
        a = arrays[f"param.{key}.lora_A.weight"]
        b = arrays[f"param.{key}.lora_B.weight"]
        a = a.reshape(4, 3, -1).transpose(0, 2, 1)
        b = b.reshape(len(b), 3, 4).transpose(2, 1, 0)
        pairs[name] = np.float32(a), np.float32(2 * b)
    from keras_spectral._internal.products import with_pairs

    x = arrays["x"]
    got = _np(with_pairs(layer, pairs)(x))
    np.testing.assert_allclose(got, arrays["y"], atol=1e-5)
    np.testing.assert_allclose(_np(layer(x)), arrays["y_base"], atol=1e-5)


def test_equations():
    assert thin_equations("th,ehm->etm") == ("th,ehr->etr", "etr,erm->etm")
    assert thin_equations("eti, eih -> eth") == ("eti,eir->etr", "etr,erh->eth")


def test_experts_that_multiply_otherwise_are_refused():
    class OddExperts(keras.layers.Layer):
        def build(self, shape):
            self.up = self.add_weight(shape=(2, shape[-1], 4))

        def call(self, x):
            return ops.matmul(x[None], self.up)

    layer = ks.LoRAExperts(OddExperts(), rank=1)
    with pytest.raises(ValueError, match="in a way that LoRAExperts"):
        layer.build((None, 3))
    assert layer.layer.trainable


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ks.LoRAExperts(keras.layers.Dense(3)), "fused experts"),
        (lambda: ks.LoRARecurrent(keras.layers.Dense(3)), "an LSTM, GRU"),
        (lambda: ks.LoRARecurrent(keras.layers.LSTM(3), rank=0), "rank=0"),
    ],
)
def test_what_it_refuses(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_rank_that_does_not_fit():
    layer = ks.LoRARecurrent(keras.layers.LSTM(3), rank=4)
    with pytest.raises(ValueError, match="'recurrent_kernel' is 3 x 12"):
        layer.build((None, 5, 6))
