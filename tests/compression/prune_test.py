import keras
import numpy as np
import pytest
from keras import layers
from keras import ops

import keras_spectral as ks

ADAM = {"loss": "mse", "optimizer": "adam"}


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model():
    model = keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(16, "relu", name="hidden"),
            layers.Dense(4, name="head"),
        ]
    )
    return model


def _images():
    """A functional model with all that channels may pass through."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="first")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    x = layers.MaxPooling2D()(x)
    inner = layers.Conv2D(6, 3, padding="same", activation="relu", name="in")(x)
    inner = layers.Conv2D(8, 1, name="out")(inner)
    x = layers.Add(name="add")([x, inner])
    x = layers.Conv2D(5, 2, name="last")(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(0.3)(x)
    x = layers.Dense(7, "relu", name="hidden")(x)
    outputs = layers.Dense(2, name="head")(x)
    return keras.Model(inputs, outputs)


def _data(shape=(12,), count=32):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, *shape)), rng.normal(size=(count, 4))


@pytest.mark.compiled
def test_zeros_stay_in_training_and_in_files(tmp_path):
    model = _model()
    before = [_numpy(w) for w in model.weights]
    small = ks.prune_model(model, 0.7, target="hidden")
    for old, new in zip(before, model.weights):
        np.testing.assert_array_equal(old, _numpy(new))
    kernel = before[0]
    limit = np.sort(np.abs(kernel), axis=None)[round(0.7 * 192) - 1]
    expected = np.where(np.abs(kernel) > limit, kernel, 0)
    np.testing.assert_array_equal(
        _numpy(small.get_layer("hidden").kernel), expected
    )
    small.compile("adam", "mse")
    small.fit(*_data(), verbose=0)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    again.fit(*_data(), verbose=0)
    for trained in (small, again):
        got = _numpy(trained.get_layer("hidden").kernel)
        np.testing.assert_array_equal(got == 0, expected == 0)
        assert np.abs(got - expected).max() > 1e-4


@pytest.mark.once
def test_one_share_of_the_whole_model():
    model = _model()
    model.get_layer("head").kernel.assign(10 * model.get_layer("head").kernel)
    small = ks.prune_model(model, 0.5, scope="model")
    zeros = [np.mean(_numpy(x.kernel) == 0) for x in small.layers]
    assert zeros[0] > 0.6 > zeros[1]
    assert np.mean(np.r_[[0] * 128, [1] * 128]) == pytest.approx(
        (zeros[0] * 192 + zeros[1] * 64) / 256
    )


@pytest.mark.once
def test_patterns():
    small = ks.prune_model(_model(), method="2:4")
    for layer in small.layers:
        groups = (_numpy(layer.kernel) != 0).T.reshape(layer.units, -1, 4)
        assert (groups.sum(axis=2) == 2).all()


@pytest.mark.once
def test_grouped_convolutions_and_halves_of_pairs():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.Conv2D(6, 3, groups=2, name="grouped"),
            layers.Conv2D(8, 3, name="plain"),
        ]
    )
    model = ks.compress_model(model, 0.5, target="plain")
    small = ks.prune_model(model, 0.5)
    kernels = [small.get_layer("grouped").kernel]
    pair = small.get_layer("plain")
    kernels += [pair.down.kernel, pair.up.kernel]
    for kernel in kernels:
        assert np.mean(_numpy(kernel) == 0) == 0.5
    small = ks.prune_model(model, 0.5, target="plain/up")
    assert _numpy(small.get_layer("grouped").kernel).all()
    assert not _numpy(small.get_layer("plain").up.kernel).all()


@pytest.mark.once
def test_masks_of_wrapped_models_come_back_after_a_merge():
    small = ks.prune_model(_model(), 0.7, target="hidden")
    zeros = _numpy(small.get_layer("hidden").kernel) == 0
    ks.wrap_model(small, "lora", "hidden", rank=2)
    small.compile(**ADAM)
    small.fit(*_data(), verbose=0)
    ks.merge_model(small)
    assert np.mean(_numpy(small.get_layer("hidden").kernel) == 0) < 0.1
    ks.keep_zeros(small)
    got = _numpy(small.get_layer("hidden").kernel) == 0
    np.testing.assert_array_equal(got, zeros)


@pytest.mark.once
def test_other_constraints_go_on():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, kernel_constraint="non_neg", name="hidden"),
        ]
    )
    small = ks.prune_model(model, 0.25)
    small.compile(keras.optimizers.SGD(10.0), "mse")
    small.fit(np.ones((4, 4)), -np.ones((4, 4)), verbose=0)
    assert _numpy(small.get_layer("hidden").kernel).min() == 0


def _zeroed(model, reader, source, kept):
    """The same outputs without a smaller model: rows of zeros."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    kernel = _numpy(twin.get_layer(reader).kernel).copy()
    channels = twin.get_layer(source).kernel.shape[-1]
    rows = kernel.reshape(-1, channels, kernel.shape[-1])
    if kernel.ndim == 4:
        rows = kernel.reshape(*kernel.shape)
    rows[..., [i for i in range(channels) if i not in kept], :] = 0
    twin.get_layer(reader).kernel.assign(rows.reshape(kernel.shape))
    return twin


