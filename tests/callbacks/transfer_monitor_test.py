import keras
import numpy as np
import pytest

import keras_spectral as ks


def _fit(monitor, epochs=3, validation=None, method="decaying_lora", **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "relu", name="hidden"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    ks.wrap_model(model, method, target="hidden", rank=2, **options)
    model.compile("adam", "mse", metrics=["mae"])
    rng = np.random.default_rng(0)
    data = rng.normal(size=(32, 6)), rng.normal(size=(32, 3))
    if monitor is None:
        monitor = ks.callbacks.TransferMonitor(data)
    history = model.fit(
        *data,
        batch_size=8,
        epochs=epochs,
        verbose=0,
        validation_data=data if validation else None,
        callbacks=[monitor],
    )
    return model, data, history.history


@pytest.mark.parametrize("validation", [True, False])
def test_both_are_evaluated_and_meet_at_the_end(validation):
    model, data, logs = _fit(None, validation=validation, end_step=8)
    assert logs["decay"] == [0.5, 0.0, 0.0]
    assert logs["val_loss"][0] != logs["val_adapter_loss"][0]
    for name in ("loss", "mae"):
        np.testing.assert_allclose(
            logs[f"val_{name}"][1:], logs[f"val_adapter_{name}"][1:], rtol=1e-5
        )
    loss, mae = model.evaluate(*data, verbose=0)
    assert logs["val_adapter_mae"][-1] == pytest.approx(mae, rel=1e-5)
    figure = ks.plots.plot_transfer(logs, "mae")
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [3] * 3


def test_without_data_only_the_factor_is_logged():
    _, _, logs = _fit(ks.callbacks.TransferMonitor(), end_step=8)
    assert sorted(logs) == ["decay", "loss", "mae"]
    with pytest.raises(ValueError, match="lacks.*val_adapter_accuracy"):
        ks.plots.plot_transfer(logs)


def test_a_decay_that_never_moves_warns():
    with pytest.warns(UserWarning, match="start_step=1000"):
        _fit(None, start_step=1000, end_step=2000)


def test_a_model_without_decaying_adapters_is_refused():
    with pytest.raises(ValueError, match="'decaying_lora'"):
        _fit(None, method="lora")
