import keras
import numpy as np
import pytest
from keras import ops
from variants import Variant

import keras_spectral as ks


def _size(case, layer):
    rank, hidden, embedding = 2, 8, 3
    inner = (rank + embedding) * hidden + hidden + hidden * rank + rank
    return inner + embedding


VARIANTS = [
    Variant(
        ks.ConditionalSpectralDense,
        "conditional",
        {"rank": 2, "hidden": 8, "embedding": 3, "alpha": 1.0},
        None,
        _size,
    ),
]


def _layer(**options):
    keras.utils.set_random_seed(0)
    options = {"rank": 3, "hidden": 8, "embedding": 2, "seed": 1, **options}
    layer = ks.ConditionalSpectralDense(
        keras.layers.Dense(6, name="base"), **options
    )
    layer.build((None, 7, 5))
    return layer


def _x(batch=4):
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, 7, 5)).astype("float32")


def _randomize(layer):
    rng = np.random.default_rng(5)
    for weight in layer.trainable_weights:
        weight.assign(weight + rng.normal(0, 1, weight.shape))


def _oracle(layer, x, mask=None):
    get = lambda w: np.float64(w.numpy())  # noqa: E731
    u, s, v, net = get(layer.u), get(layer.s), get(layer.v), layer.network
    if layer.context == "first":
        context = x[:, 0]
    elif mask is None:
        context = x.mean(axis=1)
    else:
        context = np.stack([row[keep].mean(0) for row, keep in zip(x, mask)])
    z = context @ u
    z = z / np.sqrt((z**2).mean(axis=1, keepdims=True) + 1e-6)
    embedding = np.tile(get(layer.layer_embedding), (len(x), 1))
    joined = np.concatenate([z, embedding], axis=1)
    hidden = joined @ get(net.hidden_kernel) + get(net.hidden_bias)
    hidden = np.maximum(hidden, 0)
    logits = hidden @ get(net.logit_kernel) + get(net.logit_bias)
    gates = logits > 0
    delta = np.einsum("bti,ir,br,or->bto", x, u, gates * s, v)
    kernel, bias = get(layer.layer.kernel), get(layer.layer.bias)
    return x @ kernel + bias + layer.alpha * delta, gates, logits


@pytest.mark.parametrize("context", ["first", "mean"])
def test_inference_equals_the_formula(context):
    layer = _layer(context=context, alpha=0.7)
    _randomize(layer)
    expected, gates, _ = _oracle(layer, _x(32))
    assert 0 < gates.mean() < 1
    got = ops.convert_to_numpy(layer(_x(32), training=False))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.mean_gates()), gates.mean(0), atol=1e-6
    )
    assert layer.active_gates() == pytest.approx(gates.sum(1).mean())
    layer.reset_gates()
    assert layer.active_gates() == 0


def test_padding_does_not_enter_the_mean():
    layer = _layer(context="mean", alpha=0.7)
    _randomize(layer)
    mask = np.arange(7) < np.array([[7], [3], [1], [5]])
    expected, _, _ = _oracle(layer, _x(), mask)
    got = layer(_x(), training=False, mask=mask)
    np.testing.assert_allclose(ops.convert_to_numpy(got), expected, atol=1e-5)


def test_training_draws_gates_with_the_stated_probability():
    layer = _layer(alpha=1.0)
    layer.reset_gates()
    layer(_x(4000)[:, :1], training=True)
    share = ops.convert_to_numpy(layer.mean_gates())
    _, _, logits = _oracle(layer, _x(4000)[:, :1])
    expected = (1 - np.exp(-np.exp(logits))).mean(axis=0)
    np.testing.assert_allclose(share, expected, atol=0.03)
    assert share.mean() == pytest.approx(0.25, abs=0.03)


def test_l0_is_the_expected_number_of_open_gates():
    layer = _layer(l0=0.5)
    layer(_x(), training=False)
    assert not layer.losses
    layer(_x(), training=True)
    _, _, logits = _oracle(layer, _x())
    expected = 0.5 * (1 - np.exp(-np.exp(logits))).sum(axis=1).mean()
    loss = ops.convert_to_numpy(layer.losses[0])
    np.testing.assert_allclose(loss, expected, atol=1e-5)


