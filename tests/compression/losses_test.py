"""What a dropped square of a layer's outputs costs the model's."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.compression import losses
from keras_spectral.compression.fit import Fit
from keras_spectral.compression.losses import with_prices
from keras_spectral.compression.spectrum import Spectrum
from keras_spectral.kernels import kernel_view
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject

RNG = np.random.default_rng(0)


def _prices(model, x):
    moments = ks.calibrate(model, x, "all")
    chosen = [p for p in places(model) if p.path in moments]
    fits = []
    for place in chosen:
        view = kernel_view(subject(place.layer))
        table = isinstance(view.layer, keras.layers.Embedding)
        fits.append(Fit(view) if table else Fit(view, moments[place.path]))
    spectra = [Spectrum({1: np.ones((1, 2))}, 4, {1: 1}) for _ in fits]
    found = with_prices(model, chosen, fits, spectra, [(x, None, None)])
    return {p.path: s.price for p, s in zip(chosen, found)}


def _normal(*shape):
    return np.float32(RNG.normal(size=shape))


def _numpy(tensor):
    return np.float64(ops.convert_to_numpy(tensor))


def test_the_price_is_the_mean_square_of_the_jacobian(monkeypatch):
    """Linear models: `|J|^2 / n_out` a row, over `|y|^2`, from many draws."""
    monkeypatch.setattr(losses, "_EXAMPLES", 4000)
    monkeypatch.setattr(losses, "_AT_ONCE", 1000)
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(n, name=f"d{n}") for n in (6, 5, 3)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    x = _normal(4000, 4)
    kernels = [_numpy(layer.kernel) for layer in layers]
    wanted, jacobian = {}, np.eye(3)
    for layer, kernel in zip(layers[::-1], kernels[::-1]):
        wanted[layer.name] = (jacobian**2).sum() / len(jacobian)
        jacobian = kernel @ jacobian
    squares = (_numpy(model(x)).reshape(4, 1000, 3) ** 2).sum(axis=(1, 2))
    share = (1000 / squares).sum()
    for name, price in _prices(model, x).items():
        assert price == pytest.approx(share * wanted[name], rel=0.05)


def test_a_few_examples_at_a_time():
    batches = [({"x": np.ones((30, 2))}, None, None)] * 4
    found = [len(x["x"]) for x in losses._few(batches)]
    assert found[:4] == [8, 8, 8, 6] and max(found) == 8
    assert 50 <= sum(found) <= 70


def test_prices_foretell_what_truncation_costs():
    """A transposed convolution, a grouped one, a table; calls by twos."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    ids = keras.Input((12,), dtype="int32", name="ids")
    x = layers.Embedding(30, 8, name="table")(ids)
    x = layers.Conv1D(8, 3, groups=2, padding="same", name="grouped")(x)
    twice = layers.Dense(8, "tanh", name="twice")
    x = twice(twice(x))
    x = layers.Conv1DTranspose(6, 4, 2, padding="same", name="up")(x)
    model = keras.Model(ids, layers.Dense(4, name="head")(x))
    for v in model.weights:
        v.assign(v + 0.2 * _normal(*v.shape))
    data = RNG.integers(0, 30, (64, 12)).astype("int32")
    prices = _prices(model, data)
    assert set(prices) == {"table", "grouped", "twice", "up", "head"}
    wanted = _numpy(model(data))
    moments = ks.calibrate(model, data, [p for p in prices if p != "table"])
    for place in places(model):
        if place.path not in prices:
            continue
        view = kernel_view(place.layer)
        before = ops.convert_to_numpy(view.matrix()).copy()
        costs, dropped = [], []
        for _ in range(40):
            change = 1e-2 * _normal(*before.shape) * (before != 0)
            view.assign(ops.convert_to_tensor(before + change))
            costs.append(((_numpy(model(data)) - wanted) ** 2).sum())
            second = np.eye(len(change))
            if place.path != "table":
                second = moments[place.path].second
            dropped.append(np.sum(change * (second @ change)))
        view.assign(ops.convert_to_tensor(before))
        loss = np.mean(costs) / (wanted**2).sum()
        batches = 64 / 8
        estimate = prices[place.path] * np.mean(dropped) / batches
        # Draws are few, and rows of one example are not independent.
        assert 0.7 < estimate / loss < 1.4, place.path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masked_tokens_and_whole_numbers_do_not_count(dtype):
    keras.utils.set_random_seed(0)
    x = keras.Input((4, 6), name="x")
    mask = keras.Input((4,), dtype="int32", name="padding_mask")
    seen = keras.layers.Dense(5, name="seen", dtype=dtype)(x)
    rows = keras.layers.GlobalAveragePooling1D()(x)
    apart = keras.layers.Dense(3, name="apart", dtype=dtype)(rows)
    model = keras.Model(
        {"x": x, "padding_mask": mask},
        {"a": seen, "b": apart, "c": mask + ops.argmax(seen, axis=-1)},
    )
    data = {"x": _normal(16, 4, 6), "padding_mask": np.zeros((16, 4), "int32")}
    data["padding_mask"][:, 0] = 1
    data["x"][:, 1:] *= 100
    prices = _prices(model, data)
    outputs = model(data)
    # `rows / |y|^2` for each of two batches, a mean over two outputs.
    for name, y in (("seen", outputs["a"][:, 0]), ("apart", outputs["b"])):
        y = np.float64(ops.convert_to_numpy(ops.cast(y, "float32")))
        wanted = sum(8 / (part**2).sum() / 2 for part in np.split(y, 2))
        assert prices[name] == pytest.approx(wanted, rel=0.5)


@pytest.mark.parametrize(
    ("end", "match"),
    [
        (lambda x: ops.argmax(x, axis=-1), "are 0 for all layers"),
        (lambda x: ops.cast(ops.round(x), "float32"), "are 0 for all layers"),
        (lambda x: x / 0.0, "are not finite"),
    ],
)
def test_outputs_without_gradients_are_refused(end, match):
    x = keras.Input((16,))
    layers = [keras.layers.Dense(16, name=f"d{i}") for i in range(2)]
    model = keras.Model(x, end(layers[1](layers[0](x))))
    options = {"target": "all", "calibration": _normal(64, 16)}
    with pytest.raises(ValueError, match=f"{match}.*method='uniform'"):
        ks.compress_model(model, 0.6, **options)
    ks.compress_model(model, 0.6, method="uniform", **options)
