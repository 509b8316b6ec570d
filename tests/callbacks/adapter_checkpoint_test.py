import keras
import numpy as np
import pytest
import safetensors.numpy

import keras_spectral as ks


def _model(optimizer="sgd"):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="relu", name="hidden"),
            keras.layers.Dense(2, name="head"),
        ]
    )
    ks.wrap_model(model, "lora", target="hidden", rank=2, trainable="head")
    model.compile(optimizer, "mse")
    return model


class _Script(keras.callbacks.Callback):
    """Says what the losses are, and keeps the weights of each epoch."""

    def __init__(self, losses, name="val_loss"):
        super().__init__()
        self.losses, self.name, self.seen = losses, name, []

    def on_epoch_end(self, epoch, logs=None):
        logs[self.name] = self.losses[epoch]
        layer = self.model.get_layer("hidden")
        self.seen.append(keras.ops.convert_to_numpy(layer.lora_a).copy())


def _fit(model, losses, *callbacks, name="val_loss"):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6)), rng.normal(size=(8, 2))
    script = _Script(losses, name)
    given = [script, *callbacks]
    model.fit(x, y, epochs=len(losses), verbose=0, callbacks=given)
    return script.seen


def _saved(path):
    return safetensors.numpy.load_file(path)["hidden/default/lora/lora_a"]


@pytest.mark.parametrize(
    ("options", "losses", "name", "best"),
    [
        ({}, [3.0, 1.0, 2.0], "val_loss", 1),
        ({"mode": "max"}, [3.0, 1.0, 4.0, 2.0], "val_loss", 2),
        ({"save_best_only": False}, [3.0, 1.0, 2.0], "val_loss", 2),
        ({"monitor": "score", "mode": "max"}, [1.0, 2.0, 1.5], "score", 1),
        ({"initial_value_threshold": 2.5}, [3.0, 2.0, 2.2], "val_loss", 1),
    ],
)
def test_keeps_the_best_epoch(tmp_path, options, losses, name, best):
    path = tmp_path / "best.safetensors"
    checkpoint = ks.callbacks.AdapterCheckpoint(path, **options)
    model = _model()
    seen = _fit(model, losses, checkpoint, name=name)
    np.testing.assert_array_equal(_saved(path), seen[best])
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]
    ks.load_adapters(model, path)
    layer = model.get_layer("hidden")
    np.testing.assert_array_equal(layer.lora_a.numpy(), seen[best])


def test_restores_the_best(tmp_path):
    path = tmp_path / "best.safetensors"
    checkpoint = ks.callbacks.AdapterCheckpoint(path, restore_best=True)
    model = _model()
    seen = _fit(model, [2.0, 1.0, 3.0, 4.0], checkpoint)
    layer = model.get_layer("hidden")
    np.testing.assert_array_equal(layer.lora_a.numpy(), seen[1])


def test_nothing_is_better_than_the_threshold(tmp_path):
    path = tmp_path / "best.safetensors"
    checkpoint = ks.callbacks.AdapterCheckpoint(
        path, initial_value_threshold=0.5, restore_best=True
    )
    _fit(_model(), [2.0, 1.0], checkpoint)
    assert not path.exists() and checkpoint.saved is None


def test_names_by_epoch_and_logs(tmp_path):
    path = str(tmp_path / "{epoch:02d}-{val_loss:.2f}.safetensors")
    checkpoint = ks.callbacks.AdapterCheckpoint(path)
    _fit(_model(), [2.0, 3.0, 1.0], checkpoint)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["01-2.00.safetensors", "03-1.00.safetensors"]


def test_says_what_it_saves(tmp_path, capsys):
    path = tmp_path / "best.safetensors"
    checkpoint = ks.callbacks.AdapterCheckpoint(path, verbose=1)
    _fit(_model(), [2.0], checkpoint)
    assert f"saving model to {path}" in capsys.readouterr().out


def test_an_unknown_monitor_warns_and_saves(tmp_path):
    path = tmp_path / "best.safetensors"
    checkpoint = ks.callbacks.AdapterCheckpoint(path, "val_score", mode="max")
    with pytest.warns(UserWarning, match="val_score available"):
        _fit(_model(), [1.0], checkpoint)
    assert path.exists()


def test_means_of_ivon_are_saved(tmp_path):
    path = tmp_path / "best.safetensors"
    model = _model(ks.optimizers.IVON(0.1, ess=10, seed=0))
    _fit(
        model,
        [1.0],
        ks.callbacks.MeanWeights(),
        ks.callbacks.AdapterCheckpoint(path),
    )
    variable = model.get_layer("hidden").lora_a
    mean, _ = model.optimizer.posterior(variable)
    np.testing.assert_allclose(_saved(path), mean, rtol=1e-6)


def test_a_bad_path_fails_before_the_training(tmp_path):
    for path, error in (
        (tmp_path / "no" / "x.safetensors", FileNotFoundError),
        (tmp_path, IsADirectoryError),
    ):
        checkpoint = ks.callbacks.AdapterCheckpoint(path)
        with pytest.raises(error, match="Cannot write"):
            _fit(_model(), [], checkpoint)
    plain = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    plain.compile("sgd", "mse")
    checkpoint = ks.callbacks.AdapterCheckpoint(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no adapters"):
        _fit(plain, [], checkpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"path": None},
        {"path": "{"},
        {"path": "{}.safetensors"},
        {"monitor": 3},
        {"mode": "best"},
        {"save_best_only": "yes"},
        {"restore_best": 1},
        {"verbose": None},
        {"initial_value_threshold": float("nan")},
    ],
)
def test_bad_arguments(options):
    with pytest.raises(ValueError, match="Received"):
        ks.callbacks.AdapterCheckpoint(**{"path": "x", **options})
