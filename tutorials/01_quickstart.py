# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: teach a model a new domain with 5 % of its weights
#
# A small vision model reads handwritten digits. Then the scanner is replaced:
# the images arrive rotated and with inverted contrast, and the model fails.
# We mend it with **LoRA** and **ConvLoRA**, compare them with training
# everything and with training only the head, and go once through the life of
# an adapter: wrap, train, switch off, save, load, merge, unwrap.
#
# It takes about a minute on a laptop. The same code runs on JAX, TensorFlow
# and PyTorch: change `"jax"` below, or set `KERAS_BACKEND` beforehand.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On steps this small PyTorch's threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pathlib
import tempfile
import time
import warnings

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
import scipy.ndimage
import sklearn.datasets
import sklearn.model_selection

import keras_spectral as ks

# KerasHub feeds batches in the order of the data, which is shuffled below.
warnings.filterwarnings("ignore", message="`shuffle=True` was passed")

FAST = os.environ.get("FAST", "0") == "1"
OUT = pathlib.Path(os.environ.get("KERAS_SPECTRAL_OUT", "out"))
OUT.mkdir(parents=True, exist_ok=True)
console = rich.console.Console(width=96)
keras.utils.set_random_seed(7)
print("backend:", keras.backend.backend())

# %% [markdown]
# ## Two domains
#
# scikit-learn carries 1,797 real digits of 8 x 8 pixels. The second domain
# shows the same digits turned by 30 degrees, bright where they were dark. Of
# it we have only 600 labelled images to train on.

# %%
digits = sklearn.datasets.load_digits()
images = (digits.images / 16).astype("float32")  # (1797, 8, 8)
images = np.repeat(images[..., None], 3, axis=-1)  # (1797, 8, 8, 3)
clean, clean_test, labels, test_labels = (
    sklearn.model_selection.train_test_split(
        images,
        digits.target,
        test_size=497,
        stratify=digits.target,
        random_state=7,
    )
)  # (1300, 8, 8, 3), (497, 8, 8, 3), (1300,), (497,)


def shift(x):
    turned = scipy.ndimage.rotate(x, 30, axes=(1, 2), reshape=False, order=1)
    return 1 - turned  # the shape of x


shifted = shift(clean)[:600]  # (600, 8, 8, 3)
shifted_labels = labels[:600]  # (600,)
shifted_test = shift(clean_test)  # (497, 8, 8, 3)

# %% [markdown]
# ## A base model
#
# KerasHub's `ViTDetBackbone`, the image encoder of Segment Anything, made
# tiny. It has both kinds of layers that we want to adapt: **Dense** layers in
# its two transformer blocks, and **convolutions** that cut the image into
# patches and, at the end, blend the patches. We train it on clean digits.


# %%
def new_model():
    backbone = keras_hub.models.ViTDetBackbone(
        image_shape=(8, 8, 3),
        patch_size=2,  # 4 x 4 patches
        num_layers=2,
        num_heads=4,
        hidden_size=64,
        intermediate_dim=128,
        num_output_channels=64,
        global_attention_layer_indices=[0, 1],
        use_rel_pos=False,
        name="encoder",
    )  # (batch, 8, 8, 3) -> (batch, 4, 4, 64)
    return keras_hub.models.ImageClassifier(backbone, num_classes=10)


