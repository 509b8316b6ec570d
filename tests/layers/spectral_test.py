import os
import pathlib

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks
from keras_spectral.kernels import kernel_view


def spectral_matrix(u, s, v, new_u=None, new_s=None, new_v=None):
    """K' - K; of K only the triplets u, s, v change."""
    new_u = u if new_u is None else new_u
    new_s = s if new_s is None else new_s
    new_v = v if new_v is None else new_v
    return new_u @ np.diag(new_s) @ new_v.T - u @ np.diag(s) @ v.T


def _additive(variant, adapter, u, s, v, delta_u, delta_v):
    change = spectral_matrix(u, s, v, new_u=u + delta_u, new_v=v + delta_v)
    return on_blocks(adapter, change)


def _shifted(variant, adapter, u, s, v, delta_u, delta_v, delta_s):
    new = {"new_u": u + delta_u, "new_s": s + delta_s, "new_v": v + delta_v}
    return on_blocks(adapter, spectral_matrix(u, s, v, **new))


def _adaptive(variant, adapter, mask, delta_u, delta_v, delta_s, **weights):
    masked = (delta_u * mask, delta_v * mask, delta_s * mask)
    names = ("delta_u", "delta_v", "delta_s")
    return _shifted(variant, adapter, **weights, **dict(zip(names, masked)))


def _rotate(variant, adapter, u, s, v, angles_u, angles_v, stretch):
    turned = u @ _rotation(angles_u), s * stretch, v @ _rotation(angles_v)
    return on_blocks(adapter, spectral_matrix(u, s, v, *turned))


def _rotation(x):
    z, eye = (x - x.T) / 2, np.eye(len(x))
    return (eye - z) @ np.linalg.inv(eye + z)


def _values(variant, adapter, u, s, v, delta_s):
    change = spectral_matrix(u, s, v, new_s=np.maximum(s + delta_s, 0))
    return on_blocks(adapter, change)


def _count_values(case, layer):
    view = kernel_view(layer)
    return min(view.n_in, view.n_out)


VARIANTS = [
    Variant(ks.SpectralDense, "additive", {"rank": 2}, _additive),
    Variant(
        ks.SpectralDense,
        "columns",
        {"rank": 2, "columns": [2, 0]},
        _additive,
        cases=layer_cases.named("dense", "conv_2d_strided"),
    ),
    Variant(
        ks.SpectralDense,
        "shifted",
        {"rank": 2, "columns": 1, "shift_values": True},
        _shifted,
        lambda case, layer: 2 * (case.size + 1),
        cases=layer_cases.named("dense", "conv_2d_strided"),
    ),
    Variant(
        ks.SpectralDense,
        "adaptive",
        {"rank": 2, "shift_values": True, "adaptive": True},
        _adaptive,
        lambda case, layer: 2 * (case.size + 2),
        cases=layer_cases.named("dense", "conv_2d_strided"),
    ),
    Variant(
        ks.SpectralDense,
        "rotate",
        {"rank": 2, "mode": "rotate"},
        _rotate,
        lambda case, layer: 10,
    ),
    Variant(
        ks.SpectralDense,
        "values",
        {"mode": "values"},
        _values,
        _count_values,
    ),
]


def _layer(shape=(5, 6), **options):
    base = keras.layers.Dense(shape[1], name="base")
    layer = ks.SpectralDense(base, **options)
    layer.build((None, shape[0]))
    return layer


def test_golden_additive():
    folder = os.environ.get("KERAS_SPECTRAL_GOLDEN")
    if not folder:
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    gold = np.load(pathlib.Path(folder, "spectral_additive.npz"))
    n_out, n_in = gold["W"].shape
    rank = gold["dB"].shape[1]
    layer = _layer(shape=(n_in, n_out), rank=rank)
    layer.layer.kernel.assign(gold["W"].T)
    layer.layer.bias.assign(gold["b"])
    # Their W is our kernel's transpose: U and V change places.
    layer.u.assign(gold["V"][:, :rank])
    layer.s.assign(gold["S"][:rank])
    layer.v.assign(gold["U"][:, :rank])
    layer.delta_u.assign(gold["dA"].T)
    layer.delta_v.assign(gold["dB"])
    got = ops.convert_to_numpy(layer(gold["x"]))
    np.testing.assert_allclose(got, gold["A_y"], atol=1e-5)


