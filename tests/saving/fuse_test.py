import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks

pytestmark = pytest.mark.once


def _model(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((7,)),
            keras.layers.Dense(9, activation="relu", name="one"),
            keras.layers.Dense(8, name="two"),
            keras.layers.Dense(3, name="head"),
        ]
    )


def _train(path, seed, method="spectral", **options):
    model = _model()
    ks.wrap_model(
        model, method, target=["one", "two"], trainable=["head"], **options
    )
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    ks.save_adapters(model, path)
    return model


def _x():
    return np.random.default_rng(1).normal(size=(5, 7)).astype("float32")


def _parts(model, name="one"):
    layer = model.get_layer(name)
    names = ("u", "s", "v", "delta_u", "delta_v")
    return [np.float64(getattr(layer, n).numpy()) for n in names]


@pytest.fixture
def files(tmp_path):
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_disjoint_columns_add_up(files):
    a = _train(files[0], 1, rank=2)
    b = _train(files[1], 2, rank=3, columns=2)
    fused = ks.fuse_adapters(_model(), files)
    layer = fused.get_layer("one")
    assert layer.options() == {
        "rank": 5,
        "mode": "additive",
        "columns": [0, 1, 2, 3, 4],
        "shift_values": False,
        "adaptive": False,
    }
    for got, left, right in zip(_parts(fused), _parts(a), _parts(b)):
        both = np.concatenate([left, right], axis=-1)
        np.testing.assert_allclose(got, both, atol=1e-6)
    head = fused.get_layer("head").kernel.numpy()
    expected = sum(m.get_layer("head").kernel.numpy() for m in (a, b)) / 2
    np.testing.assert_allclose(head, expected, atol=1e-6)
    expected = ops.convert_to_numpy(fused(_x()))
    ks.merge_model(fused)
    np.testing.assert_allclose(
        ops.convert_to_numpy(fused(_x())), expected, atol=1e-5
    )


def test_shifts_of_the_values_add_up(files):
    a = _train(files[0], 1, columns=[0, 3], shift_values=True)
    b = _train(files[1], 2, rank=2)
    fused = ks.fuse_adapters(_model(), files, weights=[0.5, 2.0])
    layer = fused.get_layer("one")
    assert layer.columns == [0, 1, 3] and layer.shift_values
    shift = a.get_layer("one").delta_s.numpy()
    expected = [0.5 * shift[0], 0, 0.5 * shift[1]]
    np.testing.assert_allclose(layer.delta_s.numpy(), expected, atol=1e-6)
    both = ks.fuse_adapters(_model(), [files[0], files[0]])
    got = both.get_layer("one").delta_s.numpy()
    np.testing.assert_allclose(got, 2 * shift, atol=1e-6)
    assert not b.get_layer("one").shift_values


def test_masks_are_folded_in(files):
    a = _train(files[0], 1, rank=3, adaptive=True, shift_values=True)
    layer = a.get_layer("one")
    layer.mask.assign([1.0, 0.0, 0.5])
    ks.save_adapters(a, files[0])
    _train(files[1], 2, rank=2, columns=3)
    fused = ks.fuse_adapters(_model(), files).get_layer("one")
    assert not fused.adaptive and fused.columns == [0, 1, 2, 3, 4]
    for name in ("delta_u", "delta_v", "delta_s"):
        expected = getattr(layer, name).numpy() * [1.0, 0.0, 0.5]
        got = getattr(fused, name).numpy()[..., :3]
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_shifts_are_summed_past_other_signs(files):
    def turned(path):
        model = _train(path, 1, rank=2, shift_values=True)
        for name in ("u", "v", "delta_u", "delta_v"):
            weight = getattr(model.get_layer("one"), name)
            weight.assign(-weight)
        ks.save_adapters(model, path)
        return model

    a, _ = _train(files[0], 1, rank=2, shift_values=True), turned(files[1])
    fused = ks.fuse_adapters(_model(), files)
    for name in ("delta_u", "delta_v", "delta_s"):
        one = getattr(a.get_layer("one"), name).numpy()
        got = getattr(fused.get_layer("one"), name).numpy()
        np.testing.assert_allclose(got, 2 * one, atol=1e-6)


