import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks

pytestmark = pytest.mark.compiled

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model(**options):
    return keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(32, "relu", name="hidden", **options),
            keras.layers.Dense(4, name="logits"),
        ]
    )


def _data():
    x = np.random.default_rng(0).normal(size=(32, 16)).astype("float32")
    return x, np.arange(32) % 4


def _pair():
    model = _model()
    return ks.compress_model(model, 0.3, method="uniform"), model


def _softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _losses(small, original, temperature):
    """Those of the labels and of the outputs, for each example."""
    x, y = _data()
    z, wanted = (m.predict(x, verbose=0) for m in (small, original))
    labels = -np.log(_softmax(z)[np.arange(32), y])
    p, q = _softmax(wanted / temperature), _softmax(z / temperature)
    distilled = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=-1)
    return labels, distilled


@pytest.mark.parametrize("weighted", ["no", "samples", "classes"])
def test_equals_its_formula_with_weights(weighted):
    small, original = _pair()
    x, y = _data()
    teacher = ks.distiller(small, original, temperature=3.0, label_weight=0.3)
    teacher.compile(keras.optimizers.SGD(0.0), LOSS)
    weights, options = np.ones(32), {}
    if weighted == "samples":
        weights = np.r_[np.zeros(16), np.linspace(0, 3, 16)].astype("float32")
        options = {"sample_weight": weights}
    elif weighted == "classes":
        by_class = {0: 0.0, 1: 0.5, 2: 1.0, 3: 4.0}
        weights = np.array([by_class[label] for label in y])
        options = {"class_weight": by_class}
    logs = teacher.fit(x, y, batch_size=32, verbose=0, **options).history
    labels, distilled = _losses(small, original, 3.0)
    expected = [(weights * part).mean() for part in (labels, distilled)]
    got = logs["label_loss"][0], logs["distillation_loss"][0]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    total = 0.3 * expected[0] + 0.7 * expected[1]
    np.testing.assert_allclose(logs["loss"][0], total, rtol=1e-4)
    if weighted == "samples":
        found = teacher.evaluate(
            x, y, sample_weight=weights, return_dict=True, verbose=0
        )
        np.testing.assert_allclose(found["loss"], total, rtol=1e-4)


@pytest.mark.parametrize("loss", [None, LOSS])
def test_learns_from_data_without_labels(loss):
    small, original = _pair()
    x, _ = _data()
    before = _losses(small, original, 2.0)[1].mean()
    teacher = ks.distiller(small, original, label_weight=0)
    teacher.compile(keras.optimizers.Adam(0.01), loss)
    logs = teacher.fit(x, epochs=20, verbose=0).history
    assert set(logs) == {"loss", "distillation_loss"}
    after = _losses(small, original, 2.0)[1].mean()
    assert after < 0.6 * before
    loss = teacher.evaluate(x, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(loss, after, rtol=1e-3)


def test_the_original_stays_as_it_is():
    small, original = _pair()
    original.get_layer("hidden").trainable = False
    flags = [layer.trainable for layer in original.layers]
    before = [_numpy(v) for v in original.variables]
    teacher = ks.distiller(small, original)
    teacher.compile(keras.optimizers.SGD(0.1), LOSS, metrics=["accuracy"])
    logs = teacher.fit(*_data(), verbose=0).history
    assert "accuracy" in logs
    trained = {id(v) for v in teacher.trainable_variables}
    assert trained == {id(v) for v in small.trainable_variables}
    assert [layer.trainable for layer in original.layers] == flags
    assert original.trainable
    for old, new in zip(before, original.variables):
        np.testing.assert_array_equal(old, _numpy(new))


def test_what_layers_add_counts_once_and_whole():
    original = _model(activity_regularizer=keras.regularizers.L2(5.0))
    small = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(4, kernel_regularizer=keras.regularizers.L2(1)),
        ]
    )
    x, y = _data()
    teacher = ks.distiller(small, original, label_weight=0.25)
    teacher.compile(keras.optimizers.SGD(0.0), LOSS)
    loss = teacher.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    labels, distilled = (part.mean() for part in _losses(small, original, 2.0))
    own = np.square(_numpy(small.layers[0].kernel)).sum()
    expected = 0.25 * labels + 0.75 * distilled + own
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_masked_steps_do_not_count():
    def make(seed):
        keras.utils.set_random_seed(seed)
        return keras.Sequential(
            [
                keras.Input((5,), dtype="int32"),
                keras.layers.Embedding(9, 6, mask_zero=True),
                keras.layers.Dense(3),
            ]
        )

    small, original = make(0), make(1)
    ids = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    teacher = ks.distiller(small, original, temperature=1.0, label_weight=0)
    teacher.compile("sgd")
    got = teacher.evaluate(ids, verbose=0, return_dict=True)["loss"]
    p, q = (_softmax(m.predict(ids, verbose=0)) for m in (original, small))
    gaps = (p * (np.log(p) - np.log(q))).sum(axis=-1)
    np.testing.assert_allclose(got, gaps[ids > 0].mean(), rtol=1e-4)


