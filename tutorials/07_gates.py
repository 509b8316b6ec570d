# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gates on singular values
#
# The singular values of a kernel say how strongly it passes on each direction
# of its input. A gate on each is the smallest adapter there is. First gates
# are trained like any weights, under pressure to stay shut. Then the input
# itself decides, so that two kinds of images run through different kernels.
#
# **You will learn**
#
# - what `GatedSpectralDense` computes, in `k` weights a layer;
# - what L1 pressure does to the number of gates in use and to accuracy;
# - how `ConditionalSpectralDense` opens gates for each example.
#
# About half a minute on a laptop. The backend is changed in one line.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table

import keras_spectral as ks
from keras_spectral import course

course.quiet()
plt.rcParams["figure.constrained_layout.use"] = True
console = rich.console.Console(width=90)
keras.utils.set_random_seed(7)
data = course.images()
print("backend:", keras.backend.backend())
print("data:", data.name)

# %% [markdown]
# ## A small network, and images it cannot read
#
# Two hidden Dense layers learn upright images. Then the images come turned by
# a quarter. The network has never seen that. Learning rates on this page were
# chosen by trial, on a part of the training images.

# %%
EPOCHS = 15 if course.FAST else 30
HIDDEN = ("hidden1", "hidden2")


def flat(x):
    return x.reshape(len(x), -1)  # (n, height * width)


def new_model():
    layers = [keras.Input((flat(data.x).shape[1],))]
    for name in HIDDEN:
        layers.append(keras.layers.Dense(64, activation="relu", name=name))
    return keras.Sequential([*layers, keras.layers.Dense(10, name="head")])


def fresh():
    model = new_model()
    model.set_weights(base.get_weights())
    return model


upright, upright_test = flat(data.x), flat(data.test_x)
turned = flat(np.rot90(data.x, axes=(1, 2)))
turned_test = flat(np.rot90(data.test_x, axes=(1, 2)))
y, test_y = data.y, data.test_y

base = new_model()
course.train(base, upright, y, 3e-3, EPOCHS)
base_upright = course.accuracy(base, upright_test, test_y)
base_turned = course.accuracy(base, turned_test, test_y)
print(f"upright: {base_upright:.1%}, turned: {base_turned:.1%}")
assert base_turned < base_upright / 2

# %% [markdown]
# ## One gate for each singular value
#
# A kernel is $K = U\,\mathrm{diag}(S)\,V^\top$, largest singular value first.
# `GatedSpectralDense` gives each of the first `k` directions a gate:
#
# $$S'_i = S_i\,(1 + g_i), \qquad
# y = x K + x\,U_k\,\mathrm{diag}(S_k\, g)\,V_k^\top + b .$$
#
# The gates start at 0, where nothing changes. $g_i > 0$ stretches a
# direction, $-1 < g_i < 0$ shrinks it, $g_i = -1$ takes it out, and less turns
# it round. Nothing else trains. With `l1` the sum $\lambda \sum_i |g_i|$ joins
# the loss: a gate must earn its place.
#
# `GateMonitor` counts, after each epoch, the gates with $|g_i| > 0.01$. Adam's
# steps have about the size of the learning rate, so a gate that ought to be
# zero keeps trembling. We let the rate fall to zero, and it comes to rest.

