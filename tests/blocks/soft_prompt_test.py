import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places

WORDS, TOKENS, WIDTH, LENGTH = 20, 6, 8, 3


def _numpy(x):
    return ops.convert_to_numpy(x)


def _backbone():
    """Embeds, sums up what came before, and pools the first token."""
    layers = keras.layers
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="int32", name="padding_mask")
    segments = keras.Input((None,), dtype="int32", name="segment_ids")
    embedding = layers.Embedding(WORDS, WIDTH, mask_zero=True, name="tokens")
    kinds = layers.Embedding(2, WIDTH, name="kinds")
    x = embedding(ids) + kinds(segments)
    x = x * ops.cast(mask, "float32")[..., None]
    x = layers.Dense(WIDTH, "tanh", name="mix")(ops.cumsum(x, axis=1))
    outputs = {"sequence_output": x, "pooled_output": x[:, 0]}
    given = {"token_ids": ids, "padding_mask": mask, "segment_ids": segments}
    model = keras.Model(given, outputs, name="backbone")
    model.token_embedding = embedding
    return model


def _inputs():
    rng = np.random.default_rng(0)
    mask = np.ones((4, TOKENS), "int32")
    mask[1, 4:] = 0
    return {
        "token_ids": rng.integers(1, WORDS, mask.shape).astype("int32") * mask,
        "padding_mask": mask,
        "segment_ids": np.tile([0, 0, 0, 1, 1, 1], (4, 1)).astype("int32"),
    }


@keras.saving.register_keras_serializable("tests")
class Task(keras.Model):
    """A backbone with a head, as KerasHub has them."""

    def __init__(self, backbone=None, **kwargs):
        super().__init__(**kwargs)
        self.backbone = backbone or _backbone()
        self.head = keras.layers.Dense(2, name="head")

    def call(self, inputs, training=None):
        outputs = self.backbone(inputs, training=training)
        return self.head(outputs["sequence_output"])


def _task():
    keras.utils.set_random_seed(0)
    task = Task()
    return task, _numpy(task(_inputs()))


def _randomize(model):
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(0, 0.7, weight.shape))


@pytest.mark.parametrize("position", [0, 2, None])
@pytest.mark.parametrize("keep", [False, True])
def test_equals_its_formula(position, keep):
    keras.utils.set_random_seed(0)
    backbone, inputs = _backbone(), _inputs()
    if position is None:
        backbone.cls_token_index = 0
    layer = ks.SoftPrompt(backbone, LENGTH, position, keep)
    layer(inputs)
    _randomize(layer)
    start = 1 if position is None else position
    weights = {
        f"{w.path.split('/')[-2]}": np.float64(_numpy(w))
        for w in backbone.weights
        if "bias" not in w.name
    }
    tokens = weights["tokens"][inputs["token_ids"]]
    prompt = np.stack([np.float64(_numpy(layer.prompt))] * 4)
    x = np.concatenate([tokens[:, :start], prompt, tokens[:, start:]], axis=1)
    fill = np.ones((4, LENGTH), int)
    segments, mask = (
        np.concatenate([a[:, :start], b, a[:, start:]], axis=1)
        for a, b in (
            (inputs["segment_ids"], 0 * fill),
            (inputs["padding_mask"], fill),
        )
    )
    x = (x + weights["kinds"][segments]) * mask[..., None]
    x = np.tanh(np.cumsum(x, axis=1) @ weights["mix"])
    pooled = x[:, 0]
    if not keep:
        x = np.concatenate([x[:, :start], x[:, start + LENGTH :]], axis=1)
    got = layer(inputs)
    np.testing.assert_allclose(_numpy(got["sequence_output"]), x, atol=1e-5)
    np.testing.assert_allclose(_numpy(got["pooled_output"]), pooled, atol=1e-5)