def test_a_file_of_it_goes_on(tmp_path):
    small, original = _pair()
    teacher = ks.distiller(small, original, temperature=1.5)
    teacher.compile("adam", LOSS)
    teacher.fit(*_data(), verbose=0)
    teacher.save(tmp_path / "teacher.keras")
    again = keras.models.load_model(tmp_path / "teacher.keras")
    assert again.temperature == 1.5
    for model in (teacher, again):
        model.fit(*_data(), shuffle=False, verbose=0)
    x, _ = _data()
    got = again.small.predict(x, verbose=0)
    np.testing.assert_allclose(got, small.predict(x, verbose=0), atol=1e-6)


def test_labels_without_a_loss_or_a_loss_without_labels():
    small, original = _pair()
    x, y = _data()
    teacher = ks.distiller(small, original)
    teacher.compile("sgd")
    with pytest.raises(ValueError, match="no loss in `compile`"):
        teacher.fit(x, y, verbose=0)
    teacher.compile("sgd", LOSS)
    with pytest.raises(ValueError, match="without labels"):
        teacher.fit(x, verbose=0)
    with pytest.raises(ValueError, match="without labels"):
        teacher.evaluate([x], verbose=0)
    teacher.fit(x, y, verbose=0)  # an error costs nothing
    batches = ((x, None) for _ in range(1))
    with pytest.raises(ValueError, match="without labels"):
        teacher.fit(batches, verbose=0)


def test_models_that_do_not_fit_raise():
    small, original = _pair()
    with pytest.raises(ValueError, match="train weights they share"):
        ks.distiller(original, original)
    part = keras.Model(original.inputs, original.outputs)
    with pytest.raises(ValueError, match="train weights they share"):
        ks.distiller(part, original)
    with pytest.raises(ValueError, match="Expected two Keras models"):
        ks.distiller(small, original.layers[0])
    other = keras.Sequential([keras.Input((16,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="same logits"):
        ks.distiller(other, original)
    inputs = keras.Input((16,))
    two = {n: keras.layers.Dense(4, name=n)(inputs) for n in "ab"}
    with pytest.raises(ValueError, match="returns a list"):
        ks.distiller(keras.Model(inputs, two), original)
    with pytest.raises(ValueError, match="label_weight=1"):
        ks.distiller(small, original, label_weight=1)
    with pytest.raises(ValueError, match="temperature=0"):
        ks.distiller(small, original, temperature=0)


def test_several_outputs_of_a_subclass_raise():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)

        def call(self, inputs):
            return {"a": self.dense(inputs), "b": inputs}

    teacher = ks.distiller(Two(), _model(), label_weight=0)
    teacher.compile("sgd")
    # Keras 3.12 makes a RuntimeError of what is raised while it builds.
    errors = (ValueError, RuntimeError)
    with pytest.raises(errors, match="returns a dict"):
        teacher.fit(_data()[0], verbose=0)
