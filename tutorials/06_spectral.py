# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Spectral adapters: move what a kernel already knows
#
# LoRA starts a new matrix beside the kernel at random. A spectral adapter
# takes the kernel apart first, into the directions that it listens to, their
# strengths and its answers, and trains changes of these. In one mode 384
# numbers for a kernel of 147,456 lift MiniLM from 65 % to 74 % of films rated
# right. The hard part is to choose how free the directions should be, so we
# hold three modes beside LoRA at about equal weights.

# %% [markdown]
# **What you see:** a 2 x 2 matrix maps the unit circle to an ellipse. The axes
# of the ellipse are its output singular vectors, and half their lengths are
# its singular values. In each of the other panels a trained change of one
# mode turns the blue ellipse into the red one. *values* makes axes longer or
# shorter. *rotate* turns them as well, and keeps them at right angles.
# *additive* moves the image of a direction wherever it likes; here that of the
# first one. The dot is one input and its image.
#
# **You will learn**
#
# - the three modes of `SpectralDense`, and what each costs;
# - how their accuracy compares with that of LoRA at about equal weights;
# - which part of a kernel each of them can change at all.
#
# MiniLM, and sentences on films that people rated; about four minutes on two
# CPU cores. Change `"jax"` below for another backend; all outputs here are of
# the one that the first cell prints.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import matplotlib.pyplot as plt
import numpy as np

import keras_spectral as ks
from keras_spectral import course

course.quiet()
keras.utils.set_random_seed(7)
print("backend:", keras.backend.backend())

# %% tags=["plot"]
GREY, BLUE, RED = "#9ca3af", "#2563eb", "#dc2626"


def turn(degrees):
    t = np.deg2rad(degrees)
    return np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])


def draw_modes():
    u, s, v = turn(60), np.array([2.0, 0.8]), turn(15)
    old = u @ np.diag(s) @ v.T  # y = x K
    u_new, v_new = u.copy(), v.copy()
    u_new[:, 0] += (0.1, -0.25)
    v_new[:, 0] += (-0.3, 0.55)
    turned = u @ turn(-50) @ np.diag([1.7, 1.1]) @ (v @ turn(40)).T
    panels = {
        "the kernel K": (old, old),
        "values: stretch": (old, u @ np.diag([1.2, 1.5]) @ v.T),
        "rotate: turn and stretch": (old, turned),
        "additive: move freely": (old, u_new @ np.diag(s) @ v_new.T),
    }
    t = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(t), np.sin(t)], axis=1)  # (200, 2)
    figure, axes = plt.subplots(
        1, 4, figsize=(14, 4.1), layout="constrained", sharey=True
    )
    for number, (axis, (title, pair)) in enumerate(
        zip(axes, panels.items(), strict=True)
    ):
        if number == 0:
            axis.plot(*circle.T, color=GREY, lw=2, label="unit circle")
            axis.plot(*circle[:1].T, "o", color=GREY)
        shown = zip(pair, (BLUE, RED), ("before", "after"), strict=True)
        for matrix, color, label in list(shown)[: 1 if number == 0 else 2]:
            label = "its image" if number == 0 else label
            image = circle @ matrix
            axis.plot(*image.T, color=color, lw=2, label=label)
            axis.plot(*image[:1].T, "o", color=color)
            if title.startswith("additive"):
                tips = u.T @ matrix  # images of the old input directions
            else:
                _, size, vt = np.linalg.svd(matrix)
                tips = size[:, None] * vt * np.sign(vt[:, :1] + 1e-9)
            for x, y in tips:
                axis.annotate(
                    "",
                    (x, y),
                    (0, 0),
                    arrowprops={"arrowstyle": "->", "color": color, "lw": 1.5},
                )
        axis.set_title(title, fontsize=13)
        axis.set(xlim=(-2.15, 2.15), ylim=(-1.65, 2.1), aspect="equal")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#d1d5db")
        axis.legend(frameon=False, ncols=2, loc="upper center", fontsize=11)
    return figure