@pytest.mark.parametrize(
    ("source", "reader"),
    [("in", "out"), ("last", "hidden"), ("hidden", "head")],
)
def test_channels_go_with_what_they_feed(source, reader):
    model = _images()
    norms = np.abs(_numpy(model.get_layer(source).kernel))
    norms = norms.reshape(-1, norms.shape[-1]).sum(axis=0)
    count = len(norms) - round(0.4 * len(norms))
    kept = np.argsort(norms)[-count:]
    small = ks.prune_model(model, 0.4, "channels", target=source)
    assert small.get_layer(source).kernel.shape[-1] == count
    assert small.count_params() < model.count_params()
    x = _data((8, 8, 3), 4)[0]
    expected = _zeroed(model, reader, source, kept).predict(x, verbose=0)
    np.testing.assert_allclose(small.predict(x, verbose=0), expected, atol=1e-5)


def test_a_chain_with_norms_is_smaller_and_trains():
    model = keras.Sequential(
        [
            keras.Input((9, 9, 2)),
            layers.Conv2D(8, 3, use_bias=False, name="first"),
            layers.BatchNormalization(name="norm"),
            layers.Activation("relu"),
            layers.Conv2D(6, 3, name="second"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, name="head"),
        ]
    )
    rng = np.random.default_rng(0)
    norm = model.get_layer("norm")
    norm.set_weights([rng.uniform(0.5, 1.5, 8) for _ in range(4)])
    sparse = ks.prune_model(model, 0.5, target="second")
    small = ks.prune_model(sparse, 0.5, "channels")
    assert small.get_layer("first").filters == 4
    assert small.get_layer("second").filters == 3
    assert small.get_layer("norm").gamma.shape == (4,)
    norms = np.abs(_numpy(sparse.get_layer("first").kernel)).sum((0, 1, 2))
    kept = np.sort(np.argsort(norms)[4:])
    for old, new in zip(norm.weights, small.get_layer("norm").weights):
        np.testing.assert_array_equal(_numpy(old)[kept], _numpy(new))
    zeros = _numpy(small.get_layer("second").kernel) == 0
    assert zeros.any()
    small.compile(**ADAM)
    small.fit(*_data((9, 9, 2)), verbose=0)
    got = _numpy(small.get_layer("second").kernel) == 0
    np.testing.assert_array_equal(got, zeros)


@pytest.mark.once
def test_what_channels_cannot_do():
    small = ks.prune_model(_images(), 0.5, "channels")
    names = ("first", "in", "out", "last", "hidden", "head")
    sizes = [small.get_layer(name).kernel.shape[-1] for name in names]
    assert sizes == [8, 3, 8, 3, 3, 2]
    for target, match in (
        ("first", "read by 'add'"),
        ("head", "model's outputs"),
    ):
        with pytest.raises(ValueError, match=match):
            ks.prune_model(_images(), 0.5, "channels", target=target)
    alone = keras.Sequential([keras.Input((3,)), layers.Dense(4)])
    with pytest.raises(ValueError, match="can be removed"):
        ks.prune_model(alone, 0.5, "channels")

    class Own(keras.Model):
        pass

    with pytest.raises(ValueError, match="a Own"):
        ks.prune_model(Own(), 0.5, "channels")
    shared = layers.Dense(3, name="shared")
    inputs = keras.Input((3,))
    twice = layers.Dense(2)(shared(shared(inputs)))
    with pytest.raises(ValueError, match="used 2 times"):
        ks.prune_model(
            keras.Model(inputs, twice), 0.5, "channels", target="shared"
        )


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"share": 0}, "share=0"),
        ({"share": 1}, "share=1"),
        ({"share": None}, "share=None"),
        ({"method": "size"}, "'2:4'"),
        ({"method": 3}, "method=3"),
        ({"share": None, "method": "4:2"}, "0 < n < m"),
        ({"method": "2:4"}, "fixes how many"),
        ({"scope": "all"}, "scope='all'"),
        ({"target": "nothing"}, "nothing"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        ks.prune_model(_model(), **{"share": 0.5, **options})


@pytest.mark.once
def test_adapters_are_refused():
    model = ks.wrap_model(_model(), "lora", "hidden", rank=1)
    for change in (lambda m: ks.prune_model(m, 0.5), ks.keep_zeros):
        with pytest.raises(ValueError, match="has adapters"):
            change(model)


@pytest.mark.once
def test_inside_of_keras_hub():
    keras_hub = pytest.importorskip("keras_hub")
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=20,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=6,
    )
    model = keras_hub.models.BertTextClassifier(backbone, 2, preprocessor=None)
    small = ks.prune_model(model, 0.5, target="all-linear")
    ids = np.ones((4, 6), "int32")
    inputs = {"token_ids": ids, "segment_ids": 0 * ids, "padding_mask": ids}
    small.fit(inputs, np.array([0, 1, 0, 1]), verbose=0)

    def zeros(model):
        kernels = [v for v in model.variables if v.name == "kernel"]
        return [int((_numpy(v) == 0).sum()) for v in kernels]

    expected = zeros(small)
    assert sum(expected) == (5 * 64 + 2 * 128) // 2
    model.set_weights(small.get_weights())
    ks.keep_zeros(model, "all-linear")
    model.fit(inputs, np.array([0, 1, 0, 1]), verbose=0)
    assert zeros(model) == expected
