"""Layers that are not what they look like, and some that are."""

import keras
import layer_cases
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels import probe

# PyTorch, which compiles nothing, tries every kind; the others one a view.
ONE_A_VIEW = """
    dense einsum_kernel_last einsum_batched conv_2d_strided conv_2d_groups
    conv_separable conv_transpose embedding
""".split()
CASES = pytest.mark.parametrize(
    "case",
    [
        case
        for case in layer_cases.ALL
        if keras.backend.backend() == "torch" or case.name in ONE_A_VIEW
    ],
    ids=lambda case: case.name,
)


class Standardised(layers.Dense):
    def call(self, x, training=None):
        kernel = self.kernel
        kernel = (kernel - ops.mean(kernel, 0)) / (ops.std(kernel, 0) + 1e-5)
        x = ops.matmul(x, kernel) + self.bias
        return x if self.activation is None else self.activation(x)


class StandardisedKernel(layers.Dense):
    @property
    def kernel(self):
        return self._kernel - ops.mean(self._kernel, 0)


class StandardisedConvolution(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - ops.mean(kernel))


class Clipped(layers.Dense):
    def call(self, x):
        return super().call(ops.clip(x, -5.0, 5.0))


class Squared(layers.EinsumDense):
    def call(self, x):
        x = super().call(x)
        return x + 0.1 * x**2


class Scaled(layers.Embedding):
    def call(self, x):
        return 8.0 * super().call(x)


class Twice(layers.Dense):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class WithContext(layers.Dense):
    def call(self, x, context=None):
        return super().call(x) * context


class BiasTwice:
    def call(self, x):
        return super().call(x) + self.bias


class Mixed(BiasTwice, layers.Dense):
    pass


def _model(layer):
    shape = (6, 6, 8) if isinstance(layer, layers.Conv2D) else (16,)
    kind = "float32"
    if isinstance(layer, layers.Embedding):
        shape, kind = (3,), "int32"
    if isinstance(layer, layers.EinsumDense):
        shape = (4, 16)
    last = layers.Dense(4, name="last")
    inputs = keras.Input(shape, dtype=kind)
    return keras.Sequential([inputs, layer, last])


def _patched(**options):
    layer = layers.Dense(32, name="d", **options)
    layer.build((None, 16))
    plain = layer.call
    layer.call = lambda x: 2 * plain(x)
    return layer


OTHER = {
    "call": lambda: Standardised(32, activation="relu", name="d"),
    "kernel": lambda: StandardisedKernel(32, name="d"),
    "convolution_op": lambda: StandardisedConvolution(8, 3, name="d"),
    "clipped": lambda: Clipped(32, name="d"),
    "squared": lambda: Squared("abc,cd->abd", (4, 32), name="d"),
    "embedding": lambda: Scaled(20, 8, name="d"),
    "__call__": lambda: Twice(32, name="d"),
    "mixin": lambda: Mixed(32, name="d"),
    "patched": _patched,
}


@pytest.mark.filterwarnings("ignore:.*is also held by:UserWarning")
@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("how", ["wrap", "compress"])
def test_a_layer_that_computes_something_else_is_refused(make, how):
    layer = make()
    model = _model(layer)
    before = [w.numpy() for w in model.weights]
    name = type(layer).__name__
    with pytest.raises(ValueError, match=f"'d'.* is a {name} with .*exclude"):
        if how == "wrap":
            ks.wrap_model(model, "lora", target="d", rank=2)
        else:
            ks.compress_model(model, 0.3, target="d")
    assert model.layers[0] is layer and layer.trainable
    for weight, value in zip(model.weights, before):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_the_reason_is_named():
    reasons = {
        "call": "`call` of its own .* off by",
        "kernel": "its `kernel` is no variable",
        "convolution_op": "`convolution_op` of its own",
        "mixin": "`call` of its own .* those of Dense",
    }
    for name, reason in reasons.items():
        layer = OTHER[name]()
        _model(layer)
        with pytest.raises(ValueError, match=reason):
            kernel_view(layer)
    layer = WithContext(32, name="d")
    layer.build((None, 16))
    with pytest.raises(ValueError, match="cannot be tried"):
        kernel_view(layer)


def _logging(cls):
    """A subclass that counts its calls in a variable."""

    class Logging(cls):
        def build(self, input_shape=None):
            super().build(input_shape)
            self.count = self.add_weight(
                shape=(), initializer="zeros", trainable=False
            )

        def call(self, x, **kwargs):
            self.count.assign(self.count + 1)
            return super().call(x, **kwargs)

    return Logging


@CASES
def test_a_layer_that_is_honest_passes_and_is_not_touched(case):
    plain = case.make()
    cls = _logging(type(plain))
    layer = cls.from_config(plain.get_config())
    layer(case.inputs())
    before = {id(w): w.numpy() for w in layer.weights}
    activation = getattr(layer, "activation", None)
    view = kernel_view(layer)
    assert probe.changed_parts(layer, type(plain)) == ["call"]
    assert view.n_in + view.n_out == case.size
    for weight in layer.weights:
        np.testing.assert_array_equal(weight.numpy(), before[id(weight)])
    assert getattr(layer, "activation", None) is activation