def train(model, x, y, learning_rate, epochs):
    """Returns the loss of each epoch and the median milliseconds a step."""
    clock = []
    tick = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: clock.append(time.perf_counter())
    )
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        x, y, batch_size=50, epochs=epochs, verbose=0, callbacks=[tick]
    )
    # The first epoch compiles, so the clock starts where it ends.
    seconds = np.median(np.diff(clock)) / (len(x) // 50)
    return history.history["loss"], 1e3 * seconds


def logits(model, x):
    return model.predict(x, batch_size=len(x), verbose=0)  # (len(x), 10)


def accuracy(scores):
    return float(np.mean(scores.argmax(axis=-1) == test_labels))


def count(weights):
    return sum(int(np.prod(weight.shape)) for weight in weights)


model = new_model()
train(model, clean, labels, learning_rate=2e-3, epochs=8 if FAST else 14)
base_weights = model.get_weights()
base_total = count(model.weights)
base_logits = logits(model, shifted_test)  # (497, 10)
clean_accuracy = accuracy(logits(model, clean_test))
before = accuracy(base_logits)
print(f"{base_total:,} weights")
print(f"clean digits:   {clean_accuracy:6.1%} right")
print(f"shifted digits: {before:6.1%} right")
assert clean_accuracy > 0.85
assert before < clean_accuracy / 2

# %% [markdown]
# ## LoRA in five lines
#
# A linear layer multiplies its input by a matrix `K` of `n_in x n_out`
# numbers. LoRA freezes `K` and learns a correction of low rank beside it:
#
# $$y = \mathrm{base}(x) + \frac{\alpha}{r}\, x A B$$
#
# `A` is `n_in x r`, `B` is `r x n_out`, and the rank `r` is small. That makes
# `r (n_in + n_out)` numbers to train instead of `n_in * n_out`: for the
# 64 x 192 query-key-value layer and `r = 4`, 1,024 instead of 12,288. `B`
# starts at zero, so training starts exactly from the base model. Afterwards
# `K + (alpha/r) A B` is again one matrix: the adapted model costs no more to
# run than the base.
#
# `wrap_model` puts such a pair on every layer that `target` names, in place.
# `"all-linear"` means every Dense layer but the head. A task model's head
# would train along by default; our ten classes are still the same ten, so
# `trainable=()` leaves it frozen, and the adapters are all that trains.

# %%
ks.wrap_model(model, "lora", target="all-linear", rank=4, trainable=(), seed=7)
summary = ks.adapter_summary(model, console)

# One block: query-key-value, attention output, and the two MLP layers.
block = (64 + 192) + (64 + 64) + (64 + 128) + (128 + 64)
assert summary.trainable == 2 * 4 * block == 6144
assert np.array_equal(logits(model, shifted_test), base_logits)

# %% [markdown]
# In this table *trainable* counts `A` and `B`; *frozen* is the layer's own
# kernel and bias, and one number for the scale `alpha/r` (`alpha` defaults to
# `rank`, which makes it 1). Now plain Keras: compile and fit.

# %%
EPOCHS = 10 if FAST else 20
losses, lora_ms = train(model, shifted, shifted_labels, 1e-2, EPOCHS)
lora_logits = logits(model, shifted_test)  # (497, 10)
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
print(f"shifted digits: {before:.1%} -> {accuracy(lora_logits):.1%} right")
assert losses[-1] < losses[0] / 2

# %% [markdown]
# ## The life of an adapter
#
# **Switch off.** The base was never touched. Inside `adapters_disabled` the
# model gives the base's answers; after it, the adapted ones again.

# %%
with ks.adapters_disabled(model):
    assert np.array_equal(logits(model, shifted_test), base_logits)
assert np.array_equal(logits(model, shifted_test), lora_logits)

# %% [markdown]
# **Save and load.** The file holds the adapters and nothing of the base.
# `load_adapters` takes a fresh copy of the base, wraps the same layers and
# fills them.

# %%
copy = new_model()
copy.set_weights(base_weights)
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "digits.safetensors"
    ks.save_adapters(model, file)
    ks.load_adapters(copy, file)
    print(f"adapter file: {file.stat().st_size / 1024:.0f} KiB")
print(f"base weights: {4 * base_total / 1024:.0f} KiB")
assert np.allclose(logits(copy, shifted_test), lora_logits, atol=1e-5)

# %% [markdown]
# **Merge.** `merge_model` adds every `A B` to its kernel. What is left is a
# plain Keras model, with as many weights as the base, to export or serve.

# %%
ks.merge_model(copy)
merge_error = np.abs(logits(copy, shifted_test) - lora_logits).max()
print(f"largest difference of a logit: {merge_error:.1e}")
assert merge_error < 1e-4
assert count(copy.weights) == base_total

results = [  # method, trained weights, accuracy, milliseconds, merge error
    ("LoRA", 6144, accuracy(lora_logits), lora_ms, merge_error)
]

# %% [markdown]
# **Unwrap.** Or drop the adapters, and the base is back to the last bit.

# %%
ks.unwrap_model(model)
for weight, original in zip(model.get_weights(), base_weights, strict=True):
    assert np.array_equal(weight, original)
assert np.array_equal(logits(model, shifted_test), base_logits)

# %% [markdown]
# ## ConvLoRA, and what it competes with
#
# A convolution is a linear layer on patches of `k x k` pixels, and there are
# two ways to give it a low rank:
#
# - `"channel"`: a `k x k` convolution to `r` channels, then a 1 x 1. That is
#   `r (k*k*c_in + c_out)` weights, and a thin path to compute.
# - `"loralib"`, Microsoft's original: `A` is `r k x c_in k`, `B` is
#   `c_out k x r k`, and their product is reshaped into a kernel. That is
#   `r k*k (c_in + c_out)` weights. Here the rank cannot exceed the channels,
#   and an RGB image has three; `overrides` gives the patch layer rank 1.
#
# The convolutions here are 2 x 2 (3 to 64 channels), 1 x 1 and 3 x 3 (both
# 64 to 64). Each run starts from the same base weights. Two rivals need no
# library: training every weight, and training the head alone.

# %%
conv = {"method": "conv_lora", "target": "conv", "rank": 4, "seed": 7}
loralib = {"factorization": "loralib", "overrides": {".*patch.*": {"rank": 1}}}
runs = {  # name: (options for wrap_model, learning rate)
    "ConvLoRA channel": (conv, 1e-2),
    "ConvLoRA loralib": (conv | loralib, 1e-2),
    "head only": (None, 3e-2),
    "full fine-tuning": (None, 2e-3),
}
for name, (options, learning_rate) in runs.items():
    model = new_model()
    model.set_weights(base_weights)
    model.backbone.trainable = name != "head only"
    if options:
        ks.wrap_model(model, trainable=(), **options)
    trained = count(model.trainable_weights)
    losses, ms = train(model, shifted, shifted_labels, learning_rate, EPOCHS)
    assert losses[-1] < losses[0] / 2
    adapted = logits(model, shifted_test)  # (497, 10)
    error = None
    if options:
        ks.merge_model(model)
        error = np.abs(logits(model, shifted_test) - adapted).max()
    results.append((name, trained, accuracy(adapted), ms, error))

# %% [markdown]
# ## What it bought

# %%
results.sort(key=lambda result: result[1])
table = rich.table.Table(
    title=f"Shifted digits, {EPOCHS} epochs on {keras.backend.backend()}"
)
table.add_column("method")
for heading in (
    "trainable\nweights",
    "share of\nthe base",
    "accuracy\nbefore",
    "accuracy\nafter",
    "median\nms a step",
    "largest\nmerge error",
):
    table.add_column(heading, justify="right")
for name, trained, after, ms, error in results:
    table.add_row(
        name,
        f"{trained:,}",
        f"{trained / base_total:.1%}",
        f"{before:.1%}",
        f"{after:.1%}",
        f"{ms:.1f}",
        "-" if error is None else f"{error:.1e}",
        style="bold" if "LoRA" in name else None,
    )
console.print(table)

# The claims of this page.
trained = {result[0]: result[1] for result in results}
after = {result[0]: result[2] for result in results}
patch, narrow, wide = (2 * 2 * 3 + 64), (64 + 64), (3 * 3 * 64 + 64)
assert trained["ConvLoRA channel"] == 4 * (patch + narrow + wide) == 3376
patch, narrow, wide = 4 * (3 + 64), (64 + 64), 9 * (64 + 64)
assert trained["ConvLoRA loralib"] == patch + 4 * (narrow + wide) == 5388
assert trained["head only"] == 64 * 10 + 10
assert trained["full fine-tuning"] == base_total
lost = clean_accuracy - before
for name, _, _, _, error in results:
    if "LoRA" in name:
        assert error < 1e-4
        assert after[name] - before > (0.6 if FAST else 0.8) * lost
        assert after[name] > after["head only"]

# %% [markdown]
# The head alone cannot mend it: the features themselves are wrong for the new
# images. The adapters win back most of what was lost with about a twentieth
# of the weights, a few points from full fine-tuning (with 497 test images, a
# point or two is chance). The merge errors are float32 rounding: the same sum
# in another order.
#
# On a model this tiny the steps are too short to compare speed. What shrinks
# for sure is the file for each task, and the optimizer's memory: Adam keeps
# two numbers for every trainable weight.

# %%
BLUE, RED, GREY = "#2563eb", "#dc2626", "#6b7280"
figure = plt.figure(figsize=(11, 3.9), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])

