"""Damaged and hostile adapter files: one clear error, nothing made first."""

import copy
import json
import random
import tracemalloc
import warnings

import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from keras import ops

import keras_spectral as ks

pytestmark = pytest.mark.once


def _model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, name="one"), keras.layers.Dense(8)]
    head = keras.layers.Dense(3, name="head")
    return keras.Sequential([keras.Input((8,)), *layers, head])


_METHODS = {
    "lora": {"rank": 2},
    "spectral": {"rank": 2},
    "gated_spectral": {"rank": 2},
    "conditional_spectral": {"rank": 2, "hidden": 3, "embedding": 2},
    "decaying_lora": {"rank": 2},
    "adalora": {"rank": 2},
    "dylora": {"rank": 2},
}


def _file(path, method="lora"):
    """A file's tensors and decoded metadata."""
    model = ks.wrap_model(
        _model(),
        method,
        target=["one", "dense.*"],
        trainable="head",
        **_METHODS[method],
    )
    ks.save_adapters(model, path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    for name in ("adapters", "trainable", "values"):
        metadata[name] = json.loads(metadata[name])
    return safetensors.numpy.load_file(path), metadata


def _write(path, tensors, metadata):
    text = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in metadata.items()
    }
    safetensors.numpy.save_file(tensors, path, text)


def _check_refused(path, match, model=None):
    model = model or _model()
    before = [ops.convert_to_numpy(w).copy() for w in model.weights]
    kept = list(model.layers)
    with pytest.raises(ValueError, match=match):
        ks.load_adapters(model, path)
    assert model.layers == kept
    for weight, value in zip(model.weights, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float64"])
def test_types_of_tensors(path, dtype):
    tensors, metadata = _file(path)
    tensors["one/default/lora/lora_a"] = tensors[
        "one/default/lora/lora_a"
    ].astype(dtype)
    _write(path, tensors, metadata)
    _check_refused(path, "'one/default/lora/lora_a' is of type")


def test_types_that_numpy_lacks(path):
    _file(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    start, end = header["one/default/lora/scale"]["data_offsets"]
    header["one/default/lora/scale"] |= {
        "dtype": "F8_E4M3",
        "shape": [end - start],
    }
    text = json.dumps(header).encode()
    path.write_bytes(
        len(text).to_bytes(8, "little") + text + content[8 + size :]
    )
    _check_refused(path, "'one/default/lora/scale' is of type F8_E4M3")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(path, value):
    tensors, metadata = _file(path)
    tensors["one/default/lora/lora_a"][1, 1] = value
    _write(path, tensors, metadata)
    _check_refused(path, "'one/default/lora/lora_a' holds NaN or infinite")
    model = ks.wrap_model(_model(), "lora", target="one", rank=2)
    model.get_layer("one").lora_a.assign(tensors["one/default/lora/lora_a"])
    content = path.read_bytes()
    with pytest.raises(
        ValueError, match="Not saved.*'one/default/lora/lora_a' holds NaN"
    ):
        ks.save_adapters(model, path)
    assert path.read_bytes() == content


def _entry(**changes):
    def change(metadata):
        metadata["adapters"][0] |= changes

    return change


def _twice(metadata):
    metadata["adapters"].append(copy.deepcopy(metadata["adapters"][0]))


def _trained(key):
    head = {"path": key, "adapter": "default"}
    return lambda metadata: metadata["trainable"].append(head)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_twice, "'one' is listed twice"),
        (_trained("head"), "'head' is listed twice"),
        (_trained("one"), "'one' is listed twice"),
        (lambda m: m.update(shared="[1]"), None),
        (lambda m: m.update(trainable=[{}]), "damaged metadata"),
        (lambda m: m.update(trainable={"head": 1}), "damaged metadata"),
        (lambda m: m.update(trainable=[[1]]), "damaged metadata"),
        (lambda m: m.update(adapters=[]), "damaged metadata"),
        (lambda m: m.update(adapters=[1]), "damaged metadata"),
        (lambda m: m.update(adapters="[" * 100_000), "damaged metadata"),
        (lambda m: m.update(values="[" * 100_000), "damaged metadata"),
        (lambda m: m.update(values=[]), "damaged metadata"),
        (lambda m: m["values"].update(weights={"x": 1}), "damaged metadata"),
        (lambda m: m["values"].update(kernels={"x": {}}), "damaged metadata"),
        (lambda m: m.pop("base"), "damaged metadata"),
        (_entry(shared=[1]), "damaged metadata.*shared is"),
        (_entry(shared=True), "damaged metadata.*shared is"),
        (_entry(shared=0), "shared=0 .*'lora' does not fit"),
        (_entry(path=["one"]), "damaged metadata.*path is"),
        (_entry(method={}), "damaged metadata.*method is"),
        (_entry(scale="1"), "damaged metadata.*scale is"),
        (_entry(scale=2), "scale of 'one' is 1, but its options say 2"),
        (_entry(options={"rank": 2, "alpha": 4}), "options say 2"),
        (_entry(options={"rank": "2"}), "rank"),
        (_entry(options={"rank": 2, "dropout": {}}), "dropout"),
        (_entry(options={"rank": 2, "seed": 1e99}), "seed"),
    ],
)
def test_metadata_is_not_trusted(path, change, match):
    tensors, metadata = _file(path)
    change(metadata)
    _write(path, tensors, metadata)
    if match is None:  # what the format does not know is left alone
        ks.load_adapters(_model(), path)
    else:
        _check_refused(path, match)