@CASES
def test_a_small_lie_is_found_on_every_kind(case):
    plain = case.make()

    class Other(type(plain)):
        def call(self, x, **kwargs):
            x = super().call(x, **kwargs)
            return x + 0.01 * ops.abs(x)

    layer = Other.from_config(plain.get_config())
    layer(case.inputs())
    with pytest.raises(ValueError, match="off by"):
        kernel_view(layer)


@CASES
def test_plain_layers_are_trusted_without_a_trial(case, monkeypatch):
    monkeypatch.setattr(probe, "_problem", None)
    plain = case.make()
    named = type("Named", (type(plain),), {"__doc__": "Another name."})
    for layer in (plain, named.from_config(plain.get_config())):
        layer(case.inputs())
        assert kernel_view(layer).layer is layer


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float64"])
def test_other_dtypes(dtype):
    if dtype == "float64" and keras.backend.backend() == "jax":
        dtype = "float32"  # JAX has no float64 unless switched on
    honest = _logging(layers.Dense)(32, dtype=dtype)
    other = Standardised(32, dtype=dtype)
    for layer in (honest, other):
        layer.build((None, 16))
    kernel_view(honest)
    with pytest.raises(ValueError, match="off by"):
        kernel_view(other)


def test_quantised_layers():
    class Calls(layers.Dense):
        def quantized_call(self, x, **kwargs):
            return super().quantized_call(x, **kwargs)

    class Rectified(layers.Dense):
        def quantized_call(self, x, **kwargs):
            return ops.relu(super().quantized_call(x, **kwargs))

    for cls in (Calls, Rectified):
        layer = cls(32)
        layer.build((None, 16))
        layer.quantize("int8", type_check=False)
        if cls is Calls:
            kernel_view(layer)
            continue
        with pytest.raises(ValueError, match="not linear"):
            kernel_view(layer)


def test_an_output_projection_of_its_own_is_found():
    class Table(layers.ReversibleEmbedding):
        def call(self, inputs, reverse=False):
            outputs = super().call(inputs, reverse=reverse)
            return 2 * outputs if reverse else outputs

    layer = Table(20, 8)
    layer.build((None, 3))
    with pytest.raises(ValueError, match="off by"):
        kernel_view(layer)


def test_factorised_layers():
    class Calls(ks.LowRank):
        def call(self, inputs):
            return super().call(inputs)

    class Other(ks.LowRank):
        def call(self, inputs):
            return 2 * super().call(inputs)

    for cls in (Calls, Other):
        layer = cls(layers.Dense(2, use_bias=False), layers.Dense(8))
        layer.build((None, 16))
        if cls is Calls:
            kernel_view(layer)
            continue
        with pytest.raises(ValueError, match="off by"):
            kernel_view(layer)


def test_an_honest_subclass_is_wrapped_and_merged():
    model = _model(_logging(layers.Dense)(32, activation="relu", name="d"))
    x = np.random.default_rng(0).normal(size=(5, 16)).astype("float32")
    ks.wrap_model(model, "lora", target="d", rank=2)
    weight = model.layers[0].lora_b
    weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    expected = ops.convert_to_numpy(model(x))
    ks.merge_model(model)
    got = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_trial_within_a_trace():
    """Sequential models without an input are built while they are traced."""

    class Calls(layers.Dense):
        def call(self, x):
            return super().call(x)

    for cls, is_refused in ((Calls, False), (Clipped, True)):
        adapter = ks.LoRADense(cls(3, name="d"), rank=2)
        model = keras.Sequential([adapter])
        model.compile("sgd", "mse")
        data = np.ones((4, 16), "float32"), np.ones((4, 3), "float32")
        if is_refused:
            # Keras 3.12 makes a RuntimeError of it.
            with pytest.raises((ValueError, RuntimeError), match="off by"):
                model.fit(*data, verbose=0)
        else:
            model.fit(*data, verbose=0)


@pytest.mark.parametrize("target", ["all", lambda layer: True])
def test_what_is_refused_does_not_fit(target):
    model = _model(OTHER["call"]())
    ks.wrap_model(model, "lora", target=target, rank=2)
    first, last = model.layers
    assert type(first) is Standardised and isinstance(last, ks.LoRADense)


def test_what_is_refused_stays_as_it_is_in_a_compressed_model():
    other = OTHER["call"]()
    inputs = [keras.Input((16,)), other]
    model = keras.Sequential([*inputs, layers.Dense(24, name="last")])
    small = ks.compress_model(model, 0.5)
    first, last = small.layers
    assert type(first) is Standardised and isinstance(last, ks.LowRank)
    x = np.ones((2, 16), "float32")
    np.testing.assert_allclose(
        ops.convert_to_numpy(first(x)),
        ops.convert_to_numpy(other(x)),
        atol=1e-6,
    )


def test_what_is_not_built_does_not_fit():
    class Half(keras.Model):
        def __init__(self):
            super().__init__()
            self.used = layers.Dense(8, name="used")
            self.unused = layers.Dense(8, name="unused")

        def build(self, input_shape):
            self.used.build(input_shape)
            self.built = True

        def call(self, x):
            return self.used(x)

    model = Half()
    model(np.ones((2, 16), "float32"))
    ks.wrap_model(model, "lora", target=lambda layer: True, rank=2)
    assert isinstance(model.used, ks.LoRADense)
    assert type(model.unused) is layers.Dense and not model.unused.built