def _two_layers():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(6, "relu", name="one"),
            keras.layers.Dense(4, name="two"),
            keras.layers.Dense(7, name="three"),
        ]
    )


def test_one_network_is_shared_and_counted_once():
    model = _two_layers()
    ks.wrap_model(
        model, "conditional_spectral", target=["one", "two"], rank=2, hidden=8
    )
    one, two = model.get_layer("one"), model.get_layer("two")
    assert one.network is two.network
    ids = [id(w) for w in model.trainable_weights]
    assert len(ids) == len(set(ids)) == 4 + 2
    summary = ks.adapter_summary(model)
    rows = {row.path: row for row in summary.rows}
    assert rows["one"].trainable == rows["two"].trainable == 8
    network = (2 + 8) * 8 + 8 + 8 * 2 + 2
    assert rows["gate_network"].trainable == network
    assert summary.trainable == network + 16
    # Layers wrapped later join in; another rank cannot.
    with pytest.raises(ValueError, match="three.*rank"):
        ks.wrap_model(
            model, "conditional_spectral", target="three", rank=3, hidden=8
        )
    ks.wrap_model(
        model, "conditional_spectral", target="three", rank=2, hidden=8
    )
    assert model.get_layer("three").network is one.network


def test_files_hold_the_network_once_and_restore_the_sharing(tmp_path):
    model = _two_layers()
    ks.wrap_model(
        model, "conditional_spectral", target=["one", "two"], rank=2, alpha=1.0
    )
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    x = rng.normal(size=(8, 5)).astype("float32")
    expected = ops.convert_to_numpy(model(x))
    path = tmp_path / "adapters.safetensors"
    ks.save_adapters(model, path)
    fresh = _two_layers()
    ks.load_adapters(fresh, path)
    assert fresh.get_layer("one").network is fresh.get_layer("two").network
    np.testing.assert_allclose(
        ops.convert_to_numpy(fresh(x)), expected, atol=1e-6
    )
    model.save(tmp_path / "whole.keras")
    whole = keras.models.load_model(tmp_path / "whole.keras")
    np.testing.assert_allclose(
        ops.convert_to_numpy(whole(x)), expected, atol=1e-6
    )
    assert whole.get_layer("one").network is whole.get_layer("two").network


def test_hand_built_layers_with_networks_of_their_own(tmp_path):
    def build():
        keras.utils.set_random_seed(0)
        layers = [
            ks.ConditionalSpectralDense(
                keras.layers.Dense(5, name=name), rank=2, alpha=1.0
            )
            for name in ("one", "two")
        ]
        return keras.Sequential([keras.Input((5,)), *layers])

    model = build()
    assert model.layers[0].network is not model.layers[1].network
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    x = rng.normal(size=(8, 5)).astype("float32")
    expected = ops.convert_to_numpy(model(x))
    ks.save_adapters(model, tmp_path / "adapters.safetensors")
    for fresh in (build(), ks.unwrap_model(build())):
        ks.load_adapters(fresh, tmp_path / "adapters.safetensors")
        np.testing.assert_allclose(
            ops.convert_to_numpy(fresh(x)), expected, atol=1e-6
        )


def test_refusals():
    layer = _layer()
    with pytest.raises(ValueError, match="depend on the input"):
        layer.merged_matrix()
    for options in (
        {"context": "last"},
        {"temperature": 0},
        {"l0": -1},
        {"rank": 6},
        {"hidden": 0},
    ):
        with pytest.raises(ValueError, match="Expected"):
            _layer(**options)
    with pytest.raises(ValueError, match="one direction"):
        ks.ConditionalSpectralDense(keras.layers.ReversibleEmbedding(9, 5))


def test_another_width_of_the_hypernetwork_is_refused():
    model = keras.Sequential(
        [keras.Input((6,))]
        + [keras.layers.Dense(6, name=name) for name in ("one", "two")]
    )
    options = {"method": "conditional_spectral", "rank": 2}
    ks.wrap_model(model, target="one", hidden=8, **options)
    with pytest.raises(ValueError, match="'hidden': 4"):
        ks.wrap_model(model, target="two", hidden=4, **options)
    ks.wrap_model(model, target="two", hidden=8, **options)
