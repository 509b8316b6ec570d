# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Compression: keep the directions that matter
#
# We take half of the weights out of the linear layers of MiniLM, in seconds
# and without any training, and nine in ten of its judgements on films stay
# what they were. What is hard: to know which half, and that a model with fewer
# weights is neither always faster nor half as large a file.

# %% [markdown]
# What you see: a photo of 427 x 640 pixels as a sum of 60, 20 and 5 products
# of a column and a row, the best ones there are. Rank 60 needs less than a
# quarter of the numbers and shows little more than some grain in the sky. A
# kernel is such a matrix too. Can we cut it as deep?
#
# **You will learn**
#
# - what cutting a kernel's rank loses, and why it helps to look at data;
# - to compress a whole model with `compress_model`, with and without
#   `calibration=`;
# - to measure what it is for: accuracy against milliseconds and megabytes.
#
# You need MiniLM, the rated sentences and about five minutes on two CPU
# cores, a good part of them to train the model that is then compressed.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pathlib
import tempfile
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import sklearn.datasets

import keras_spectral as ks
from keras_spectral import course

course.quiet()
print("backend:", keras.backend.backend())

# %% [markdown]
# All outputs below are of the backend that is printed here, and of one seed.
#
# ## A photo of low rank
#
# The singular value decomposition writes any matrix as $U \Sigma V^T$.
# Without all but the $r$ largest singular values it is the best approximation
# of rank $r$ (Eckart and Young), and takes $r\,(n_{in} + n_{out})$ numbers in
# the place of $n_{in} n_{out}$.

# %%
photo = sklearn.datasets.load_sample_image("china.jpg").mean(-1)  # (427, 640)
u, s, v = np.linalg.svd(photo, full_matrices=False)


def photo_at(rank):
    return (u[:, :rank] * s[:rank]) @ v[:rank]


for rank in (60, 20, 5):
    share = rank * sum(photo.shape) / photo.size
    lost = np.linalg.norm(photo - photo_at(rank)) / np.linalg.norm(photo)
    print(f"rank {rank:2}: {share:5.1%} of the numbers, error {lost:.1%}")


# %% tags=["plot"]
def draw_photo():
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axis, rank in zip(axes.flat, (None, 60, 20, 5)):
        image = photo_at(rank) if rank else photo
        axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        title = "the photo, rank 427, 100 % of the numbers"
        if rank:
            share = rank * sum(photo.shape) / photo.size
            title = f"rank {rank}, {share:.0%} of the numbers"
        axis.set_title(title, fontsize=12)
        axis.axis("off")
    course.show(figure, "04_photo")


# %% tags=["picture"] alt="A photo of a Chinese pavilion four times: whole; at rank 60 with 23 % of its numbers, with all details and some grain in the sky; at rank 20 with 8 %, blurred by vertical and horizontal streaks, still a pavilion; at rank 5 with 2 %, only blocks of light and dark."
draw_photo()

# %% [markdown]
# ## A model worth compressing
#
# MiniLM is a BERT of six blocks. We train all of it for two epochs to tell
# whether a sentence on a film is positive.

