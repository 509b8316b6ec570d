import os
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks


def _layer(cls=ks.SpectralDense, shape=(5, 6), **options):
    layer = cls(keras.layers.Dense(shape[1], name="base"), **options)
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


@pytest.mark.parametrize(
    "options",
    [{"directions": 6}, {"directions": 0}, {"l1": -1}, {"rank": "8"}],
)
def test_bad_gate_options(options):
    with pytest.raises(ValueError, match="Expected"):
        _layer(ks.GatedSpectralDense, **options)


def test_a_bad_column_leaves_the_model_as_it_was():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(6)])
    layer = model.layers[0]
    with pytest.raises(ValueError, match="dense.*singular values"):
        ks.wrap_model(model, "spectral", target=keras.layers.Dense, columns=[5])
    assert model.layers[0] is layer and layer.trainable


def test_gates_start_closed_and_the_default_number_is_twice_the_rank():
    layer = _layer(ks.GatedSpectralDense, (40, 30), rank=4)
    assert layer.directions == 8 and not layer.gates.numpy().any()
    assert _layer(ks.GatedSpectralDense).directions == 5  # no more are there


def test_l1_joins_the_loss_once():
    layer = _layer(ks.GatedSpectralDense, directions=3, l1=0.5)
    layer.gates.assign([1.0, -2.0, 0.0])
    x = np.ones((2, 5), "float32")
    layer(x), layer(x)
    (loss,) = layer.losses
    assert ops.convert_to_numpy(loss) == 1.5


def test_prune_gates():
    layer = _layer(ks.GatedSpectralDense, directions=4)
    layer.gates.assign([0.5, -0.05, 0.0, -0.2])
    assert layer.active_gates(0.1) == 2
    assert layer.prune_gates(0.1) == 2
    np.testing.assert_array_equal(
        layer.gates.numpy(), np.float32([0.5, 0, 0, -0.2])
    )
