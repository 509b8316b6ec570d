"""A file knows the base that its adapters were trained on."""

import json

import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from keras import layers
from keras import ops

import keras_spectral as ks
from keras_spectral.kernels import kernel_view


def _model(seed=0, dtype="float32"):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6, 12)),
            layers.Dense(16, name="hidden", dtype=dtype),
            layers.EinsumDense(
                "abc,cde->abde", (None, 2, 8), name="query", dtype=dtype
            ),
            layers.Reshape((6, 16)),
            layers.LayerNormalization(name="norm", dtype=dtype),
            layers.Dense(3, name="head", dtype=dtype),
        ]
    )


_HOLDERS = {
    "spectral": {},
    "gated_spectral": {"directions": 2},
    "conditional_spectral": {},
    "lora": {"initializer": "pissa"},
    "decaying_lora": {},
}


def _saved(path, method="lora", model=None, **options):
    model = model or _model()
    if "directions" not in options:
        options["rank"] = 2
    ks.wrap_model(
        model,
        method,
        target=["hidden", "query"],
        trainable="head",
        **options,
    )
    ks.save_adapters(model, path)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def _copy_of(model, dtype):
    copy = _model(9, dtype)
    for new, old in zip(copy.weights, model.weights):
        new.assign(ops.cast(old, new.dtype))
    return copy


@pytest.mark.parametrize("method", _HOLDERS)
def test_factors_of_another_kernel_are_refused(path, method):
    _saved(path, method, **_HOLDERS[method])
    ks.load_adapters(_model(), path)
    other = _model(1)
    before = other.get_weights()
    with pytest.raises(ValueError, match="another base.*'hidden'.*strict=Fal"):
        ks.load_adapters(other, path)
    for one, two in zip(other.get_weights(), before):
        np.testing.assert_array_equal(one, two)
    with pytest.warns(UserWarning, match="another base"):
        ks.load_adapters(other, path, strict=False)
    assert isinstance(other.get_layer("hidden"), ks.AdapterLayer)


@pytest.mark.parametrize("options", [{}, {"initializer": "kaiming"}])
def test_others_warn_of_another_base(path, options):
    _saved(path, **options)
    for name in ("hidden", "query"):
        other = _model()
        layer = other.get_layer(name)
        layer.kernel.assign(layer.kernel * 1.02)
        with pytest.warns(UserWarning, match=f"another base.*at '{name}'\\."):
            ks.load_adapters(other, path)
        with pytest.warns(UserWarning, match="another base"):
            ks.load_adapters(other, path)  # wrapped by now


def test_other_weights_count_and_heads_do_not(path):
    _saved(path)
    other = _model()
    other.get_layer("head").kernel.assign(np.ones((16, 3)))
    ks.load_adapters(other, path)
    other = _model()
    other.get_layer("norm").gamma.assign(np.full(16, 1.5))
    with pytest.warns(UserWarning, match="'norm/gamma'"):
        ks.load_adapters(other, path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("saved_small", [False, True])
def test_rounding_does_not_warn(path, dtype, saved_small):
    one, two = _model(), _copy_of(_model(), dtype)
    if saved_small:
        one, two = two, one
    _saved(path, "lora", model=one, initializer="pissa")
    ks.load_adapters(two, path)
    for name in ("hidden", "query"):
        np.testing.assert_array_equal(
            two.get_layer(name).start_a.numpy(),
            one.get_layer(name).start_a.numpy(),
        )


@pytest.mark.once
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_bases_do_not_warn(path, mode):
    _saved(path, initializer="pissa")
    other = _model()
    for name in ("hidden", "query"):
        other.get_layer(name).quantize(mode)
    ks.load_adapters(other, path)
    ks.save_adapters(other, path)
    ks.load_adapters(_model(), path)
    with pytest.raises(ValueError, match="another base"):
        ks.load_adapters(_model(1), path)


@pytest.mark.once
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize("kind", ["dense", "einsum", "embedding"])
def test_rows_of_a_kernel(kind, mode):
    layer, shape = {
        "dense": (layers.Dense(6), (None, 8)),
        "einsum": (
            layers.EinsumDense("abc,dce->abde", (None, 4, 2)),
            (2, 3, 8),
        ),
        "embedding": (layers.Embedding(8, 6), (None, 3)),
    }[kind]
    layer.build(shape)
    if mode:
        layer.quantize(mode)
    view = kernel_view(layer)
    rows = ops.convert_to_numpy(view.rows([0, 3, 7]))
    whole = ops.convert_to_numpy(view.matrix())
    np.testing.assert_allclose(rows, whole[[0, 3, 7]], atol=1e-6)


def _values(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["values"])


def test_a_kernel_is_not_read_whole(path, monkeypatch):
    model = _model()
    model.quantize("int8")
    kind = type(kernel_view(model.get_layer("hidden")))
    _saved(path, model=model)
    monkeypatch.setattr(kind, "matrix", None)
    before = _values(path)
    ks.save_adapters(model, path)
    assert _values(path) == before and before["kernels"]


def test_files_of_version_0_1_load(path):
    _saved(path, "spectral")
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    assert set(json.loads(metadata.pop("values"))["kernels"]) == {
        "hidden",
        "query",
    }
    safetensors.numpy.save_file(tensors, path, metadata)
    other = ks.load_adapters(_model(1), path)
    u = other.get_layer("hidden").u
    np.testing.assert_array_equal(
        u.numpy(), tensors["hidden/default/spectral/u"]
    )


def test_averages_of_another_base_are_refused(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        _saved(file)
    with pytest.raises(ValueError, match="another base"):
        ks.fuse_adapters(_model(1), files, method="average")
