import golden
import keras
import layer_cases
import numpy as np
import pytest
from keras import ops
from variants import Variant
from variants import on_blocks

import keras_spectral as ks


def _matrix(variant, adapter, first_a, first_b, second_a, second_b):
    product = (first_a @ first_b) * (second_a @ second_b)
    return on_blocks(adapter, product * 6 / 2)


def _cores(variant, adapter, **weights):
    def factor(name):
        a, b, core = (weights[f"{name}_{end}"] for end in ("a", "b", "core"))
        return np.einsum("...ji,cj,if->...cf", core, a, b)

    kernel = factor("first") * factor("second")
    return ops.convert_to_numpy(adapter.view.to_matrix(np.float32(kernel)))


def _cores_size(case, layer):
    *sides, channels, filters = layer.kernel.shape
    return 2 * (2 * (channels + filters) + 4 * np.prod(sides))


VARIANTS = [
    Variant(
        ks.LoHaDense,
        "loha",
        {"rank": 2, "alpha": 6},
        _matrix,
        lambda case, layer: 4 * case.size,
    ),
    Variant(
        ks.LoHaDense,
        "loha_cp",
        {"rank": 2, "cp": True},
        _cores,
        _cores_size,
        cases=layer_cases.named("conv_1d", "conv_2d_strided", "conv_2d_groups"),
    ),
]


def test_golden_numbers():
    arrays = golden.arrays_of("loha.npz", "linear")
    layer = ks.LoHaDense(golden.dense_of(arrays), rank=3, alpha=6)
    layer.build(arrays["x"].shape)
    gradients = {}
    for ours, theirs in (
        ("first_a", "hada_w1_b"),
        ("first_b", "hada_w1_a"),
        ("second_a", "hada_w2_b"),
        ("second_b", "hada_w2_a"),
    ):
        getattr(layer, ours).assign(arrays[f"param.lin.{theirs}"].T)
        gradients[ours] = arrays[f"grad.lin.{theirs}"].T
    golden.check_dense(layer, arrays, gradients)


def test_its_rank_exceeds_that_of_its_pairs():
    layer = ks.LoHaDense(keras.layers.Dense(20), rank=3)
    layer.build((None, 20))
    layer.second_a.assign(np.random.default_rng(0).normal(size=(20, 3)))
    delta = ops.convert_to_numpy(layer.delta_matrix())
    assert np.linalg.matrix_rank(delta) == 9


def test_a_quantised_base():
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.quantize("int8")
    x = np.random.default_rng(0).normal(size=(8, 16)).astype("float32")
    plain = ops.convert_to_numpy(model(x))
    ks.wrap_model(model, "loha", target="all", rank=2)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), plain)
    adapter = model.layers[0]
    adapter.second_a.assign(np.ones((16, 2)))
    delta = ops.convert_to_numpy(adapter.delta_matrix())
    expected = plain + x @ delta
    np.testing.assert_allclose(
        ops.convert_to_numpy(model(x)), expected, atol=1e-5
    )
    model.compile("adam", "mse")
    model.fit(x, np.ones((8, 8)), verbose=0)
    with pytest.raises(ValueError, match="quantised"):
        ks.merge_model(model)


@pytest.mark.parametrize(
    ("base", "options", "match"),
    [
        (keras.layers.ReversibleEmbedding(5, 4), {}, "one direction"),
        (keras.layers.Dense(3), {"cp": True}, "cp=True"),
        (keras.layers.Dense(3), {"cp": 1}, "cp=1"),
        (keras.layers.Dense(3), {"rank": 0}, "rank=0"),
        (keras.layers.Dense(3), {"alpha": 0}, "alpha=0"),
    ],
)
def test_what_it_refuses(base, options, match):
    with pytest.raises(ValueError, match=match):
        ks.LoHaDense(base, **options)


def test_a_pair_of_layers_has_no_kernel_of_its_own():
    pair = ks.LowRank(
        keras.layers.Dense(2, use_bias=False), keras.layers.Dense(4)
    )
    layer = ks.LoHaDense(pair, rank=1)
    with pytest.raises(ValueError, match="a product of two"):
        layer.build((None, 6))
    assert pair.trainable