def test_golden_triplets_are_those_that_we_find():
    folder = os.environ.get("KERAS_SPECTRAL_GOLDEN")
    if not folder:
        pytest.skip("set KERAS_SPECTRAL_GOLDEN to the folder of golden files")
    gold = np.load(pathlib.Path(folder, "spectral_additive.npz"))
    layer = _layer(shape=gold["W"].T.shape, rank=3)
    layer.layer.kernel.assign(gold["W"].T)
    fresh = ks.SpectralDense(layer.layer, rank=3)
    fresh.build((None, gold["W"].shape[1]))
    np.testing.assert_allclose(fresh.s.numpy(), gold["S"][:3], rtol=1e-5)
    overlap = np.abs(np.sum(fresh.u.numpy() * gold["V"][:, :3], axis=0))
    np.testing.assert_allclose(overlap, 1, atol=1e-4)


def test_sizes_of_the_modes():
    sizes = {
        mode: sum(
            int(np.prod(w.shape))
            for w in _layer(shape=(20, 12), mode=mode).trainable_weights
        )
        for mode in ("additive", "rotate", "values")
    }
    assert sizes == {
        "additive": 8 * 32,
        "rotate": 2 * 64 + 8,
        "values": 12,
    }
    assert _layer(shape=(20, 12), mode="values", rank=3).rank == 3
    assert _layer(shape=(20, 12), mode="values", columns=5).rank == 7


def test_columns_are_the_triplets_asked_for():
    offset = _layer(rank=2, columns=3)
    listed = _layer(columns=[4, 1])
    for layer, columns in ((offset, [3, 4]), (listed, [4, 1])):
        kernel = layer.layer.kernel.numpy()
        values = np.linalg.svd(kernel, compute_uv=False)
        np.testing.assert_allclose(layer.s.numpy(), values[columns], rtol=1e-4)


def test_values_never_turn_negative():
    layer = _layer(mode="values")
    layer.delta_s.assign(-100 * np.ones(5))
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.merged_matrix()), 0, atol=1e-5
    )


def test_rotation_keeps_the_singular_values():
    layer = _layer(rank=3, mode="rotate")
    rng = np.random.default_rng(0)
    layer.angles_u.assign(rng.normal(size=(3, 3)))
    layer.angles_v.assign(rng.normal(size=(3, 3)))
    before = np.linalg.svd(layer.layer.kernel.numpy(), compute_uv=False)
    after = ops.convert_to_numpy(layer.merged_matrix())
    np.testing.assert_allclose(
        np.linalg.svd(after, compute_uv=False), before, atol=1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"rank": True},
        {"rank": 2.0},
        {"rank": 6},
        {"mode": "multiplicative"},
        {"shift_values": "yes"},
        {"shift_values": True, "mode": "rotate"},
        {"shift_values": True, "mode": "values"},
        {"columns": -1},
        {"columns": 1.5},
        {"columns": []},
        {"columns": [1, 1]},
        {"columns": [0, 9]},
        {"columns": [0, 1], "rank": 3},
        {"columns": 4, "rank": 2},
        {"columns": 7, "mode": "values"},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="Expected"):
        _layer(**options)


def test_a_bad_column_leaves_the_model_as_it_was():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(6)])
    layer = model.layers[0]
    with pytest.raises(ValueError, match="dense.*singular values"):
        ks.wrap_model(model, "spectral", target=keras.layers.Dense, columns=[5])
    assert model.layers[0] is layer and layer.trainable


def test_adaptive_needs_directions_of_its_own():
    with pytest.raises(ValueError, match="adaptive=True with mode='rotate'"):
        _layer(mode="rotate", adaptive=True)
