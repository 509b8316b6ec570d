import json
import pickle

import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from keras import layers
from keras import ops

import keras_spectral as ks


def _model(width=16):
    """Automatic names on purpose: they differ at every build."""
    inputs = keras.Input((8,))
    x = layers.Dense(width, activation="relu")(inputs)
    x = layers.Dense(width, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def _x():
    return np.random.default_rng(0).normal(size=(4, 8)).astype("float32")


def _out(model):
    return ops.convert_to_numpy(model(_x()))


def _wrapped(**options):
    options = {"rank": 2, "alpha": 3, "trainable": "head", **options}
    model = _model()
    ks.wrap_model(model, "lora", target="dense.*", **options)
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.3, weight.shape))
    return model


def _fresh_like(model):
    """The same base weights in a model that was never wrapped."""
    fresh = _model()
    with ks.unwrapped(model):
        fresh.set_weights(model.get_weights())
    return fresh


@pytest.fixture
def saved(tmp_path):
    model = _wrapped()
    path = tmp_path / "adapters.safetensors"
    ks.save_adapters(model, path)
    return model, path


def _rewrite(path, tensors=None, **metadata):
    with safetensors.safe_open(path, framework="numpy") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}
        meta = {**file.metadata(), **metadata}
    safetensors.numpy.save_file(
        kept if tensors is None else tensors, path, meta
    )
    return kept


def _tensors(path):
    return safetensors.numpy.load_file(path)


def test_load_wraps_a_plain_model_and_fills_it(saved):
    model, path = saved
    fresh = _model()
    fresh.set_weights([w * 0 for w in fresh.get_weights()])
    with ks.unwrapped(model):
        fresh.set_weights(model.get_weights())
    fresh.get_layer("head").kernel.assign(np.zeros((16, 3)))
    assert ks.load_adapters(fresh, path) is fresh
    np.testing.assert_allclose(_out(fresh), _out(model), atol=1e-6)
    assert len(fresh.trainable_weights) == 6
    assert fresh.layers[1].options() == model.layers[1].options()


def test_load_fills_a_wrapped_model(saved):
    model, path = saved
    expected = _out(model)
    for weight in model.trainable_weights:
        weight.assign(weight * 0)
    ks.load_adapters(model, path)
    np.testing.assert_array_equal(_out(model), expected)


def test_what_is_in_the_file(saved):
    model, path = saved
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert names == {
        "dense/default/lora/lora_a",
        "dense/default/lora/lora_b",
        "dense/default/lora/scale",
        "dense_1/default/lora/lora_a",
        "dense_1/default/lora/lora_b",
        "dense_1/default/lora/scale",
        "head/default/trained/kernel",
        "head/default/trained/bias",
    }
    assert metadata["format"] == "keras_spectral.adapters"
    assert metadata["format_version"] == "2"
    first = json.loads(metadata["adapters"])[0]
    assert first["path"] == "dense" and first["method"] == "lora"
    assert first["options"]["rank"] == 2 and first["options"]["alpha"] == 3
    assert len(metadata["base"]) == 64
    assert path.stat().st_size < 8000


def test_pissa_keeps_its_start(tmp_path):
    model = _wrapped(initializer="pissa")
    path = tmp_path / "p.safetensors"
    ks.save_adapters(model, path)
    fresh = ks.load_adapters(_fresh_like(model), path)
    np.testing.assert_allclose(_out(fresh), _out(model), atol=1e-5)


def test_changed_scale_travels(saved, tmp_path):
    model, _ = saved
    model.layers[1].scale.assign(0.25)
    ks.save_adapters(model, tmp_path / "s.safetensors")
    fresh = ks.load_adapters(_fresh_like(model), tmp_path / "s.safetensors")
    np.testing.assert_allclose(_out(fresh), _out(model), atol=1e-6)


def _check_refused(path, match, model=None, error=ValueError):
    """Loading raises, and neither model nor file has changed."""
    model = model or _model()
    model.compile(optimizer="adam", loss="mse")
    model.fit(_x(), np.zeros((4, 3)), verbose=0)
    optimizer, kept, before = model.optimizer, list(model.layers), _out(model)
    flags = [w.trainable for w in model.weights]
    content = path.read_bytes() if path.exists() else None
    with pytest.raises(error, match=match):
        ks.load_adapters(model, path)
    assert model.layers == kept and model.optimizer is optimizer
    assert [w.trainable for w in model.weights] == flags
    np.testing.assert_array_equal(_out(model), before)
    assert (path.read_bytes() if path.exists() else None) == content


@pytest.mark.once
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda t: t.pop("dense/default/lora/lora_a"),
            r"missing \['dense/default/lora/lora_a'\]",
        ),
        (
            lambda t: t.pop("head/default/trained/bias"),
            r"missing \['head/default/trained/bias'\]",
        ),
        (
            lambda t: t.update(
                {"dense/default/lora/evil": t["dense/default/lora/lora_a"]}
            ),
            r"unexpected \['dense/default/lora/evil'\]",
        ),
        (
            lambda t: t.update({"../x": t.pop("dense/default/lora/lora_a")}),
            r"missing \['dense/default/lora/lora_a'\], unexpected \['../x'\]",
        ),
        (
            lambda t: t.update(
                {
                    "dense/default/lora/lora_a": t["dense/default/lora/lora_a"][
                        :, :1
                    ]
                }
            ),
            r"'dense/default/lora/lora_a' has shape \(8, 1\).*\(8, 2\)",
        ),
    ],
)
def test_tensors_must_fit_exactly(saved, change, match, wrapped):
    model, path = saved
    tensors = _tensors(path)
    change(tensors)
    _rewrite(path, {k: np.ascontiguousarray(v) for k, v in tensors.items()})
    _check_refused(path, match, model if wrapped else None)