# %% tags=["picture"] alt="Four panels. First: a matrix maps the unit circle to a blue ellipse whose two axes are drawn as arrows. Then a red ellipse over the blue one for each mode: with values the axes point the same way and have other lengths, with rotate they are turned and at right angles still, with additive one arrow has moved freely and the two are not at right angles."
course.show(draw_modes(), "06_spectral")

# %% [markdown]
# ## Three modes
#
# Take a kernel $K$ (`n_in x n_out`) apart,
#
# $$K = U_1 \mathrm{diag}(S_1) V_1^T + U_2 \mathrm{diag}(S_2) V_2^T,$$
#
# where $U_1, S_1, V_1$ are the $r$ triplets that the adapter may change, by
# default those with the largest singular values.
#
# | mode | new kernel, beside $U_2 S_2 V_2^T$ | weights |
# |---|---|---|
# | additive | $(U_1 + dU)\,\mathrm{diag}(S_1)\,(V_1 + dV)^T$ | $r (n_{in} + n_{out})$, as LoRA |
# | rotate | $U_1 Q(a)\,\mathrm{diag}(c\,S_1)\,(V_1 Q(b))^T$ | $2 r^2 + r$, whatever the layer's size |
# | values | $U\,\mathrm{diag}(\mathrm{relu}(S + d))\,V^T$ | $r$, by default $\min(n_{in}, n_{out})$ |
#
# $Q$ is the Cayley map, $Q(X) = (I - Z)(I + Z)^{-1}$ with
# $Z = (X - X^T)/2$. It makes a rotation of any square matrix, so that plain
# gradient descent can train one. All three start exactly at the base. This is
# what each trains for one kernel of 384 x 384, drawn to scale:

# %% tags=["plot"] alt="The weights of each mode for a 384 by 384 kernel, to scale: LoRA and additive have two strips of 384 by 8, rotate two squares of 23 by 23, values a line of 384 numbers."
figure, axis = plt.subplots(figsize=(11, 3.4), layout="constrained")


def block(x, y, width, height, color):
    kind = {"facecolor": color, "edgecolor": color, "lw": 0.8}
    axis.add_patch(plt.Rectangle((x, y), width, height, **kind))


def caption(x, text):
    axis.text(x, -25, text, ha="center", va="top", fontsize=10)


block(0, 0, 384, 384, "#dbeafe")
caption(192, "kernel K, frozen\n147,456 numbers")
for x, name in ((480, "LoRA, rank 8"), (960, "additive, rank 8")):
    block(x, 0, 8, 384, RED)
    block(x + 24, 376, 384, 8, RED)
    caption(x + 200, f"{name}\n384 x 8 and 8 x 384: 6,144")
for x in (1480, 1520):
    block(x, 361, 23, 23, RED)
block(1560, 361, 2, 23, RED)
caption(1530, "rotate, rank 23\n2 x 23 x 23 + 23: 1,081")
block(1800, 0, 2, 384, RED)
caption(1800, "values\n384")
axis.set(xlim=(-10, 1900), ylim=(-130, 390), aspect="equal")
axis.axis("off")
course.show(figure, "06_spectral_weights")

# %% [markdown]
# ## A language model that rates films
#
# MiniLM has six transformer blocks. We adapt the last one and the pooler
# behind it, seven kernels; the five blocks below stay as they are, so we
# compute once what they say about each sentence.

# %%
LENGTH = 32  # tokens
train, test = (96, 96) if course.FAST else (900, 500)
films = course.sentences("films", train, test)
encoder = course.minilm(LENGTH)
backbone, read = encoder.cut(5)  # `read` runs the five blocks that stay
x, test_x = read(films.x), read(films.test_x)
print(films.name, x[0].shape, f"{films.test_y.mean():.0%} positive")

