import keras
import numpy as np
import pytest
from keras import ops
from lora_test import lora_matrix
from variants import Variant

import keras_spectral as ks


def _halfway(adapter):
    adapter.step.assign(2)  # of four


def _faded(adapter, decay):
    """What the original has lost, of a factor that is half of the way."""
    kernel = np.float64(_numpy(adapter.view.matrix()))
    return (1 - decay) * kernel


def _truncated(variant, adapter, start_a, start_b, lora_a, lora_b, **state):
    pair = lora_matrix(adapter, 3 / 2, lora_a, lora_b)
    start = lora_matrix(adapter, 3 / 2, start_a, start_b)
    return pair - 0.5 * start - _faded(adapter, 0.5)


def _full(variant, adapter, lora_a, lora_b, **state):
    # A cosine is at its middle half of the way: (1 + 0.1) / 2.
    return lora_matrix(adapter, 1, lora_a, lora_b) - _faded(adapter, 0.55)


VARIANTS = [
    Variant(
        ks.DecayingLoRA,
        "decaying",
        {"rank": 2, "alpha": 3, "end_step": 4},
        _truncated,
        exact_start=False,
        settle=_halfway,
    ),
    Variant(
        ks.DecayingLoRA,
        "decaying_bias",
        {
            "rank": 2,
            "end_step": 4,
            "schedule": "cosine",
            "min_decay": 0.1,
            "residual": "full",
            "decay_bias": True,
        },
        _full,
        starts_as_base=False,
        settle=_halfway,
        bias=lambda variant, adapter, bias: 0.55 * bias,
    ),
]


def _layer(shape=(5, 6), **options):
    options = {"rank": 2, "end_step": 4, **options}
    layer = ks.DecayingLoRA(
        keras.layers.Dense(shape[1], name="base"), **options
    )
    layer.build((None, shape[0]))
    return layer


def _x(count=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 5)).astype("float32")


def _numpy(x):
    return ops.convert_to_numpy(x)


@pytest.mark.parametrize(
    ("schedule", "low", "expected"),
    [
        ("linear", 0.0, [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        ("linear", 0.2, [1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("cosine", 0.0, [1, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]),
        ("exponential", 0.0625, [1, 1, 1, 0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ("exponential", 0.0, [1, 1, 1, 0.177828, 0.031623, 0.005623, 0, 0]),
    ],
)
def test_schedules(schedule, low, expected):
    layer = _layer(start_step=2, end_step=6, schedule=schedule, min_decay=low)
    factors = []
    for _ in expected:
        factors.append(layer.decay_factor())
        layer(_x(), training=True)
    np.testing.assert_allclose(factors, expected, atol=1e-6)
    assert int(layer.step) == 8


def test_inference_does_not_count():
    layer = _layer()
    for _ in range(3):
        layer(_x()), layer(_x(), training=False)
    assert int(layer.step) == 0


# Keras's PyTorch trainer knows no other number than 1.
@pytest.mark.parametrize(
    "steps_per_execution",
    [1] if keras.backend.backend() == "torch" else [1, 3],
)
def test_fit_counts_every_step_once(steps_per_execution):
    model = keras.Sequential([keras.Input((5,)), _layer(end_step=100)])
    model.compile(
        "sgd", "mse", steps_per_execution=steps_per_execution, run_eagerly=False
    )
    model.fit(_x(24), np.ones((24, 6)), batch_size=4, epochs=2, verbose=0)
    assert int(model.layers[0].step) == 12
    model.evaluate(_x(24), np.ones((24, 6)), verbose=0)
    assert int(model.layers[0].step) == 12


def test_gradient_accumulation_counts_batches():
    model = keras.Sequential([keras.Input((5,)), _layer(end_step=100)])
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse")
    model.fit(_x(24), np.ones((24, 6)), batch_size=4, verbose=0)
    assert int(model.layers[0].step) == 6


def test_backup_and_restore_goes_on_counting(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def fit(*callbacks):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), _layer(end_step=100)])
        model.compile("sgd", "mse")
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        try:
            model.fit(
                _x(24),
                np.ones((24, 6)),
                batch_size=4,
                epochs=4,
                verbose=0,
                callbacks=[backup, *callbacks],
            )
        except KeyboardInterrupt:
            pass
        return int(model.layers[0].step)

    assert fit(Stop()) == 12
    assert fit() == 24  # two epochs restored, two trained


def test_starts():
    keras.utils.set_random_seed(1)
    svd = _layer((40, 30), rank=4, alpha=2)
    kernel = svd.layer.kernel.numpy()
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    product = 0.5 * svd.lora_a.numpy() @ svd.lora_b.numpy()
    np.testing.assert_allclose(product, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-4)
    zeros = _layer(initializer="zeros")
    assert not zeros.lora_b.numpy().any() and zeros.lora_a.numpy().any()
    fan_in = _layer((400, 300), rank=100, initializer="fan_in")
    for weight, n_in in ((fan_in.lora_a, 400), (fan_in.lora_b, 100)):
        bound = np.sqrt(1 / n_in)
        assert np.abs(weight.numpy()).max() <= bound
        np.testing.assert_allclose(
            weight.numpy().std(), bound / np.sqrt(3), rtol=0.05
        )


@pytest.mark.parametrize("residual", ["truncated", "full"])
def test_at_the_end_the_pair_is_all_that_is_left(residual):
    layer = _layer(residual=residual)
    rng = np.random.default_rng(1)
    layer.layer.bias.assign(rng.normal(size=6))
    layer.lora_a.assign(rng.normal(size=(5, 2)))
    layer.step.assign(4)
    pair = layer.lora_a.numpy() @ layer.lora_b.numpy()
    expected = _x() @ pair + layer.layer.bias.numpy()
    np.testing.assert_allclose(_numpy(layer(_x())), expected, atol=1e-5)
    np.testing.assert_allclose(_numpy(layer.merged_matrix()), pair, atol=1e-5)


def test_adapter_alone_by_option_and_for_a_moment():
    alone = _layer(inference="adapter")
    pair = alone.lora_a.numpy() @ alone.lora_b.numpy()
    expected = _x() @ pair + alone.layer.bias.numpy()
    np.testing.assert_allclose(_numpy(alone(_x())), expected, atol=1e-5)
    training = _numpy(alone(_x(), training=True))
    np.testing.assert_allclose(training, _numpy(alone.layer(_x())), atol=1e-5)
    model = keras.Sequential([keras.Input((5,)), _layer()])
    before = model.predict(_x(), verbose=0)
    with ks.adapters_alone(model):
        layer = model.layers[0]
        pair = layer.lora_a.numpy() @ layer.lora_b.numpy()
        got = model.predict(_x(), verbose=0)
        np.testing.assert_allclose(got, _x() @ pair, atol=1e-5)
    np.testing.assert_array_equal(model.predict(_x(), verbose=0), before)
    ks.unwrap_model(model)
    with pytest.raises(ValueError, match="no adapters"):
        with ks.adapters_alone(model):
            pass


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 6},
        {"alpha": 0},
        {"end_step": 0},
        {"start_step": 4},
        {"start_step": -1},
        {"end_step": 10.0},
        {"end_step": True},
        {"min_decay": -0.1},
        {"min_decay": 1.5},
        {"min_decay": 1.0},
        {"schedule": "step"},
        {"initializer": "kaiming"},
        {"residual": "none"},
        {"inference": "base"},
    ],
)
def test_bad_options(options):
    with pytest.raises(ValueError, match="Expected"):
        _layer(**options)