def test_a_contradicting_scale_in_a_wrapped_model(path):
    tensors, metadata = _file(path)
    tensors["one/default/lora/scale"] = np.array(3, "float32")
    _write(path, tensors, metadata)
    model = ks.wrap_model(
        _model(), "lora", target=["one", "dense.*"], trainable="head", rank=2
    )
    _check_refused(path, "scale of 'one' is 3, but its options say 1", model)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("lora", "rank"),
        ("spectral", "rank"),
        ("spectral", "columns"),
        ("gated_spectral", "directions"),
        ("conditional_spectral", "hidden"),
        ("conditional_spectral", "embedding"),
        ("conditional_spectral", "rank"),
        ("decaying_lora", "rank"),
        ("adalora", "rank"),
        ("dylora", "rank"),
    ],
)
def test_nothing_is_made_of_a_huge_option(path, method, option):
    tensors, metadata = _file(path, method)
    for entry in metadata["adapters"]:
        entry["options"][option] = 10**10
    _write(path, tensors, metadata)
    tracemalloc.start()
    try:
        _check_refused(path, r"1000000000\d")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def _mutations(value, rng):
    """A JSON value with one thing in it changed."""
    junk = [None, True, -1, 0, 10**10, 1e308, "", "x", [], {}, [[]], [1], "NaN"]
    value = copy.deepcopy(value)
    spots = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    node, key = rng.choice(spots)
    if rng.random() < 0.3:
        del node[key]
    else:
        node[key] = rng.choice(junk)
    return value


def _loads(model, path):
    """Whether a file loads; the model is plain again afterwards."""
    try:
        with warnings.catch_warnings():  # numbers of the base may change
            warnings.simplefilter("ignore")
            ks.load_adapters(model, path)
    except ValueError:
        return False
    ks.unwrap_model(model)
    return True


@pytest.mark.parametrize("method", _METHODS)
def test_changed_metadata_raises_one_kind_of_error(path, method):
    tensors, metadata = _file(path, method)
    rng = random.Random(0)
    model = _model()
    before = [ops.convert_to_numpy(w).copy() for w in model.weights]
    kept, refused = list(model.layers), 0
    for _ in range(40):
        name = rng.choice(["adapters", "adapters", "trainable", "values"])
        changed = _mutations({name: metadata[name]}, rng)
        _write(path, tensors, {**metadata, **changed})
        refused += not _loads(model, path)
        assert model.layers == kept
    assert refused > 10
    for weight, value in zip(model.weights, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), value)


def test_changed_bytes_raise_one_kind_of_error(path):
    _file(path)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    model = _model()
    kept, refused = list(model.layers), 0
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 4])):
            changed[rng.randrange(size)] = rng.randrange(256)
        path.write_bytes(bytes(changed))
        refused += not _loads(model, path)
        assert model.layers == kept
    assert refused > 50


@pytest.mark.parametrize("value", [None, 3, "model"])
def test_models_that_are_none(path, value):
    _file(path)
    for call in (
        lambda: ks.save_adapters(value, path),
        lambda: ks.load_adapters(value, path),
        lambda: ks.fuse_adapters(value, [path]),
    ):
        with pytest.raises(ValueError, match="Received a .*Keras model"):
            call()


@pytest.mark.parametrize("value", [None, 3, ""])
def test_paths_that_are_none(value):
    model = ks.wrap_model(_model(), "lora", target="one")
    for call in (
        lambda: ks.save_adapters(model, value),
        lambda: ks.load_adapters(model, value),
        lambda: ks.fuse_adapters(_model(), [value]),
        lambda: ks.fuse_adapters(_model(), value),
    ):
        with pytest.raises(ValueError, match="Received (path|files)="):
            call()
    with pytest.raises(ValueError, match="strict=1"):
        ks.load_adapters(model, "x", strict=1)
