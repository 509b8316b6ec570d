import keras
import numpy as np
import pytest

import keras_spectral as ks


def _fit(method, epochs=2, lr=0.05, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="one"),
            keras.layers.Dense(3, name="two"),
        ]
    )
    ks.wrap_model(model, method, target=["one", "two"], **options)
    model.compile(keras.optimizers.Adam(lr), "mse")
    rng = np.random.default_rng(0)
    history = model.fit(
        rng.normal(size=(64, 6)),
        rng.normal(size=(64, 3)),
        epochs=epochs,
        batch_size=8,
        verbose=0,
        callbacks=[ks.callbacks.GateMonitor()],
    )
    return model, history.history


def test_fixed_gates_are_counted_each_epoch():
    model, logs = _fit("gated_spectral", directions=3)
    for path in ("one", "two"):
        count = model.get_layer(path).active_gates()
        assert logs[f"active_gates/{path}"][-1] == count
    both = zip(logs["active_gates/one"], logs["active_gates/two"])
    assert logs["active_gates"] == [sum(pair) for pair in both]
    assert logs["active_gates"][-1] > 0


def test_conditional_gates_are_means_of_their_own_epoch():
    model, logs = _fit("conditional_spectral", lr=1e-3, rank=3, l0=0.0)
    assert all(0 < value < 3 for value in logs["active_gates/one"])
    seen = float(model.get_layer("one").example_count)
    assert seen == 64  # the last epoch's


def test_strong_l0_closes_the_gates():
    _, logs = _fit("conditional_spectral", epochs=10, rank=3, l0=1.0)
    assert logs["active_gates"][-1] < 0.5 * logs["active_gates"][0]


def test_a_model_without_gates_is_refused():
    with pytest.raises(ValueError, match="'gated_spectral' or 'conditional"):
        _fit("lora", rank=2)