def test_on_a_task_from_wrap_to_unwrap(tmp_path):
    task, plain = _task()
    task.compile("adam", "mse")
    task.predict(_inputs(), verbose=0)
    ks.wrap_model(task, "soft_prompt", length=LENGTH)
    (place,) = adapter_places(task)
    assert place.path == "backbone"
    shapes = sorted(tuple(w.shape) for w in task.trainable_weights)
    assert shapes == [(2,), (LENGTH, WIDTH), (WIDTH, 2)]
    frozen = [w.numpy() for w in place.layer.layer.weights]
    before = place.layer.prompt.numpy()
    task.fit(_inputs(), plain + 1, epochs=2, verbose=0)
    for weight, value in zip(place.layer.layer.weights, frozen):
        np.testing.assert_array_equal(weight.numpy(), value)
    assert np.abs(place.layer.prompt.numpy() - before).max() > 0
    adapted = task.predict(_inputs(), verbose=0)
    assert adapted.shape == plain.shape
    ks.save_adapters(task, tmp_path / "prompt.safetensors")
    with ks.adapters_disabled(task):
        off = task.predict(_inputs(), verbose=0)
    with ks.unwrapped(task):
        np.testing.assert_array_equal(task.predict(_inputs(), verbose=0), off)
    np.testing.assert_allclose(
        task.predict(_inputs(), verbose=0), adapted, atol=1e-6
    )
    with pytest.raises(ValueError, match="cannot be merged"):
        ks.merge_model(task)
    ks.unwrap_model(task)
    ks.load_adapters(task, tmp_path / "prompt.safetensors")
    np.testing.assert_allclose(
        task.predict(_inputs(), verbose=0), adapted, atol=1e-6
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_model_of_ids_alone_round_trips(keep, tmp_path):
    keras.utils.set_random_seed(0)
    ids = keras.Input((TOKENS,), dtype="int32")
    inner = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(WORDS, WIDTH),
            keras.layers.Conv1D(4, 3, padding="same"),
        ],
        name="backbone",
    )
    model = keras.Model(ids, ks.SoftPrompt(inner, LENGTH, keep=keep)(ids))
    _randomize(model)
    x = _inputs()["token_ids"]
    expected = _numpy(model(x))
    assert expected.shape == (4, TOKENS + keep * LENGTH, 4)
    assert model.output_shape == (None, *expected.shape[1:])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(_numpy(again(x)), expected, atol=1e-6)


def test_what_does_not_fit_is_refused():
    keras.utils.set_random_seed(0)
    with pytest.raises(ValueError, match="length=0"):
        ks.SoftPrompt(_backbone(), length=0)
    with pytest.raises(ValueError, match="position=-1"):
        ks.SoftPrompt(_backbone(), position=-1)
    with pytest.raises(ValueError, match="whole backbone"):
        ks.SoftPrompt(keras.layers.Dense(2))
    with pytest.raises(ValueError, match="has 0 embeddings"):
        ks.SoftPrompt(keras.Sequential([keras.layers.Dense(2)]))
    task, _ = _task()
    task.call_with_cache = None
    pixels = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])
    with pytest.raises(ValueError, match="inputs of shapes"):
        ks.SoftPrompt(pixels)
    with pytest.raises(ValueError, match="generates text"):
        ks.wrap_model(task, "soft_prompt")
    assert not adapter_places(task)


def test_a_mixed_batch_is_one_pass_where_each_has_a_prompt():
    model, _ = _task()
    alone = {}
    for name, length in (("a", 2), ("b", 2), ("c", 3)):
        ks.wrap_model(
            model, "soft_prompt", length=length, adapter=name, seed=length
        )
        rng = np.random.default_rng(len(alone))
        for weight in model.trainable_weights:
            weight.assign(rng.normal(size=weight.shape))
        alone[name] = _numpy(model(_inputs()))
    runs = []
    embedding = model.backbone.token_embedding
    original = embedding.call
    embedding.call = lambda *args, **kwargs: (
        runs.append(1) or original(*args, **kwargs)
    )
    for names, passes in (("abba", 1), ("acca", 3), (["a", None] * 2, 2)):
        runs.clear()
        with ks.mixed_batch(model, list(names)):
            got = _numpy(model(_inputs()))
        assert len(runs) == passes, names
        for i, name in enumerate(names):
            if name:
                np.testing.assert_allclose(got[i], alone[name][i], atol=1e-6)
    with ks.mixed_batch(model, list("abba")):
        with pytest.raises(ValueError, match="4 names"):
            model({k: x[:3] for k, x in _inputs().items()})
