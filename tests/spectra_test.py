import functools
import os
import stat

import keras
import numpy as np
import pytest
import rich.console
import safetensors.numpy
from keras import ops

import keras_spectral as ks
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels import spectra


def _views(*shapes):
    views = []
    for n_in, n_out in shapes:
        layer = keras.layers.Dense(n_out)
        layer.build((None, n_in))
        views.append(kernel_view(layer))
    return views


def _check(view, triplets, count):
    kernel = ops.convert_to_numpy(view.matrix())
    values = np.linalg.svd(kernel, compute_uv=False)[:count]
    u, s, v = map(ops.convert_to_numpy, triplets)
    np.testing.assert_allclose(s, values, rtol=1e-4)
    np.testing.assert_allclose(kernel @ v, u * s, atol=1e-4)


def test_mixed_shapes_and_counts_come_back_in_order(monkeypatch):
    monkeypatch.setattr(spectra, "_TOGETHER", 150)  # two kernels at a time
    views = _views((9, 8), (5, 6), (9, 8), (9, 8), (9, 8))
    counts = [3, 5, 3, 2, 3]
    found = spectra.factorize(zip(views, counts))
    for view, count, triplets in zip(views, counts, found):
        assert triplets.u.shape == (view.n_in, count)
        _check(view, triplets, count)


def test_no_graph_for_gradients_is_kept():
    views = _views((9, 8), (5, 6))
    for triplets in spectra.factorize((view, 2) for view in views):
        assert not any(getattr(x, "requires_grad", False) for x in triplets)


def test_cache_is_used_and_survives_damage(tmp_path, monkeypatch):
    views = _views((9, 8), (5, 6))
    requests = [(view, 2) for view in views]
    folder = tmp_path / "new" / "cache"
    spectra.factorize(requests, folder)
    files = sorted(folder.iterdir())
    assert len(files) == 2 and all(f.suffix == ".safetensors" for f in files)

    def refuse(matrix, count):
        raise AssertionError("factorised again")

    real = spectra.leading_triplets
    monkeypatch.setattr(spectra, "leading_triplets", refuse)
    for view, triplets in zip(views, spectra.factorize(requests, folder)):
        _check(view, triplets, 2)
    monkeypatch.setattr(spectra, "leading_triplets", real)
    files[0].write_bytes(b"no safetensors")
    for view, triplets in zip(views, spectra.factorize(requests, folder)):
        _check(view, triplets, 2)
    assert files[0].read_bytes() != b"no safetensors"
    views[0].layer.kernel.assign(2 * views[0].layer.kernel)
    spectra.factorize(requests, folder)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(u=t["u"][:, :1].copy()),
        lambda t: t.update(u=t["v"]),
        lambda t: t.update(s=t["s"] * np.nan),
        lambda t: t.update(v=t["v"].astype("int32")),
        lambda t: t.update(x=t["v"]),
        lambda t: t.pop("s"),
    ],
)
def test_damaged_factors_are_made_anew(tmp_path, change):
    (view,) = _views((9, 8))
    spectra.factorize([(view, 2)], tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    (found,) = spectra.factorize([(view, 2)], tmp_path)
    _check(view, found, 2)
    assert path.read_bytes() == good


def test_a_cache_of_another_user_is_read_and_warns(tmp_path, monkeypatch):
    (view,) = _views((9, 8))
    spectra.factorize([(view, 2)], tmp_path)
    (path,) = tmp_path.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.unlink()

    def forbid(*args):
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(spectra, "write_safetensors", forbid)
    with pytest.warns(UserWarning, match="not kept in svd_cache.*denied"):
        (found,) = spectra.factorize([(view, 2)], tmp_path)
    _check(view, found, 2)


@pytest.mark.parametrize("folder", [3, "", "file"])
def test_caches_that_are_no_folders(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="svd_cache=.*Expected"):
        spectra.factorize([], folder)


@pytest.mark.parametrize("method", ["lora", "spectral"])
def test_a_cache_is_checked_whether_it_is_used_or_not(method):
    model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(8)])
    with pytest.raises(ValueError, match="svd_cache=3.*Expected"):
        ks.wrap_model(model, method, "all", rank=2, svd_cache=3)


