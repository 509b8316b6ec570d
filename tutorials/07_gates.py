# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gates on singular values: 96 weights, from 10 to 79 %
#
# A network that reads 99 % of upright digits reads one in ten, which is
# chance, when they come turned by a quarter. 96 trained numbers lift that to
# 79 %: a gate on each of 48 singular values of two kernels. The hard part is
# that a gate can only stretch or shrink a direction that a kernel has, and
# never make a new one.

# %% [markdown]
# **What you see:** on the left four digits, upright and turned. In the
# middle the accuracy on turned digits over the number of trained weights,
# with the gates, two kinds of LoRA, the biases and the head alone; the dashed
# line is chance. On the right the trained gates of the first kernel: a bar
# above zero stretches its direction, a bar below zero shrinks it, and below
# -1 it turns it round.
#
# **You will learn**
#
# - what `GatedSpectralDense` computes, in `k` weights a layer;
# - how its accuracy compares with that of other small adapters;
# - what L1 pressure does to the number of gates and to accuracy;
# - when the input should choose the gates, and why such gates do not survive
#   a merge.
#
# Data: scikit-learn's digits, 8 x 8 pixels. About a minute on two CPU cores.
# Change `"jax"` below for another backend; the outputs on this page are those
# of the backend that the first cell prints.

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
data = course.images()
print("backend:", keras.backend.backend())
print("data:", data.name)

# %% [markdown]
# ## A small network, and images it cannot read
#
# Two hidden Dense layers learn upright images. The same images turned by a
# quarter are the new task. Guess how many of the turned ones the network
# reads before you look.

# %%
EPOCHS = 15 if course.FAST else 30
HIDDEN = ("hidden1", "hidden2")
pixels = int(np.prod(data.x.shape[1:]))  # 64


def new_model():
    layers = [keras.Input((pixels,))]
    for name in HIDDEN:
        layers.append(keras.layers.Dense(64, activation="relu", name=name))
    return keras.Sequential([*layers, keras.layers.Dense(10, name="head")])


def flat(x, turns=0):
    return np.rot90(x, turns, axes=(1, 2)).reshape(len(x), -1)  # (n, pixels)


# %%
upright, upright_test = flat(data.x), flat(data.test_x)
turned, turned_test = flat(data.x, 1), flat(data.test_x, 1)
base = new_model()
course.train(base, upright, data.y, 3e-3, EPOCHS)
before = course.accuracy(base, turned_test, data.test_y)
clean = course.accuracy(base, upright_test, data.test_y)
print(f"upright {clean:.1%}, turned {before:.1%}, chance 10 %")

# %% [markdown]
# ## One gate for each singular value
#
# A kernel is $K = U\,\mathrm{diag}(S)\,V^\top$, with the largest singular
# value first. A column of $U$ is a pattern that the kernel looks for in its
# input, $S_i$ says how strongly it passes it on, and a column of $V$ is what
# it answers. `GatedSpectralDense` gives the first $k$ singular values a gate:
#
# $$S'_i = S_i\,(1 + g_i), \qquad
# y = x K + x\,U_k\,\mathrm{diag}(S_k\, g)\,V_k^\top + b .$$
#
# All gates start at 0, where nothing changes, and nothing else trains. The
# drawing shows the shapes to scale; what trains is red.

# %% tags=["plot"] alt="A kernel of 64 by 64 as U of 64 by 48, 48 singular values with a red gate on each, and the transpose of V of 48 by 64, to scale; the 16 smallest singular values have no gate and are grey."
figure, axis = plt.subplots(figsize=(9, 3.2), layout="constrained")


def block(x, y, width, height, color, label):
    kind = {"facecolor": color, "edgecolor": "#374151", "lw": 1}
    axis.add_patch(plt.Rectangle((x, y), width, height, **kind))
    axis.text(x + width / 2, -9, label, ha="center", va="center")