# %%
LENGTH = 32  # tokens
TRAIN, TEST = (64, 32) if course.FAST else (900, 300)
data = course.sentences("films", TRAIN, TEST)
encoder = course.minilm(LENGTH)
model = encoder.build()
x, test_x = encoder.encode(data.x), encoder.encode(data.test_x)
# The rate falls over the steps of two epochs in batches of 16.
rate = keras.optimizers.schedules.CosineDecay(1.5e-4, TRAIN // 8)
course.train(model, x, data.y, rate, epochs=2, batch_size=16)
model.compile()  # without the optimizer's state, which copies do not need


def answers(candidate):
    return candidate.predict(test_x, batch_size=TEST, verbose=0).argmax(-1)


whole = answers(model)  # (300,)
right = np.mean(whole == data.test_y)
error = np.sqrt(right * (1 - right) / TEST)
print(f"{model.count_params():,} weights, {right:.1%} right")
print(f"one standard error: {error:.1%}, chance: 50 %")

# %% [markdown]
# ## A kernel is no photo, but its inputs help
#
# Guess before you look: is a trained kernel more like the photo, or more like
# random numbers? `calibrate` runs typical sentences through the model and
# keeps, for each layer, the second moments of its inputs $X$. From them we
# know what a smaller rank does to the layer's *outputs* $XK$.

# %%
calibration = ks.calibrate(model, {k: v[:256] for k, v in x.items()})
path = next(p for p in calibration if "layer_5/feedforward_inter" in p)
block = model.backbone.get_layer("transformer_layer_5")
kernel = block._feedforward_intermediate_dense.kernel
kernel = keras.ops.convert_to_numpy(kernel)  # (384, 1536)
moments = calibration[path]
centred = moments.matrix() - np.outer(moments.mean, moments.mean)
squares = {
    "the kernel": np.linalg.svd(kernel, compute_uv=False) ** 2,
    "its outputs": np.linalg.eigvalsh(kernel.T @ centred @ kernel)[:-385:-1],
}
for name, values in squares.items():  # (384,)
    lost = np.sqrt(values[96:].sum() / values.sum())
    print(f"{name}, rank 96 of 384: error {lost:.0%}")

# %% tags=["plot"] alt="Relative error over the share of ranks that is kept. Random numbers fall slowest, the trained kernel somewhat faster, the outputs of the kernel on real sentences much faster, the photo fastest."
noise = np.random.default_rng(7).normal(size=kernel.shape)
noise = np.linalg.svd(noise, compute_uv=False)


def errors_of(values):  # at rank 0, 1, 2, ...
    rest = np.append(np.cumsum(values[::-1])[::-1], 0)
    return np.sqrt(np.maximum(rest, 0) / rest[0])


curves = {"random numbers": errors_of(noise**2)}
curves |= {name: errors_of(values) for name, values in squares.items()}
curves["the photo"] = errors_of(s**2)
figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
colors = ("#9ca3af", "#dc2626", "#2563eb", "k")
for (name, curve), color in zip(curves.items(), colors):
    places = 100 * np.linspace(0, 1, len(curve))
    axis.plot(places, 100 * curve, c=color, lw=2, label=name)
axis.set(xlabel="ranks kept, in %", ylabel="relative error in %")
axis.set(xlim=(0, 100), ylim=(0, 102))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "04_spectra")

# %% [markdown]
# As a matrix the kernel is more like random numbers than like the photo. But
# sentences do not use all directions alike, and what counts is the output:
# there the same rank loses far less, if we choose the directions by
# $\lVert XK - XK_r \rVert$ and not by $\lVert K - K_r \rVert$. That is what
# `calibration=` does.
#
# ## Compress the model
#
# `compress_model` returns a new model, in which each kernel is a product of
# two thin ones, and leaves yours as it is. We take the same share from every
# layer of the six blocks (`method="uniform"`), by the kernels alone and with
# the calibration.

# %%
RATIOS = (0.5,) if course.FAST else (0.1, 0.3, 0.5, 0.7)
EXCLUDE = ["logits", ".*pooled_dense"] + course.FAST * [".*layer_[0-4]/.*"]
small = {}
for ratio in RATIOS:
    for name, given in (("kernels", None), ("outputs", calibration)):
        small[name, ratio] = ks.compress_model(
            model,
            ratio,
            method="uniform",
            exclude=EXCLUDE,
            calibration=given,
        )
found = {key: answers(candidate) for key, candidate in small.items()}

# %%
rows = []
for (way, ratio), got in found.items():
    weights = f"{small[way, ratio].count_params():,}"
    shares = [np.mean(got == other) for other in (data.test_y, whole)]
    rows.append((way, f"{ratio:.0%}", weights, *(f"{a:.1%}" for a in shares)))