# %%
K = 48
pressures = (0, 1e-2, 1e-1) if course.FAST else (0, 3e-3, 1e-2, 3e-2, 1e-1)
steps = EPOCHS * -(-len(turned) // 50)  # batches of 50
falling = keras.optimizers.schedules.CosineDecay(3e-2, steps)
monitor = ks.callbacks.GateMonitor(threshold=0.01)


def gated_model(l1, k=K):
    options = {"directions": k, "l1": l1, "target": "hidden."}
    return ks.wrap_model(fresh(), "gated_spectral", trainable=(), **options)


runs = {}  # l1: (model, gates in use by epoch, accuracy, after pruning)
for l1 in pressures:
    model = gated_model(l1)
    assert course.count(model.trainable_weights) == 2 * K
    history = course.train(
        model, turned, y, falling, EPOCHS, callbacks=[monitor]
    )
    assert history["loss"][-1] < history["loss"][0]
    accuracy = course.accuracy(model, turned_test, test_y)
    kept = sum(model.get_layer(name).prune_gates(0.01) for name in HIDDEN)
    assert kept == history["active_gates"][-1]
    pruned = course.accuracy(model, turned_test, test_y)
    runs[l1] = (model, history["active_gates"], accuracy, pruned)

table = rich.table.Table(title=f"Gates on turned images, {2 * K} in all")
for heading in ("l1", "gates kept", "accuracy", "after pruning"):
    table.add_column(heading, justify="right")
table.add_row("base", "0", f"{base_turned:.1%}", "")
for l1, (_, active, *accuracies) in runs.items():
    cells = [f"{accuracy:.1%}" for accuracy in accuracies]
    table.add_row(f"{l1:g}", str(active[-1]), *cells)
console.print(table)

kept = [active[-1] for _, active, _, _ in runs.values()]
assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 2
assert runs[0][2] > max(base_turned + 0.2, runs[1e-1][2] + 0.03)
for _, _, accuracy, pruned in runs.values():
    assert abs(accuracy - pruned) < 0.03

# %% [markdown]
# With more pressure fewer gates stay, and accuracy pays. `prune_gates` sets the
# small ones to exactly zero, which changes next to nothing.

# %%
BLUE, RED, GREY = "#2563eb", "#dc2626", "#9ca3af"
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
for l1, (_, active, _, _) in runs.items():
    left.plot(range(1, EPOCHS + 1), active, label=f"l1 = {l1:g}")
left.set(title="Gates in use while training", xlabel="epoch")
left.set(ylabel=f"gates of {2 * K} with |g| > 0.01", ylim=(0, 2.6 * K))
left.legend(frameon=False, fontsize=9, ncols=3, loc="upper right")
for l1, color, width in ((0, GREY, 0.9), (1e-2, BLUE, 0.5)):
    gates = keras.ops.convert_to_numpy(runs[l1][0].get_layer("hidden1").gates)
    right.bar(range(K), gates, width, color=color, label=f"l1 = {l1:g}")
right.axhline(0, color="black", lw=0.8)
right.set(title="The gates of hidden1", ylabel="gate g")
right.set(xlabel="direction, largest singular value first")
right.legend(frameon=False, fontsize=9)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "07_gates")
assert np.flatnonzero(gates).mean() < (K - 1) / 2

# %% [markdown]
# On the right, pressure closes most gates of the small singular values first.
# A direction that carries little signal has to change a lot to matter, and a
# large change is dear. A gated kernel is an ordinary kernel with other
# singular values: `merge_model` makes it one.
#
# ## Gates that look at the input
#
# Now upright and turned images come mixed. One set of gates has to serve both,
# and what helps the one harms the other. `ConditionalSpectralDense` chooses
# gates for each example. From the codes $z = x\,U$ of an example and a learned
# vector $e$ of the layer, a small network makes a logit for each direction. The
# gate is open (1) where the logit is positive, else shut (0):
#
# $$y = x K + \alpha\, x\,U\,\mathrm{diag}(S\, g(x))\,V^\top + b,
# \qquad g(x) = [\mathrm{MLP}(z, e) > 0] .$$
#
# With $\alpha = -1$ an open gate takes its direction out of the kernel. While
# training, noise on the logits opens and shuts gates at random, and the
# gradient passes as if the gate were a sigmoid. `l0` times the expected number
# of open gates joins the loss. One network serves all layers.

# %%
R = 16
mixed, mixed_y = np.concatenate([upright, turned]), np.concatenate([y, y])
options = {"rank": R, "alpha": -1.0, "l0": 1e-2, "seed": 7}
conditional = ks.wrap_model(
    fresh(), "conditional_spectral", "hidden.", trainable=(), **options
)
hyper = (R + 8) * 32 + 32 + 32 * R + R  # [z, e] to 32, to R logits
assert course.count(conditional.trainable_weights) == hyper + 2 * 8
course.train(conditional, mixed, mixed_y, 1e-2, EPOCHS)