def test_file_of_another_model(saved):
    _, path = saved
    _check_refused(path, "belongs to another model", _model(width=12))


def test_truncated_file(saved):
    _, path = saved
    content = path.read_bytes()
    for size in (0, 5, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:size])
        _check_refused(path, "not a readable safetensors file")


def test_pickle_under_the_right_name(saved):
    _, path = saved

    class Evil:
        def __reduce__(self):
            return (path.with_suffix(".ran").touch, ())

    path.write_bytes(pickle.dumps(Evil()))
    _check_refused(path, "not a readable safetensors file")
    assert not path.with_suffix(".ran").exists()


def test_other_safetensors_and_versions(saved):
    _, path = saved
    _rewrite(path, format="pt")
    _check_refused(path, "not one of keras_spectral")
    _rewrite(path, format="keras_spectral.adapters", format_version="99")
    _check_refused(path, "version '99'")


@pytest.mark.parametrize("value", ["{", "3", '[{"path": 1}]', '["x"]'])
def test_damaged_metadata(saved, value):
    _, path = saved
    _rewrite(path, adapters=value)
    _check_refused(path, "damaged metadata")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("method", "os.system", "not registered"),
        ("path", "nowhere", "which the model lacks"),
        ("options", {"rank": 99}, "at most 8"),
        ("options", {"layer": 1}, r"options \['layer'\]"),
    ],
)
def test_entries_are_not_trusted(saved, key, value, match):
    _, path = saved
    with safetensors.safe_open(path, framework="numpy") as file:
        entries = json.loads(file.metadata()["adapters"])
    entries[0][key] = value
    _rewrite(path, adapters=json.dumps(entries))
    _check_refused(path, match)


def test_wrapped_otherwise(saved):
    _, path = saved
    _check_refused(path, "does not fit the wrapped model", _wrapped(rank=3))


def test_missing_file(tmp_path):
    _check_refused(
        tmp_path / "no.safetensors", "no adapter", error=FileNotFoundError
    )


def test_a_failed_save_keeps_the_old_file(saved, monkeypatch):
    model, path = saved
    content = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        ks.save_adapters(model, path)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no adapters"):
        ks.save_adapters(_model(), tmp_path / "x.safetensors")


def test_every_backend_reads_a_file_as_numpy_does(saved):
    """Base weights by numpy, adapters by file: the same numbers everywhere."""
    _, path = saved
    rng = np.random.default_rng(7)
    fresh = _model()
    values = [rng.normal(0, 0.3, w.shape) for w in fresh.weights]
    fresh.set_weights(values)
    with pytest.warns(UserWarning, match="another base"):
        ks.load_adapters(fresh, path)
    file, x = _tensors(path), np.float64(_x())
    for kernel, bias, name in zip(
        values[0:4:2], values[1:4:2], ("dense", "dense_1")
    ):
        delta = (
            file[f"{name}/default/lora/lora_a"]
            @ file[f"{name}/default/lora/lora_b"]
        )
        x = np.maximum(x @ (kernel + 3 / 2 * delta) + bias, 0)
    expected = (
        x @ file["head/default/trained/kernel"]
        + file["head/default/trained/bias"]
    )
    np.testing.assert_allclose(_out(fresh), expected, atol=1e-5)


def _classifier(classes, seed=0):
    keras_hub = pytest.importorskip("keras_hub")
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=30,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
    )
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=classes, preprocessor=None
    )


@pytest.mark.once
@pytest.mark.parametrize("heads", [None, []])
def test_another_number_of_classes(tmp_path, heads):
    """The message says the way out, and the way leads out."""
    model, path = _classifier(2), tmp_path / "a.safetensors"
    ks.wrap_model(model, "lora", rank=2, trainable=heads)
    rng = np.random.default_rng(0)
    for weight in model.backbone.trainable_weights:
        weight.assign(rng.normal(0, 0.3, weight.shape))
    ks.save_adapters(model, path)
    other = _classifier(3)
    named = r"'logits/kernel' has shape \(8, 2\).*\(8, 3\).*" * (heads is None)
    with pytest.raises(ValueError, match=named + r"model\.backbone"):
        ks.load_adapters(other, path)
    ks.save_adapters(model.backbone, path)
    ks.load_adapters(other.backbone, path)
    inputs = {
        "token_ids": np.arange(10).reshape(2, 5),
        "segment_ids": np.zeros((2, 5), "int32"),
        "padding_mask": np.ones((2, 5), "int32"),
    }
    ours, theirs = other.backbone(inputs), model.backbone(inputs)
    for name, value in theirs.items():
        np.testing.assert_allclose(
            ops.convert_to_numpy(ours[name]),
            ops.convert_to_numpy(value),
            atol=1e-5,
        )
    other.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True))
    other.fit(inputs, np.array([0, 2]), verbose=0)


def test_a_head_that_rests_is_saved(saved):
    model, path = saved
    kernel = _tensors(path)["head/default/trained/kernel"]
    model.trainable = False
    ks.save_adapters(model, path)
    np.testing.assert_array_equal(
        _tensors(path)["head/default/trained/kernel"], kernel
    )