course.table(
    f"The whole model: {right:.1%} right, standard error {error:.1%}",
    ("cut by", "removed", "weights", "right", "as before"),
    sorted(rows),
)

# %% [markdown]
# *As before* is the share of sentences that are judged as the whole model
# judges them. By the kernels alone, accuracy falls with every share that is
# removed. With 256 sentences to look at, which need no labels, the model bears
# a lot more. Accuracies within two standard errors of the whole model's are
# ties; that answers change all the same is what *as before* shows.
#
# ## Is it faster?
#
# A pair of thin products has fewer operations, but a processor likes one
# large product better than two thin ones. So we measure: the processor's own
# clock (`process_time`, which other programs disturb less), the models in
# turn, the median of several rounds.
#
# `measure="latency"` asks for time instead of weights. It times every shape
# of kernel on this machine, whole and as a pair, and leaves whole what gets
# no faster. It looks at the clock on the wall, so give it a quiet machine.
# `method="energy"` keeps the same share of every layer's squared singular
# values, whatever rank that takes.

# %%
options = {"exclude": EXCLUDE, "calibration": calibration}
timed = ks.compress_model(
    model, 0.3, method="energy", measure="latency", unknown_size=32, **options
)
quiet = rich.console.Console(quiet=True)
report = ks.compression_report(timed, quiet)
block = [each for each in report.layers if "layer_5/" in each.path]
course.table(
    "The last block, where 30 % of all layers' time was to be saved",
    ("layer", "kernel", "rank", "weights", "ms whole", "ms now"),
    [
        (
            layer.path.split("/")[-1],
            "{} x {}".format(*layer.shape),
            str(layer.rank or "whole"),
            f"{layer.weights[1] / layer.weights[0]:.0%}",
            *(f"{each:.1f}" for each in layer.milliseconds),
        )
        for layer in block
    ],
)

# %%
part = {key: values[:32] for key, values in test_x.items()}
candidates = {"whole": model, "timed": timed}
candidates |= {ratio: small["outputs", ratio] for ratio in RATIOS}
times = {name: [] for name in candidates}
for _ in range(3 if course.FAST else 9):
    for name, candidate in candidates.items():
        begin = time.process_time()
        candidate.predict_on_batch(part)
        times[name].append(1e3 * (time.process_time() - begin))
# The first round compiles.
ms = {name: float(np.median(each[1:])) for name, each in times.items()}
found["timed"] = answers(timed)
for name, each in ms.items():
    print(f"{name!s:6} {each:5.0f} ms, {ms['whole'] / each:.2f} times as fast")

# %% tags=["plot"] alt="Accuracy over measured milliseconds for 32 sentences. A dashed vertical line is the time of the whole model, and the area to its right, of slower models, is red: without 10 % of the weights the models are in it. Cut by outputs, accuracy stays within one standard error of the whole model down to 30 % of the weights, while time falls by more than a third. Cut by kernels it falls steadily, by more than ten points. A star, asked for milliseconds, is as fast as half of the weights and between both in accuracy."
RED, BLUE, GREY = "#dc2626", "#2563eb", "#6b7280"
figure, axis = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
ways = {"outputs": (BLUE, "o"), "kernels": (GREY, "s")}
for way, (color, marker) in ways.items():
    xs = [ms[ratio] for ratio in RATIOS]
    ys = [100 * np.mean(found[way, ratio] == data.test_y) for ratio in RATIOS]
    line = {"c": color, "marker": marker, "ms": 7, "lw": 1.5, "zorder": 1}
    axis.plot(xs, ys, label=f"by {way}", **line)
    slower = [(a, b) for a, b in zip(xs, ys) if a > ms["whole"]]
    for a, b in slower:
        axis.scatter(a, b, 55, RED, marker=marker, zorder=3)