fixed = gated_model(l1=0.0, k=R)
course.train(fixed, mixed, mixed_y, 3e-2, EPOCHS)


def shares(x):
    """The share of the examples that open each gate, layer by layer."""
    for name in HIDDEN:
        conditional.get_layer(name).reset_gates()
    conditional.predict(x, batch_size=500, verbose=0)
    return [
        keras.ops.convert_to_numpy(conditional.get_layer(name).mean_gates())
        for name in HIDDEN
    ]  # two of (R,)


kinds = {"upright": upright_test, "turned": turned_test}
opened = {kind: shares(x) for kind, x in kinds.items()}
table = rich.table.Table(title="One model for upright and turned images")
for heading in ("images", "base", "fixed gates", "gates by input", "open"):
    table.add_column(heading, justify="right")
result = {}
for kind, x in kinds.items():
    models = (base, fixed, conditional)
    result[kind] = [course.accuracy(model, x, test_y) for model in models]
    count = sum(map(np.sum, opened[kind]))
    cells = [f"{accuracy:.1%}" for accuracy in result[kind]]
    table.add_row(kind, *cells, f"{count:.1f} of {2 * R}")
console.print(table)

for before, fixed_gates, by_input in result.values():
    assert by_input > max(fixed_gates + 0.05, before - 0.15)
assert np.sum(opened["turned"]) > np.sum(opened["upright"]) + 2
assert np.abs(np.subtract(opened["upright"], opened["turned"])).max() > 0.3

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
places = np.arange(R)
for layer, axis in enumerate(axes):
    for side, (kind, color) in enumerate((("upright", GREY), ("turned", RED))):
        heights = 100 * opened[kind][layer]
        axis.bar(places + 0.4 * side, heights, 0.4, color=color, label=kind)
    axis.set(title=f"Open gates of {HIDDEN[layer]}", ylim=(0, 110))
    axis.set(xlabel="direction, largest singular value first")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set(ylabel="examples that open it in %")
axes[0].legend(frameon=False, ncols=2, loc="upper left", fontsize=9)
course.show(figure, "07_gates_2")

# %% [markdown]
# No one told the model which images were turned, yet they open more gates than
# upright ones. What disturbs them is taken out for them, and upright images
# mostly keep their kernel. Fixed gates are a compromise and lose on both kinds.
#
# The price: each example has a kernel of its own, so nothing can be merged.
# `freeze_gates` fixes a gate at the share of given examples that open it.
#
# ## Exercises
#
# 1. Do images of class 0 and of class 1, all turned, open the same gates?
# 2. Freeze the gates on turned images and merge. Does one average kernel keep
#    what a kernel for each image had gained?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
by_class = [shares(turned_test[test_y == label]) for label in (0, 1)]
distance = np.abs(np.subtract(*by_class))  # (2, R)
for name, row in zip(HIDDEN, distance, strict=True):
    print(f"{name}: largest difference at {row.argmax()}, {row.max():.0%}")
assert distance.max() > 0.2

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
ks.freeze_gates(conditional, turned)
before = conditional.predict(turned_test, batch_size=500, verbose=0)
ks.merge_model(conditional)
after = conditional.predict(turned_test, batch_size=500, verbose=0)
assert np.allclose(before, after, atol=1e-4 * np.abs(before).max())
assert course.count(conditional.weights) == course.count(base.weights)
plain_turned = course.accuracy(conditional, turned_test, test_y)
print(f"turned: gates by input {by_input:.1%}, merged {plain_turned:.1%}")
assert plain_turned < by_input - 0.05  # the gain is gone

# %% [markdown]
# ## Further reading
#
# - *SVDiff*, arXiv 2303.11305: fine-tuning singular values alone.
# - *Spectral Adapter*, arXiv 2405.13952: moves the singular vectors as well.