block(0, 0, 64, 64, "#dbeafe", "K\n64 x 64")
axis.text(72, 32, "=", ha="center", va="center", fontsize=16)
block(80, 0, 64, 64, "#e5e7eb", "U\n64 x 64")
axis.add_patch(plt.Rectangle((80, 0), 48, 64, facecolor="#bfdbfe", lw=0))
block(152, 0, 64, 64, "white", "diag(S)\n48 of 64 gated")
numbers = np.arange(64)
gated = numbers < 48
axis.scatter(152.5 + numbers[gated], 63.5 - numbers[gated], s=9, c="#dc2626")
axis.scatter(152.5 + numbers[~gated], 63.5 - numbers[~gated], s=9, c="#9ca3af")
axis.text(195, 44, "1 + g", color="#dc2626", ha="center")
block(224, 0, 64, 64, "#e5e7eb", "transpose of V\n64 x 64")
axis.add_patch(plt.Rectangle((224, 16), 64, 48, facecolor="#bfdbfe", lw=0))
axis.set(xlim=(-2, 290), ylim=(-18, 66), aspect="equal")
axis.axis("off")
course.show(figure, "07_gates_drawing")

# %% [markdown]
# Each method on this page has the learning rate that did best in a trial of
# two or three on a part of the training images. Adam's steps have about the
# size of the rate, so a gate that ought to rest keeps trembling; the rate
# therefore falls to zero.