top = 100 * right + 9
for ratio in RATIOS:
    color = RED if ms[ratio] > ms["whole"] else GREY
    axis.text(ms[ratio], top - 2.5, f"- {ratio:.0%}", ha="center", color=color)
    axis.axvline(ms[ratio], c=color, lw=0.5, ls=":", zorder=0)
axis.axhspan(
    100 * (right - error), 100 * (right + error), color="#f3f4f6", zorder=0
)
share = 100 * np.mean(found["timed"] == data.test_y)
axis.scatter(
    ms["timed"],
    share,
    150,
    "#059669",
    marker="*",
    zorder=4,
    label="by milliseconds",
)
axis.scatter(
    ms["whole"], 100 * right, 70, "k", marker="D", zorder=4, label="whole"
)
axis.axvline(ms["whole"], c="k", ls="--", lw=1)
last = 1.12 * max(ms.values())
axis.axvspan(ms["whole"], last, color=RED, alpha=0.08, zorder=0)
axis.text(last, 52, "slower than whole ", color=RED, ha="right", rotation=90)
axis.axhline(50, c=GREY, ls=":", lw=1)
axis.text(2, 50.5, "chance", color=GREY)
axis.set(xlim=(0, last), ylim=(45, top))
axis.set(xlabel="milliseconds for 32 sentences", ylabel="accuracy in %")
axis.legend(frameon=False, loc="center left")
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "04_compression")

# %% [markdown]
# On top are the shares of weights removed; the grey band is one standard error
# around the whole model. Further up is better, further left is faster. What is
# in the red area has fewer weights and is *slower* than the whole model: two
# products in the place of one only pay once they are thin enough. And a model
# without 70 % of these weights is far from three times as fast, since
# attention, norms and activations take their time as before. The star is the
# model that was asked for milliseconds. It is no better here than the same
# share from every layer, chosen by outputs.
#
# ## Why the file does not halve
#
# We save the whole model and the one with half of its kernels.

# %%
files = {}
with tempfile.TemporaryDirectory() as folder:
    for name, candidate in (("whole", model), ("half", small["outputs", 0.5])):
        file = pathlib.Path(folder) / f"{name}.keras"
        candidate.save(file)
        files[name] = file.stat().st_size / 1e6
    again = keras.saving.load_model(file, compile=False)
print("megabytes:", {name: f"{size:.1f}" for name, size in files.items()})

# %% tags=["plot"] alt="Two horizontal bars of file size, whole and half. Both start with the same long bar of the word table, 47 MB; the kernels after it shrink from 43 to 21 MB; the rest is small."
report = ks.compression_report(small["outputs", 0.5], quiet)
table_size = model.backbone.token_embedding.embeddings.shape
words = 4e-6 * np.prod(table_size)  # megabytes of float32
kernels = [
    4e-6 * sum(layer.weights[i] for layer in report.layers) for i in (0, 1)
]
figure, axis = plt.subplots(figsize=(8.5, 2.2), layout="constrained")
for place, (size, part_size) in enumerate(zip(files.values(), kernels)):
    rest = size - words - part_size
    left = 0
    parts = (
        (words, "#9ca3af", "word table"),
        (part_size, BLUE, "kernels"),
        (rest, "#fbbf24", "rest"),
    )
    for width, color, label in parts:
        axis.barh(
            1 - place,
            width,
            0.6,
            left,
            color=color,
            label=None if place else label,
        )
        if width > 8:
            axis.text(
                left + width / 2,
                1 - place,
                f"{width:.0f}",
                ha="center",
                va="center",
                color="w",
                fontsize=11,
            )
        left += width
axis.set(yticks=[1, 0], yticklabels=list(files), xlabel="megabytes")
axis.legend(frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.3))
axis.spines[["top", "right", "left"]].set_visible(False)
course.show(figure, "04_files")