def test_equal_columns_are_summed_with_weights(files):
    a = _train(files[0], 1, rank=2)
    b = _train(files[1], 2, columns=[1, 4])
    fused = ks.fuse_adapters(_model(), files, weights=[0.25, 0.75])
    _, _, _, du, dv = _parts(fused)
    for got, i in ((du, 3), (dv, 4)):
        left, right = _parts(a)[i], _parts(b)[i]
        np.testing.assert_allclose(got[:, 0], 0.25 * left[:, 0], atol=1e-6)
        both = 0.25 * left[:, 1] + 0.75 * right[:, 0]
        np.testing.assert_allclose(got[:, 1], both, atol=1e-6)
        np.testing.assert_allclose(got[:, 2], 0.75 * right[:, 1], atol=1e-6)
    assert fused.get_layer("one").columns == [0, 1, 4]


@pytest.mark.parametrize("method", ["spectral", "lora"])
def test_average_of_adapted_kernels(files, method):
    models = [_train(file, i, method, rank=2) for i, file in enumerate(files)]
    for model in models:
        ks.merge_model(model)
    fused = ks.fuse_adapters(_model(), files, weights=[1, 3], method="average")
    for name in ("one", "two", "head"):
        left, right = (m.get_layer(name).kernel.numpy() for m in models)
        np.testing.assert_allclose(
            fused.get_layer(name).kernel.numpy(),
            0.25 * left + 0.75 * right,
            atol=1e-5,
        )
    assert isinstance(fused.get_layer("one"), keras.layers.Dense)
    assert fused.get_layer("one").trainable


@pytest.mark.parametrize("method", ["columns", "average"])
def test_another_base_is_refused(files, method):
    _train(files[0], 1, rank=2)
    _train(files[1], 2, rank=2)
    other = _model(seed=9)
    before = [w.numpy() for w in other.weights]
    with pytest.raises(ValueError, match="another base"):
        ks.fuse_adapters(other, files, method=method)
    for weight, value in zip(other.weights, before):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_equal_columns_of_other_directions_are_refused(files):
    models = [_train(file, i, rank=2) for i, file in enumerate(files)]
    layer = models[1].get_layer("one")
    for part in (layer.u, layer.v, layer.s):
        part.assign(part.numpy()[..., ::-1].copy())
    ks.save_adapters(models[1], files[1])
    with pytest.raises(ValueError, match="'one'.*direction 0"):
        ks.fuse_adapters(_model(), files)


def test_other_methods_and_models_are_refused(files):
    _train(files[0], 1, rank=2)
    _train(files[1], 2, "lora", rank=2)
    with pytest.raises(ValueError, match="method='average'"):
        ks.fuse_adapters(_model(), files)
    _train(files[1], 2, rank=2, mode="rotate")
    with pytest.raises(ValueError, match="rotate"):
        ks.fuse_adapters(_model(), files)
    small = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    ks.wrap_model(small, "spectral", target=keras.layers.Dense, rank=2)
    ks.save_adapters(small, files[1])
    for method in ("columns", "average"):
        with pytest.raises(ValueError, match="different models"):
            ks.fuse_adapters(_model(), files, method=method)


def test_bad_arguments(files):
    _train(files[0], 1, rank=2)
    model = _model()
    for given, options in (
        ([], {}),
        (str(files[0]), {}),
        (files[:1], {"weights": [1, 2]}),
        (files[:1], {"weights": ["much"]}),
        (files[:1], {"weights": [0.0]}),
        (files[:1], {"method": "sum"}),
    ):
        with pytest.raises(ValueError, match="Expected"):
            ks.fuse_adapters(model, given, **options)
    with pytest.raises(FileNotFoundError):
        ks.fuse_adapters(model, files)
    ks.wrap_model(model, "spectral", target="one", rank=2)
    with pytest.raises(ValueError, match="has adapters"):
        ks.fuse_adapters(model, files[:1])


def test_average_of_faded_biases(files):
    base = _model()
    for layer in base.layers[:2]:
        layer.bias.assign(np.linspace(1, 2, layer.bias.shape[0]))
    for file, step in zip(files, (1, 2)):
        model = keras.models.clone_model(base)
        model.set_weights(base.get_weights())
        options = {"rank": 2, "end_step": 4, "decay_bias": True}
        ks.wrap_model(model, "decaying_lora", target="one", **options)
        model.get_layer("one").step.assign(step)
        ks.save_adapters(model, file)
    before = base.get_layer("one").bias.numpy().copy()
    ks.fuse_adapters(base, files, weights=[1, 3], method="average")
    got = base.get_layer("one").bias.numpy()
    factor = (1 * 0.75 + 3 * 0.5) / 4
    np.testing.assert_allclose(got, before * factor, atol=1e-6)
