import json

import block_cases
import keras
import numpy as np
import pytest

import keras_spectral as ks


def _model():
    model = block_cases.model()
    ks.wrap_model(model, "unipelt", lora=0, prefix=3, bottleneck=2)
    model.compile(keras.optimizers.Adam(0.05), "mse")
    inputs = block_cases.inputs()
    inputs = {k: np.concatenate([v] * 4) for k, v in inputs.items()}
    return model, inputs, np.ones((12, block_cases.TOKENS, block_cases.WIDTH))


@pytest.mark.parametrize("every", [None, 2])
def test_records_and_logs(every, tmp_path):
    model, x, y = _model()
    recorder = ks.callbacks.GateRecorder(tmp_path / "gates.json", every)
    history = model.fit(
        x,
        y,
        batch_size=3,
        epochs=2,
        verbose=0,
        validation_data=(x, y),
        callbacks=[recorder],
    ).history
    steps = [record["step"] for record in recorder.records]
    assert steps == ([2, 4, 6, 8] if every else [4, 8])
    last = recorder.records[-1]["gates"]
    assert list(last) == ["block_0", "block_1"]
    means = [parts["adapter"][0] for parts in last.values()]
    np.testing.assert_allclose(history["gate/adapter"][-1], np.mean(means))
    stored = json.loads((tmp_path / "gates.json").read_text())
    assert stored == recorder.records


def test_only_training_counts():
    records = []
    for validation in (None, "same"):
        keras.utils.set_random_seed(0)
        model, x, y = _model()
        recorder = ks.callbacks.GateRecorder()
        data = (x, y) if validation else None
        model.fit(
            x,
            y,
            batch_size=3,
            verbose=0,
            validation_data=data,
            callbacks=[recorder],
        )
        records.append(recorder.records[0]["gates"]["block_0"]["prefix"])
    np.testing.assert_allclose(*records, rtol=1e-5)


@pytest.mark.compiled
@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="Keras has it not on PyTorch"
)
def test_steps_in_one_execution_count():
    model, x, y = _model()
    model.compile("adam", "mse", steps_per_execution=4)
    recorder = ks.callbacks.GateRecorder()
    model.fit(x, y, batch_size=3, epochs=2, verbose=0, callbacks=[recorder])
    assert [record["step"] for record in recorder.records] == [4, 8]


def test_bad_uses_raise():
    with pytest.raises(ValueError, match="every=0"):
        ks.callbacks.GateRecorder(every=0)
    model = block_cases.model()
    model.compile("sgd", "mse")
    x = block_cases.inputs()
    y = np.ones((3, block_cases.TOKENS, block_cases.WIDTH))
    with pytest.raises(ValueError, match="no adapters"):
        model.fit(x, y, verbose=0, callbacks=[ks.callbacks.GateRecorder()])