# %% [markdown]
# Half of MiniLM is a table of 30,522 word pieces, which `compress_model`
# leaves alone unless you name it: looking up a row costs no time, whatever
# its size. In a model with more blocks and the same words, kernels are the
# larger part. To make the file smaller still, store fewer bits:
# [small machines](10_small_machines.ipynb).
#
# ## Checks

# %% tags=["checks"]
half_kernels, half_outputs = small["kernels", 0.5], small["outputs", 0.5]
plain = ks.compression_report(half_kernels, quiet)
assert half_kernels.count_params() == half_outputs.count_params()
assert 0.45 < kernels[1] / kernels[0] < 0.55
assert files["half"] / files["whole"] > 0.7
assert curves["its outputs"][96] < curves["the kernel"][96] - 0.1
row = next(each for each in plain.layers if each.path == path)
assert np.isclose(row.error, curves["the kernel"][row.rank], atol=1e-3)
seen = next(each for each in report.layers if each.path == path)
assert np.isclose(seen.error, curves["its outputs"][seen.rank], 0.1)
np.testing.assert_array_equal(answers(again), found["outputs", 0.5])
most = RATIOS[-1]
same = {way: np.mean(found[way, most] == whole) for way in ways}
if not course.FAST:
    assert right > 0.72
    assert same["outputs"] > same["kernels"] + 0.05
    assert np.mean(found["outputs", 0.5] == data.test_y) > right - 0.08
    assert ms[0.7] < ms[0.1] and ms[0.7] < ms["whole"]

# %% [markdown]
# ## Exercises
#
# 1. Cut one kernel by hand: take `kernel`, keep 100 ranks by the kernel's own
#    singular vectors, then by those of its outputs. Compare both errors on the
#    outputs.
# 2. The same share from every layer is the simplest rule. Compress with
#    `method="alds"` at the same ratio of 0.5 with the calibration.
#    Which layers keep more, and does the model answer more like before?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
_, _, directions = np.linalg.svd(kernel, full_matrices=False)
_, own = np.linalg.eigh(kernel.T @ centred @ kernel)
errors = {}
for name, basis in (
    ("kernel", directions[:100].T),  # (1536, 100)
    ("outputs", own[:, ::-1][:, :100]),
):
    gone = kernel - kernel @ basis @ basis.T
    errors[name] = np.sqrt(
        np.trace(gone.T @ centred @ gone)
        / np.trace(kernel.T @ centred @ kernel)
    )
print({name: f"{value:.1%}" for name, value in errors.items()})
assert errors["outputs"] < errors["kernel"]

# %% [markdown]
# ### Solution 2
#
# ALDS makes the *largest* relative error of all layers small, by the spectral
# norm. Where outputs have one strong direction, that norm is content with a
# tiny rank, and so it cuts some layers nearly away. On this model the plain
# rule keeps more answers; measure before you choose.

# %% tags=["solution"]
spread = ks.compress_model(model, 0.5, method="alds", **options)
layers = ks.compression_report(spread, quiet).layers
kept = {each.path: each.weights[1] / each.weights[0] for each in layers}
for each in sorted(kept, key=kept.get)[:: max(1, len(kept) // 5)]:
    print(f"{kept[each]:5.0%} of {each.split('backbone/')[-1]}")
agree = np.mean(answers(spread) == whole)
uniform = np.mean(found["outputs", 0.5] == whole)
print(f"as before: {agree:.1%}, uniform: {uniform:.1%}")
assert abs(spread.count_params() / half_outputs.count_params() - 1) < 0.02

# %% [markdown]
# ## Further reading
#
# - Wang et al. 2024, *SVD-LLM*, arXiv 2403.07378: truncation by outputs.
# - Liebenwein et al. 2021, *ALDS*, arXiv 2107.11442: how to spread ranks over
#   layers, and slices of convolutions.
# - Hinton et al. 2015, arXiv 1503.02531: training the small model on the
#   outputs of the large one; here `ks.distiller`.
