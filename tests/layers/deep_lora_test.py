import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks
from keras_spectral.layers.deep_lora import deep_lora_factors


def _matrix(variant, adapter, deep_3, deep_2, deep_1, outer_a=1.0, outer_b=1.0):
    product = deep_3 @ deep_2 @ deep_1
    if "rank" in variant.options:
        product = outer_a @ product @ outer_b
    return on_blocks(adapter, product)


def _size(case, layer):
    n_in, n_out = layer_cases.rows(layer), layer_cases.columns(layer)
    width = max(n_in, n_out)
    return width * (n_in + width + n_out)


VARIANTS = [
    Variant(
        ks.DeepLoRADense,
        "deep_lora",
        {},
        _matrix,
        _size,
        exact_start=False,
    ),
    Variant(
        ks.DeepLoRADense,
        "deep_lora_narrow",
        {"width": 2, "eps": 2e-3},
        _matrix,
        lambda case, layer: 2 * case.size + 4,
        cases=layer_cases.named("dense", "conv_2d_strided", "embedding"),
        exact_start=False,
    ),
    # Weights from a file: the outer factors start at random.
    Variant(
        ks.DeepLoRADense,
        "deep_lora_compressed",
        {"rank": 2, "start_data": "loaded"},
        _matrix,
        lambda case, layer: 12,
        exact_start=False,
    ),
    Variant(
        ks.DeepLoRADense,
        "deep_lora_outer",
        {"rank": 2, "outer_rate": 0.5, "start_data": "loaded"},
        _matrix,
        lambda case, layer: 12 + 2 * case.size,
        cases=layer_cases.named("dense", "einsum_batched", "conv_2d_groups"),
        exact_start=False,
    ),
]


def _projector(columns):
    basis, _ = np.linalg.qr(np.float64(columns))
    return basis @ basis.T


def _theirs(gradient, w1, w2, w3, rank, eps):
    """The authors' construction: null vectors of the whole factors."""
    if w1.shape[0] != w1.shape[1]:
        right, left = _theirs(gradient.T, w3.T, w2.T, w1.T, rank, eps)
        return left, right
    half = rank // 2
    u, _, vt = np.linalg.svd((w3 @ w2).T @ gradient)
    a, b = w1.T @ u[:, half:] / eps, vt.T[:, half:]
    both = np.concatenate([a, -b], axis=1)
    _, s, nullt = np.linalg.svd(both)
    null = nullt[np.sum(s > 1e-10) :].T[: a.shape[1]]
    right = np.linalg.svd(a @ null)[0][:, -rank:][:, ::-1]
    return w3 @ w2 @ w1 @ right / eps**3, right


def _check_same(got, expected, atol=1e-5):
    left, right = (ops.convert_to_numpy(x) for x in got)
    for ours, theirs in zip((left, right), expected):
        np.testing.assert_allclose(
            _projector(ours), _projector(theirs), atol=atol
        )
    product = expected[0] @ expected[1].T
    np.testing.assert_allclose(left @ right.T, product, atol=atol)


def test_golden_factors():
    arrays = golden.arrays_of("deep_lora.npz", "square")
    delta, eps = arrays["delta0"], float(arrays["eps"])
    given = np.float32(arrays["kernel_gradient"]), np.float32(delta / eps**3)
    rank = int(arrays["rank"])
    found = deep_lora_factors(*map(ops.convert_to_tensor, given), rank)
    _check_same(found, (arrays["left"], arrays["right"]))
    for side, columns in zip(("left", "right"), found):
        columns = ops.convert_to_numpy(columns)
        projector = arrays[f"projector_{side}"]
        np.testing.assert_allclose(columns @ columns.T, projector, atol=1e-5)
    whole = [arrays[name] for name in ("W1", "W2", "W3")]
    again = _theirs(arrays["kernel_gradient"], *whole, rank, eps)
    _check_same(found, again)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (8, 5)])
def test_factors_as_the_authors_make_them(shape):
    rng = np.random.default_rng(0)
    (n_in, n_out), width = shape, max(shape)

    def draw(rows, columns):
        long = np.linalg.qr(rng.normal(size=(width, width)))[0]
        return 1e-2 * long[:rows, :columns]

    w3, w2, w1 = draw(n_in, width), draw(width, width), draw(width, n_out)
    gradient = rng.normal(size=shape)
    expected = _theirs(gradient, w1, w2, w3, 4, 1e-2)
    given = gradient, w3 @ w2 @ w1 / 1e-6
    given = [ops.convert_to_tensor(x, "float32") for x in given]
    _check_same(deep_lora_factors(*given, 4), expected)


RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6)).astype("float32")
Y = RNG.normal(size=(12, 3)).astype("float32")


def _model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="one"),
            keras.layers.Dense(3, name="two"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def _out(model):
    return ops.convert_to_numpy(model(X))


@pytest.mark.compiled
def test_the_compressed_form_of_a_model(tmp_path):
    model = _model()
    plain = _out(model)
    gradients = ks.kernel_gradients(model, (X, Y), "all")
    ks.wrap_model(
        model, "deep_lora", "all", rank=2, seed=1, gradients=gradients
    )
    np.testing.assert_allclose(_out(model), plain, atol=1e-6)
    for layer in model.layers:
        a, b = layer.outer_a.numpy(), layer.outer_b.numpy()
        u, _, vt = np.linalg.svd(gradients[layer.name])
        for own, theirs in ((a, u[:, :1]), (b.T, vt[:1].T)):
            projector = _projector(own)
            np.testing.assert_allclose(projector @ theirs, theirs, atol=1e-5)
    assert sum(np.prod(w.shape) for w in model.trainable_weights) == 24
    model.compile(keras.optimizers.Adam(0.05), "mse")
    losses = model.fit(X, Y, epochs=40, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    outputs = _out(model)
    ks.save_adapters(model, tmp_path / "adapters.safetensors")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_out(again), outputs, atol=1e-6)
    again = ks.load_adapters(_model(), tmp_path / "adapters.safetensors")
    np.testing.assert_allclose(_out(again), outputs, atol=1e-6)
    ks.merge_model(again)
    np.testing.assert_allclose(_out(again), outputs, atol=1e-5)


def test_the_rate_of_the_outer_factors_under_sgd():
    moved = []
    for rate in (1.0, 0.25):
        model = _model()
        ks.wrap_model(
            model,
            "deep_lora",
            "two",
            rank=2,
            eps=0.5,
            outer_rate=rate,
            seed=1,
            gradients=ks.kernel_gradients(model, (X, Y), "two"),
        )
        model.compile("sgd", "mse")
        weights = model.trainable_weights
        before = [w.numpy() for w in weights]
        model.train_on_batch(X, Y)
        moved.append({w.name: w.numpy() - x for w, x in zip(weights, before)})
    assert len(moved[0]) == 5
    for name, change in moved[0].items():
        share = 0.25 if name.startswith("outer") else 1.0
        np.testing.assert_allclose(moved[1][name], share * change, atol=1e-6)


def test_whole_factors_end_at_a_low_rank():
    model = _model()
    ks.wrap_model(model, "deep_lora", "one", eps=0.1, seed=0)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(X[:2], Y[:2], epochs=60, verbose=0)
    delta = ops.convert_to_numpy(model.layers[0].delta_matrix())
    s = np.linalg.svd(delta, compute_uv=False)
    assert s[2] < 0.1 * s[0]
    errors = ks.to_lora(model, rank=2)
    assert errors["one"] < 0.1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 2}, "without a gradient.*kernel_gradients"),
        ({"rank": 3, "start_data": "loaded"}, "rank=3.*even"),
        ({"start_data": "loaded"}, "with a gradient"),
        ({"outer_rate": 0.1}, "outer_rate=0.1"),
        ({"rank": 2, "width": 3, "start_data": "loaded"}, "width=3"),
        ({"eps": 0}, "eps=0"),
        ({"outer_rate": -1}, "outer_rate=-1"),
    ],
)
def test_what_it_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        ks.DeepLoRADense(keras.layers.Dense(3), **options)


def test_gradients_of_something_else():
    model = _model()
    found = ks.kernel_gradients(model, (X, Y), "one")
    for gradients, match in (
        (3, "gradients=3"),
        (found, "no layer 'two'"),
        ({**found, "two": found["one"]}, r"shape \(6, 8\).*8 x 3"),
    ):
        with pytest.raises(ValueError, match=match):
            ks.wrap_model(
                model, "deep_lora", "all", rank=2, gradients=gradients
            )
    with pytest.raises(ValueError, match="rank=4.*at most 3"):
        found = ks.kernel_gradients(model, (X, Y), "two")
        ks.wrap_model(model, "deep_lora", "two", rank=4, gradients=found)
    assert isinstance(model.layers[0], keras.layers.Dense)