# %%
def fit(model, rate, x=turned, y=data.y, **options):
    steps = EPOCHS * -(-len(x) // 50)  # batches of 50
    falling = keras.optimizers.schedules.CosineDecay(rate, steps)
    return course.train(model, x, y, falling, EPOCHS, **options)


def adapted(method, target="hidden.", **options):
    model = new_model()
    model.set_weights(base.get_weights())
    # trainable=(): the head stays as it is.
    return ks.wrap_model(model, method, target, trainable=(), **options)


# %%
K = 48
gated = adapted("gated_spectral", directions=K, l1=0.0)
fit(gated, 3e-2)
reached = course.accuracy(gated, turned_test, data.test_y)
weights = course.count(gated.trainable_weights)  # 2 layers x 48
print(f"{weights} weights: {before:.1%} -> {reached:.1%}")

# %% [markdown]
# 96 numbers go most of the way. Is that much? We hold it beside other small
# ways: LoRA of rank 1 on one layer (128 weights) and on both (256), the 128
# biases of the two layers, and the 650 weights of the head. Guess which of
# them beats the gates.

# %%
models = {
    "LoRA rank 1, hidden1": adapted("lora", "hidden1", rank=1),
    "LoRA rank 1, both": adapted("lora", rank=1),
    "biases": adapted("bitfit"),
    "head only": new_model(),
}
models["head only"].set_weights(base.get_weights())
for name in HIDDEN:
    models["head only"].get_layer(name).trainable = False

results = {f"gates, {K} a layer": (weights, reached)}
for name, model in models.items():
    fit(model, 1e-2 if name == "head only" else 3e-2)
    score = course.accuracy(model, turned_test, data.test_y)
    results[name] = course.count(model.trainable_weights), score
rows = [(name, f"{n}", f"{right:.1%}") for name, (n, right) in results.items()]
course.table("Turned digits", ("what trains", "weights", "accuracy"), rows)

# %% [markdown]
# At the nearest budgets, 128 weights, LoRA on one layer and the biases stay far
# behind the gates. LoRA on both layers, with nearly three times as many
# weights, is level or a little ahead: with 497 test images the standard error
# of each accuracy is nearly two points, and this is one seed. The head wins,
# with seven times the weights. So gates are the best use of the first hundred
# numbers here, and no rival to a larger budget.

# %% tags=["plot"]
BLUE, RED, GREY = "#2563eb", "#dc2626", "#6b7280"


def gates_of(model, layer):
    return keras.ops.convert_to_numpy(model.get_layer(layer).gates)  # (K,)


def draw_opening():
    figure = plt.figure(figsize=(13, 4.2), layout="constrained")
    images, left, right = figure.subfigures(1, 3, width_ratios=[1, 1.7, 1.9])
    axes = images.subplots(4, 2)
    for row, number in zip(axes, (0, 1, 2, 5), strict=True):
        image = data.x[..., 0][np.flatnonzero(data.y == number)[0]]
        for axis, shown in zip(row, (image, np.rot90(image)), strict=True):
            axis.imshow(shown, cmap="gray_r")
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("upright")
    axes[0, 1].set_title("turned")
    axis = left.subplots()
    for name, (n, right_answers) in results.items():
        mine = name.startswith("gates")
        color = RED if mine else BLUE
        axis.scatter(n, 100 * right_answers, s=70, color=color, zorder=3)
        place = {"head only": (-8, 8), "LoRA rank 1, both": (8, -14)}
        axis.annotate(
            name,
            (n, 100 * right_answers),
            place.get(name, (8, 3)),
            textcoords="offset points",
            ha="right" if name == "head only" else "left",
            color=color,
        )
    axis.axhline(10, color=GREY, ls="--", lw=1)
    axis.text(660, 12, "chance, and before training", ha="right", color=GREY)
    axis.set(xscale="log", xlim=(80, 800), ylim=(0, 100))
    axis.set_xticks([100, 200, 400, 650], [100, 200, 400, 650])
    axis.minorticks_off()
    axis.set(xlabel="trained weights", ylabel="turned digits read, in %")
    axis.set_title("Accuracy over weights")
    axis.spines[["top", "right"]].set_visible(False)
    axis = right.subplots()
    values = gates_of(gated, "hidden1")
    colors = np.where(values < -1, RED, BLUE)
    axis.bar(range(K), values, color=colors)
    axis.axhline(0, color="black", lw=0.8)
    axis.axhline(-1, color=GREY, ls="--", lw=1)
    axis.text(K + 0.5, -0.93, "taken out", va="bottom", color=GREY)
    axis.set_xlim(-1, K + 10)
    axis.set(xlabel="singular direction, largest first", ylabel="gate g")
    axis.set_title("The gates of the first kernel")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


# %% tags=["picture"] alt="Left: digits upright and turned by a quarter. Middle: accuracy on turned digits over trained weights; 96 gates reach about 79 %, from 10 % before, above LoRA of rank 1 on one layer and the biases at 128 weights, a little below LoRA on both layers at 256, below the head at 650. Right: 48 gates of the first kernel as bars up and down."
course.show(draw_opening(), "07_gates")

# %% [markdown]
# The gates on the right are not small. Many lie below -1, the dashed line, and
# answer with the opposite sign (red). The network reads turned digits with
# the patterns of upright ones, in other proportions.
#
# ## Pressure: fewer gates, for a price
#
# With `l1` the sum $\lambda \sum_i |g_i|$ joins the loss: a gate must earn its
# place. `GateMonitor` counts after each epoch the gates with $|g_i| > 0.01$,
# and `prune_gates` sets the others to exactly zero. What will ten times the
# pressure cost?

# %%
pressures = (3e-2,) if course.FAST else (3e-3, 1e-2, 3e-2, 1e-1)
monitor = ks.callbacks.GateMonitor(threshold=0.01)
runs = {0: (gated, 2 * K, reached, reached)}
for l1 in pressures:
    model = adapted("gated_spectral", directions=K, l1=l1)
    used = fit(model, 3e-2, callbacks=[monitor])["active_gates"][-1]
    score = course.accuracy(model, turned_test, data.test_y)
    for name in HIDDEN:
        model.get_layer(name).prune_gates(0.01)
    pruned = course.accuracy(model, turned_test, data.test_y)
    runs[l1] = model, used, score, pruned

# %%
heads = ("l1", f"gates kept of {2 * K}", "accuracy", "after pruning")
rows = [
    (f"{l1:g}", f"{used}", f"{score:.1%}", f"{pruned:.1%}")
    for l1, (_, used, score, pruned) in runs.items()
]
course.table("Gates under pressure", heads, rows)

# %% tags=["plot"] alt="Left: accuracy falls from about 79 % to about 25 % as L1 pressure leaves fewer gates, from all 96 to about a dozen. Right: gates of the first kernel without pressure in grey and with l1 = 0.01 in blue; most of those of small singular values are closed."
figure, (left, right) = plt.subplots(
    1, 2, figsize=(12, 3.8), layout="constrained", width_ratios=[1, 1.5]
)
kept = [used for _, used, _, _ in runs.values()]
scores = [100 * score for _, _, score, _ in runs.values()]
left.plot(kept, scores, "o-", color=RED)
for l1, n, score in zip(runs, kept, scores, strict=True):
    left.annotate(
        f"l1 = {l1:g}", (n, score), (5, -15), textcoords="offset points"
    )
left.axhline(10, color=GREY, ls="--", lw=1)
left.text(118, 5, "chance", ha="right", color=GREY)
left.set(xlim=(0, 120), ylim=(0, 100), xlabel=f"gates kept of {2 * K}")
left.set(ylabel="turned digits read, in %", title="Pressure costs accuracy")
middle = pressures[len(pressures) // 3]
for l1, color, width in ((0, "#d1d5db", 0.9), (middle, BLUE, 0.5)):
    values = gates_of(runs[l1][0], "hidden1")
    right.bar(range(K), values, width, color=color, label=f"l1 = {l1:g}")
right.axhline(0, color="black", lw=0.8)
right.set(title="Gates of the first kernel", ylabel="gate g")
right.set(xlabel="singular direction, largest first")
right.legend(frameon=False)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "07_gates_2")

# %% [markdown]
# Accuracy falls with the gates that stay, and pruning what is small changes
# next to nothing. On the right, pressure closes most gates of small singular
# values first: a direction with little signal has to change a lot to matter,
# and a large change is dear. So L1 shows which directions a task needs; here
# it does not find a small set that would be enough.
#
# ## Gates that look at the input
#
# Now upright and turned digits come mixed. One set of gates has to serve both,
# and what helps the one harms the other. `ConditionalSpectralDense` chooses
# gates for each example. From the codes $z = x\,U$ of an example and a learned
# vector $e$ of the layer, a small network makes a logit for each direction.
# The gate is open (1) where the logit is positive, else closed (0):
#
# $$y = x K + \alpha\, x\,U\,\mathrm{diag}(S\, g(x))\,V^\top + b,
# \qquad g(x) = [\mathrm{MLP}(z, e) > 0] .$$
#
# With $\alpha = -1$ an open gate takes its direction out of the kernel. While
# training, noise on the logits opens and closes gates at random, and the
# gradient passes as if the gate were a sigmoid. `l0` times the expected number
# of open gates joins the loss. One network serves both layers; it is larger
# than all the adapters above together.

# %%
R = 16
mixed, mixed_y = np.concatenate([upright, turned]), np.tile(data.y, 2)
conditional = adapted(
    "conditional_spectral", rank=R, alpha=-1.0, l0=1e-2, seed=7
)
print(course.count(conditional.trainable_weights), "weights")
course.train(conditional, mixed, mixed_y, 1e-2, EPOCHS)
fixed = adapted("gated_spectral", directions=R, l1=0.0)
course.train(fixed, mixed, mixed_y, 3e-2, EPOCHS)


def shares(x):
    """The share of the examples that open each gate, layer by layer."""
    layers = [conditional.get_layer(name) for name in HIDDEN]
    for layer in layers:
        layer.reset_gates()
    conditional.predict(x, batch_size=500, verbose=0)
    return [keras.ops.convert_to_numpy(layer.mean_gates()) for layer in layers]


# %%
kinds = {"upright": upright_test, "turned": turned_test}
opened = {kind: shares(x) for kind, x in kinds.items()}  # two of (R,) each
result = {}
for kind, x in kinds.items():
    result[kind] = [
        course.accuracy(model, x, data.test_y)
        for model in (base, fixed, conditional)
    ]

# %% [markdown]
# An average of all gates can be merged. We freeze each gate at the share of
# turned digits that open it and merge: is the gain still there?

# %%
ks.freeze_gates(conditional, turned)
frozen = conditional.predict(turned_test, batch_size=500, verbose=0)
ks.merge_model(conditional)
for kind, x in kinds.items():
    result[kind].append(course.accuracy(conditional, x, data.test_y))
heads = ("digits", "base", "fixed gates", "gates by input", "merged", "open")
rows = [
    (kind, *[f"{right:.1%}" for right in result[kind]])
    + (f"{np.sum(opened[kind]):.1f} of {2 * R}",)
    for kind in kinds
]
course.table("One model for upright and turned digits", heads, rows)

# %% tags=["plot"] alt="For each of 16 directions of the two kernels, the share of upright (grey) and of turned digits (red) that open its gate: upright digits open nearly none, turned ones open some in nearly all examples."
figure, axes = plt.subplots(
    1, 2, figsize=(11, 3.6), sharey=True, layout="constrained"
)
places = np.arange(R)
for layer, axis in enumerate(axes):
    for side, (kind, color) in enumerate((("upright", GREY), ("turned", RED))):
        heights = 100 * opened[kind][layer]
        axis.bar(places + 0.4 * side, heights, 0.4, color=color, label=kind)
    axis.set(title=f"Open gates of {HIDDEN[layer]}", ylim=(0, 115))
    axis.set(xlabel="singular direction, largest first")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set(ylabel="examples that open it, in %")
axes[0].legend(frameon=False, ncols=2, loc="upper left")
course.show(figure, "07_gates_3")

# %% [markdown]
# No one told the model which digits were turned, yet they open more gates than
# upright ones: what disturbs them is taken out for them, and upright digits
# keep their kernel. Fixed gates are a compromise, and behind on both kinds.
#
# The price stands in the column "merged": one average kernel for all examples
# loses most of the gain on turned digits. Gates by input have to stay a layer
# of their own; gates that are fixed, as at the top of this page, merge exactly
# with `ks.merge_model`.
#
# ## Checks

# %% tags=["checks"]
assert before < clean / 2
assert weights == 96
assert [n for n, _ in results.values()] == [96, 128, 256, 128, 650]
assert reached > before + 0.3
assert reached > results["LoRA rank 1, hidden1"][1] + 0.05
assert reached > results["biases"][1] + 0.05
kept = [used for _, used, _, _ in runs.values()]
assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 2
assert reached > runs[pressures[-1]][2] + 0.03
assert all(abs(score - pruned) < 0.03 for *_, score, pruned in runs.values())
assert np.flatnonzero(gates_of(runs[middle][0], "hidden1")).mean() < (K - 1) / 2
for untouched, compromise, by_input, _ in result.values():
    assert by_input > max(compromise + 0.05, untouched - 0.15)
assert np.sum(opened["turned"]) > np.sum(opened["upright"]) + 2
merged = conditional.predict(turned_test, batch_size=500, verbose=0)
assert np.allclose(merged, frozen, atol=1e-4 * np.abs(frozen).max())
assert result["turned"][3] < result["turned"][2] - 0.05
assert course.count(conditional.weights) == course.count(base.weights)

# %% [markdown]
# ## Exercises
#
# 1. Gates of fixed values merge exactly. Show it: merge `gated`, and compare
#    its logits and the singular values of its first kernel with those before.
# 2. Did pressure choose well? Train only the gates of the 12 largest singular
#    values of each layer, 24 weights, and compare them with the gates that a
#    pressure of 0.03 kept.

# %% [markdown]
# ### Solution 1
# The singular values are $|S_i (1 + g_i)|$: a sign goes into the vectors.

# %% tags=["solution"]
logits = gated.predict(turned_test, batch_size=500, verbose=0)
kernel = keras.ops.convert_to_numpy(base.get_layer("hidden1").kernel)
values = np.linalg.svd(kernel, compute_uv=False)  # (64,)
values[:K] *= 1 + gates_of(gated, "hidden1")
ks.merge_model(gated)
difference = gated.predict(turned_test, batch_size=500, verbose=0) - logits
kernel = keras.ops.convert_to_numpy(gated.get_layer("hidden1").kernel)
found = np.linalg.svd(kernel, compute_uv=False)
assert np.abs(difference).max() < 1e-4 * np.abs(logits).max()
assert np.allclose(found, np.sort(np.abs(values))[::-1], atol=1e-4)
print(f"largest difference of a logit: {np.abs(difference).max():.0e}")

# %% [markdown]
# ### Solution 2
# About as good. At this number, the order of the singular values is no worse a
# choice than what pressure finds.

# %% tags=["solution"]
few = adapted("gated_spectral", directions=12, l1=0.0)
fit(few, 3e-2)
score = course.accuracy(few, turned_test, data.test_y)
assert course.count(few.trainable_weights) == 24
assert score < reached - 0.05
print(f"24 gates of the largest singular values: {score:.1%}")

# %% [markdown]
# ## Further reading
#
# - Han et al. 2023, SVDiff, arXiv 2303.11305: training singular values alone.
# - Zhang and Pilanci 2024, Spectral Adapter, arXiv 2405.13952: moves the
#   singular vectors as well.
# - Maddison et al. 2017, arXiv 1611.00712: gates of 0 and 1 with a gradient.