def test_wrap_model_uses_the_cache(tmp_path):
    def wrapped():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(8)])
        return ks.wrap_model(
            model,
            "spectral",
            target=keras.layers.Dense,
            rank=2,
            svd_cache=tmp_path,
        )

    first, second = wrapped().layers[0], wrapped().layers[0]
    np.testing.assert_array_equal(first.u.numpy(), second.u.numpy())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("spectral", {}),
        ("gated_spectral", {}),
        ("decaying_lora", {"end_step": 4}),
        ("lora", {"initializer": "pissa"}),
    ],
)
def test_a_kernel_that_is_not_finite_is_named(method, options, bad):
    model = keras.Sequential(
        [keras.Input((9,)), keras.layers.Dense(8, name="hidden")]
    )
    layer = model.layers[0]
    values = layer.kernel.numpy().copy()
    values[2, 3] = bad
    layer.kernel.assign(values)
    with pytest.raises(ValueError, match="'hidden'.* NaN or inf"):
        ks.wrap_model(model, method, target="hidden", rank=2, **options)
    assert model.layers[0] is layer and layer.trainable
    np.testing.assert_array_equal(layer.kernel.numpy(), values)


def test_loading_a_file_does_not_factorise_again(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((9,)), keras.layers.Dense(8)])
    ks.wrap_model(model, "spectral", target=keras.layers.Dense, rank=2)
    u = model.layers[0].u.numpy()
    ks.save_adapters(model, tmp_path / "a.safetensors")
    ks.unwrap_model(model)
    monkeypatch.setattr(spectra, "leading_triplets", None)
    ks.load_adapters(model, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(model.layers[0].u.numpy(), u)


def test_progress_bar_shows_on_long_work_only(monkeypatch):
    started = []
    monkeypatch.setattr(
        spectra.Progress, "start", lambda self: started.append(1)
    )
    requests = [(view, 2) for view in _views((9, 8), (5, 6))]
    spectra.factorize(requests)
    assert not started
    monkeypatch.setattr(spectra, "_SHOW_AFTER", -1.0)
    spectra.factorize(requests)
    assert started


def test_progress_bar_keeps_quiet_in_a_notebook_without_widgets(monkeypatch):
    monkeypatch.setattr(spectra, "_SHOW_AFTER", -1.0)
    monkeypatch.setattr(spectra.importlib.util, "find_spec", lambda name: None)
    for notebook in (False, True):
        options = {"quiet": True, "force_jupyter": notebook}
        made = functools.partial(rich.console.Console, **options)
        monkeypatch.setattr(spectra, "Console", made)
        with spectra.LateProgress("work", 2) as progress:
            progress.advance(1)
            assert progress.bar.live.is_started != notebook


@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        (ks.LoRADense, {"rank": 2, "initializer": "pissa"}),
        (ks.DecayingLoRA, {"rank": 2, "end_step": 10}),
        (ks.SpectralDense, {"rank": 2}),
        (ks.GatedSpectralDense, {"directions": 2, "l1": 0.1}),
        (ks.ConditionalSpectralDense, {"rank": 2}),
    ],
)
def test_a_model_may_be_built_by_fit(adapter, options):
    """The kernel gets its numbers after the layers are built."""
    layer = adapter(keras.layers.Dense(6), **options)
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(1e-12), "mse")
    x = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
    model.fit(x, np.ones((8, 6)), verbose=0)
    if hasattr(layer, "u"):
        _check(layer.view, (layer.u, layer.s, layer.v), 2)
        return
    u, s, vt = np.linalg.svd(layer.layer.kernel.numpy())
    pair = layer.lora_a.numpy() @ layer.lora_b.numpy()
    np.testing.assert_allclose(pair, u[:, :2] * s[:2] @ vt[:2], atol=1e-4)