left.suptitle("The same digits in two domains", fontsize=12)
shown = [int(np.flatnonzero(test_labels == digit)[0]) for digit in range(5)]
axes = left.subplots(2, 5)
for column, index in enumerate(shown):
    axes[0, column].imshow(clean_test[index])
    axes[1, column].imshow(shifted_test[index].clip(0, 1))
    old, new = base_logits[index].argmax(), lora_logits[index].argmax()
    axes[0, column].set_title(f"a {test_labels[index]}", fontsize=10)
    axes[1, column].set_title(
        f"base: {old}", fontsize=10, color=GREY if old == column else RED
    )
    axes[1, column].set_xlabel(
        f"LoRA: {new}", fontsize=10, color=BLUE if new == column else RED
    )
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("clean")
axes[1, 0].set_ylabel("shifted")

axis = right.subplots()
for level, text in (
    (clean_accuracy, "base on clean digits"),
    (before, "base on shifted digits"),
):
    axis.axhline(100 * level, color=GREY, linestyle="--", linewidth=1)
    axis.text(280, 100 * level + 1.5, text, color=GREY, fontsize=9)
line = {"arrowstyle": "-", "linewidth": 0.8, "relpos": (0, 0.5)}
places = {  # where each name stands
    "LoRA": (10_000, 76),
    "ConvLoRA loralib": (10_000, 68),
    "ConvLoRA channel": (10_000, 60),
}
for name, weights, right_answers, _, _ in results:
    point = (weights, 100 * right_answers)
    color = BLUE if "LoRA" in name else GREY
    axis.scatter(*point, s=60, color=color, zorder=3)
    axis.annotate(
        f"{name}, {point[1]:.0f} %",
        point,
        places.get(name, (weights, point[1] - 8)),
        arrowprops=line | {"color": color} if name in places else None,
        ha="left" if name in places else "center",
        va="center",
        fontsize=9,
        color=color,
    )
axis.set(
    title="Accuracy on shifted digits",
    xlabel="trainable weights",
    ylabel="right answers in %",
    xscale="log",
    xlim=(250, 400_000),
    ylim=(0, 108),
)
axis.spines[["top", "right"]].set_visible(False)
figure.savefig(OUT / "01_quickstart.png", dpi=150)