# %%
hidden = keras.Input((LENGTH, 384))
mask = keras.Input((LENGTH,), dtype="int32")
last = backbone.get_layer("transformer_layer_5")(hidden, padding_mask=mask)
pooled = backbone.get_layer("pooled_dense")(last[:, 0])  # (n, 384)
model = keras.Model([hidden, mask], keras.layers.Dense(2, name="head")(pooled))
print(f"{course.count(model.weights):,} weights")

# %% [markdown]
# ## The same budget, two by two
#
# *additive* has as many weights as LoRA of the same rank. *rotate* of rank 23
# has about as many as LoRA of rank 1, and *values* has a third of these. The
# new head of 770 weights trains in all of them, and alone in the last row.
# For *additive* and *rotate* we took the better of two rates by the training
# loss; LoRA and *values* have the first rate that we tried. Guess the order
# before you read the table.

# %%
EPOCHS = 1 if course.FAST else 3
ways = {
    "LoRA, rank 8": ("lora", 1e-3, {"rank": 8}),
    "additive, rank 8": ("spectral", 1e-3, {"rank": 8}),
    "LoRA, rank 1": ("lora", 3e-3, {"rank": 1}),
    "rotate, rank 23": ("spectral", 1e-2, {"rank": 23, "mode": "rotate"}),
    "values": ("spectral", 3e-2, {"mode": "values"}),
}
if course.FAST:
    del ways["LoRA, rank 1"], ways["rotate, rank 23"]


# %%
def fit(rate):
    keras.utils.set_random_seed(7)
    losses = course.train(model, x, films.y, rate, EPOCHS, 32)["loss"]
    right = course.accuracy(model, test_x, films.test_y)
    return course.count(model.trainable_weights), losses[-1], right


results, kernels = {}, {}
for name, (method, rate, options) in ways.items():
    ks.wrap_model(model, method, "all-linear", trainable="head", **options)
    results[name] = fit(rate)
    with ks.merged(model) as plain:
        kernels[name] = np.array(
            plain.get_layer("pooled_dense").get_weights()[0]
        )
    ks.unwrap_model(model)  # base and head as they were

# %%
for layer in model.layers:
    layer.trainable = layer.name == "head"
results["head only"] = fit(1e-2)
rows = [
    (name, f"{weights:,}", f"{loss:.2f}", f"{right:.1%}")
    for name, (weights, loss, right) in results.items()
]
heads = ("what trains", "weights", "training loss", "accuracy")
course.table("Films, one seed", heads, rows)

# %% [markdown]
# What lies within one error bar of the next picture, 2.2 points, is a tie on
# 500 sentences. So *additive* and LoRA of rank 8 are level. *rotate* is behind
# LoRA of rank 1 by two such bars, which may still be chance. *values* has well
# under half of the weights of either and is level with *rotate*. All of them
# are far above the head alone. Zhang and Pilanci report *additive* ahead of
# LoRA on GLUE, 88.0 against 86.5 on average; on one short task with one seed
# you cannot see a difference of that size.

# %% tags=["plot"] alt="Accuracy on films over the number of trained weights, on a logarithmic axis, with bars of one standard error: LoRA in blue, the three spectral modes in red, the head alone in grey, and a dashed line for always answering the more frequent class."
figure, axis = plt.subplots(figsize=(8.5, 4), layout="constrained")
error = 100 * (0.25 / test) ** 0.5
for name, (weights, _, right) in results.items():
    color = BLUE if "LoRA" in name else GREY if "head" in name else RED
    weights *= 0.95 if color == RED else 1  # so that bars lie side by side
    axis.errorbar(weights, 100 * right, error, fmt="o", color=color, capsize=3)
    below_it = name in ("LoRA, rank 8", "rotate, rank 23")
    axis.annotate(
        name,
        (weights, 100 * right),
        (8, -14 if below_it else 6),
        textcoords="offset points",
        color=color,
    )
chance = 100 * max(films.test_y.mean(), 1 - films.test_y.mean())
axis.axhline(chance, color=GREY, ls="--", lw=1)
axis.text(150000, chance + 0.4, "the more frequent class", ha="right")
axis.set(xscale="log", xlim=(600, 160000), xlabel="trained weights, head too")
axis.set(ylabel="films rated right, in %")
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "06_spectral_accuracy")

# %% [markdown]
# ## What each can change
#
# Accuracy does not show where the modes differ. We write the change of the
# pooler's kernel in its own singular vectors, $U^T (K' - K)\,V$. Entry
# $(i, j)$ says how much of what the kernel hears in its $i$-th direction it
# now answers in its $j$-th. How will LoRA's picture look?

# %%
old = np.array(backbone.get_layer("pooled_dense").get_weights()[0])
u, s, vt = np.linalg.svd(old)  # (384, 384), (384,), (384, 384)
changes = {name: u.T @ (new - old) @ vt.T for name, new in kernels.items()}


def inside(change, rank):
    """Share of the squared change in the leading directions, by place."""
    square = change**2 / np.sum(change**2)
    block = square[:rank, :rank].sum()
    cross = square[:rank].sum() + square[:, :rank].sum() - block
    return np.trace(square), block, cross


# %%
rows = [
    (
        name,
        *[
            f"{share:.0%}"
            for share in (*inside(change, 8), inside(change, 23)[1])
        ],
    )
    for name, change in changes.items()
]
heads = (
    "method",
    "diagonal",
    "first 8 x 8",
    "first 8 rows or columns",
    "23 x 23",
)
course.table("Where the squared change of the pooler lies", heads, rows)

# %% tags=["plot"] alt="Heat maps of the change of the pooler's kernel in its own singular vectors, the first 48 of 384 directions: values only on the diagonal, rotate all but 1 % within the first 23 by 23, additive mostly in the first eight rows and columns, LoRA of rank 8 everywhere."
shown = ("values", "rotate, rank 23", "additive, rank 8", "LoRA, rank 8")
ranks = (None, 23, 8, None)
figure, axes = plt.subplots(
    1, 4, figsize=(14, 4), layout="constrained", sharey=True
)
for axis, name, rank in zip(axes, shown, ranks, strict=True):
    if name not in changes:
        continue
    part = np.abs(changes[name][:48, :48])
    picture = axis.imshow((part / part.max()) ** 0.5, cmap="Blues", vmax=1)
    if rank:
        axis.axhline(rank - 0.5, color=RED, lw=1)
        axis.axvline(rank - 0.5, color=RED, lw=1)
    axis.set_title(name, fontsize=13)
    axis.set_xlabel("output direction")
axes[0].set_ylabel("input direction")
figure.colorbar(picture, ax=axes, label="root of relative change", shrink=0.8)
course.show(figure, "06_spectral_changes")

# %% [markdown]
# The first 48 of 384 directions are shown; the red lines mark the rank.
# *values* stays on the diagonal and *rotate* within its block: neither can do
# anything else. (The faint rest beside the block is about 1 %. For kernels of
# this size the library computes the leading triplets by a randomized method,
# and they differ a little from those of the whole decomposition.) *additive*
# has its largest changes in the rows and columns of its eight directions: what
# these hear gets new answers, and their answers are given to new inputs. LoRA
# does not know the directions of the kernel, and its change lies all over the
# map.
#
# So the modes are a choice of what to keep. If the task uses what the kernel
# hears already, *values* or *rotate* may be enough, and they are small. If it
# needs new inputs or new answers, they cannot learn them, however long you
# train.
#
# ## Checks

# %% tags=["checks"]
kernels_in, head_weights = 4 * (384 + 384) + 2 * (384 + 1536) + 768, 770
counts = {name: weights for name, (weights, _, _) in results.items()}
assert counts["head only"] == head_weights
assert counts["LoRA, rank 8"] == 8 * kernels_in + head_weights
assert counts["additive, rank 8"] == counts["LoRA, rank 8"]
assert counts["values"] == 7 * 384 + head_weights
shares = {name: inside(change, 8) for name, change in changes.items()}
assert shares["values"][0] > 0.999
assert shares["additive, rank 8"][2] > 0.5 > shares["LoRA, rank 8"][2]
if not course.FAST:
    assert counts["rotate, rank 23"] == 7 * (2 * 23**2 + 23) + head_weights
    assert counts["rotate, rank 23"] < kernels_in + head_weights
    assert inside(changes["rotate, rank 23"], 23)[1] > 0.9
    rights = {name: right for name, (_, _, right) in results.items()}
    assert min(rights[name] for name in ways) > chance / 100 + 0.05

# %% [markdown]
# ## Exercises
#
# 1. From which rank on does *rotate* train more weights than *additive*, for
#    a layer of `n` inputs and `n` outputs?
# 2. Adapters of one base on **different triplets** can be added on one
#    decomposition, without data. Give one Dense layer an *additive* adapter on
#    triplets 0 to 7 and, in a copy, one on 8 to 15 (`columns=8`), with random
#    changes. Fuse them with `ks.fuse_adapters` and show that the two changes
#    of the kernel add up.
# 3. Which rank does LoRA need to be the same as *additive* of rank 8?

# %% [markdown]
# ### Solution 1
# $2 r^2 + r > 2 n r$ means $r > n - 1/2$: only at full rank.

# %% tags=["solution"]
assert [r for r in range(1, 65) if 2 * r**2 + r > r * (64 + 64)] == [64]

# %% [markdown]
# ### Solution 2
# This says nothing of accuracy: the triplets are apart, the neurons are
# shared. Test a fused model on each of its tasks.

# %% tags=["solution"]
import pathlib
import tempfile

kernel = np.random.default_rng(7).normal(size=(64, 64)).astype("float32")


def layer_model():
    layer = keras.layers.Dense(64, use_bias=False, name="layer")
    found = keras.Sequential([keras.Input((64,)), layer])
    found.set_weights([kernel])
    return found


def change_of(adapted):
    with ks.merged(adapted) as plain:
        return np.array(plain.get_layer("layer").get_weights()[0]) - kernel


parts = []
with tempfile.TemporaryDirectory() as folder:
    files = [pathlib.Path(folder) / f"{i}.safetensors" for i in range(2)]
    for number, file in enumerate(files):
        part = ks.wrap_model(
            layer_model(), "spectral", "layer", rank=8, columns=8 * number
        )
        for weight in part.trainable_weights:
            weight.assign(
                keras.random.normal(weight.shape, 0, 0.1, seed=number)
            )
        parts.append(change_of(part))
        ks.save_adapters(part, file)
    fused = ks.fuse_adapters(layer_model(), files)
assert fused.get_layer("layer").column_list == tuple(range(16))
assert np.allclose(change_of(fused), sum(parts), atol=1e-3)

# %% [markdown]
# ### Solution 3
# Rank 16: the update is $U_1 S_1 dV^T + dU\,S_1 (V_1 + dV)^T$, two terms of
# rank 8. `ks.to_lora` writes it so.

# %% tags=["solution"]
before = change_of(part)
ks.to_lora(part)
assert part.get_layer("layer").rank == 16
assert np.allclose(change_of(part), before, atol=1e-3)

# %% [markdown]
# ## Further reading
#
# - Zhang and Pilanci 2024, Spectral Adapter, arXiv 2405.13952: the additive
#   and the rotated form, and fusing by columns.
# - Han et al. 2023, SVDiff, arXiv 2303.11305: training singular values alone.
# - Hu et al. 2021, LoRA, arXiv 2106.09685: the comparison on this page.
