# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Weight transfer: let the original fade and a thin pair take over
#
# We train a network a second time, and meanwhile multiply its kernels by a
# factor that falls to zero. Beside each kernel trains a pair of thin matrices.
# At the end the kernels are gone, and a quarter of the weights reads digits
# about as well as all of them did. What is hard about it: as long as the
# kernel does the work, nothing asks the pair to do it.

# %% [markdown]
# What you see: a hidden layer in three moments of that training. The kernel
# $W$, left in each frame, fades; the pair $A$, $B$ stays, and has a fifth of
# its weights. Below, how many digits are right if the pairs work *alone*, for
# three ways to start them. One is good from the first epoch on. The others
# do not leave chance before a good part of the kernels has faded, and then
# rise steeply.
#
# **You will learn**
#
# - how `DecayingLoRA` moves a layer's work into a low-rank pair;
# - why a random pair learns so late, and what a start from the kernel's
#   singular vectors changes;
# - to take out the finished, smaller network with `finalize_transfer`;
# - whether all this is better than to cut the network first and train then.
#
# You need the digits of scikit-learn, about a minute, and what
# [the page on LoRA by hand](02_lora_by_hand.ipynb) tells about pairs.

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
size = int(np.prod(data.x.shape[1:]))
x, test_x = (a.reshape(len(a), size) for a in (data.x, data.test_x))
test = (test_x, data.test_y)
print("backend:", keras.backend.backend())
print("data:", data.name)

# %% [markdown]
# All outputs below are of the backend that is printed here, and of one seed.
#
# ## The original
#
# We train three Dense layers as usual. Two of them will be replaced. The
# third has ten columns only: a pair of rank 10 has more weights than its
# kernel, so it stays.

# %%
WIDTH, RANK = 128, 12
HIDDEN = ["first", "second"]


def new_model():
    return keras.Sequential(
        [
            keras.Input((size,)),
            keras.layers.Dense(WIDTH, "relu", name="first"),
            keras.layers.Dense(WIDTH, "relu", name="second"),
            keras.layers.Dense(10, name="logits"),
        ]
    )


BEFORE = 8 if course.FAST else 15  # epochs
original = new_model()
course.train(original, x, data.y, 3e-3, BEFORE)
whole = course.accuracy(original, *test)
print(f"{original.count_params():,} weights, {whole:.1%} right, chance 10 %")

# %% [markdown]
# ## A layer that fades
#
# `DecayingLoRA` puts a factor $d$ before the kernel $W$ and adds a pair:
#
# $$y = d\, x W + x A B + b$$
#
# In training $d$ falls from 1 to 0 between the steps `start_step` and
# `end_step`. The layer counts its steps itself, so that your training loop
# need not know. $W$ is frozen; only $A$ and $B$ train.

# %%
layer = ks.DecayingLoRA(keras.layers.Dense(4), rank=2, end_step=4)
layer.build((None, 8))
factors = []
for _ in range(6):
    factors.append(layer.decay_factor())
    layer(np.ones((1, 8), "float32"), training=True)
print("d in the first six steps:", factors)

# %% [markdown]
# ## Three starts
#
# - `"zeros"`: $B = 0$, as in LoRA, so that the training starts exactly from
#   the original.
# - `"fan_in"`: both matrices random, scaled by the number of their inputs.
# - `"svd"`: the 12 leading singular vectors of the kernel, $A_0 B_0 \approx
#   W$. Then only the rest $W - A_0 B_0$ has to fade.
#
# Each training has a quiet part, in which $d$ is 1, the decay, and a part in
# which the pairs are alone. `TransferMonitor` measures after every epoch the
# accuracy of all together and of the pairs alone. For the picture we keep
# what the layer `second` looks like meanwhile.
#
# Guess before you look: which start will be best halfway?

# %%
EPOCHS = 12 if course.FAST else 24
START, END = EPOCHS // 6, EPOCHS - EPOCHS // 6  # epochs of the decay
STEPS = -(-len(x) // 50)  # training steps of an epoch


def transfer(start, end_epoch=END):
    keras.utils.set_random_seed(7)
    model = new_model()
    model.set_weights(original.get_weights())
    ks.wrap_model(
        model,
        "decaying_lora",
        HIDDEN,
        rank=RANK,
        initializer=start,
        start_step=START * STEPS,
        end_step=end_epoch * STEPS,
        seed=7,
    )
    frames, layer = [], model.get_layer("second")

    def keep(epoch, logs):
        pair = [keras.ops.convert_to_numpy(w) for w in layer.pair.factors()]
        frames.append((layer.decay_factor(), *pair))

    callbacks = [
        ks.callbacks.TransferMonitor(test),
        keras.callbacks.LambdaCallback(on_epoch_end=keep),
    ]
    history = course.train(model, x, data.y, 1e-3, EPOCHS, callbacks=callbacks)
    return model, history, frames


# %%
runs = {start: transfer(start) for start in ("zeros", "fan_in", "svd")}
early, half = (3 * START + END) // 4 - 1, (START + END) // 2 - 1
course.table(
    "Accuracy of the pairs alone",
    ("start", "epoch 1", "d = 0.75", "d = 0.5", "last epoch"),
    [
        (start, *(f"{history['val_adapter_accuracy'][i]:.1%}" for i in at))
        for at in [(0, early, half, -1)]
        for start, (_, history, _) in runs.items()
    ],
)

# %% tags=["plot"]
COLORS = {"zeros": "#9ca3af", "fan_in": "#dc2626", "svd": "#2563eb"}
NAMES = {"zeros": "zero", "fan_in": "random", "svd": "singular vectors"}


def draw_frame(axis, kernel, frame, title):
    """A kernel times its factor, and its pair, to scale."""
    decay, a, b = frame
    rows = len(kernel)
    limit, gap = np.quantile(np.abs(kernel), 0.98), 14
    left = 0
    parts = (("d W", decay * kernel), ("A", a), ("B", b))
    for name, matrix in parts:
        height, width = matrix.shape
        place = (left, left + width, height, 0)
        axis.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit, extent=place)
        edge = plt.Rectangle(
            (left, 0), width, height, fill=False, ec="#6b7280", lw=0.7
        )
        axis.add_patch(edge)
        middle = left + width / 2
        axis.text(middle, height + 4, name, ha="center", va="top", fontsize=11)
        left += width + gap
    axis.set(xlim=(-2, left - gap + 2), ylim=(rows + 20, -2))
    axis.axis("off")
    axis.set_title(title, fontsize=11)


def draw_transfer():
    figure = plt.figure(figsize=(10.5, 6.1), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.5))
    kernel = original.get_layer("second").get_weights()[0]
    _, history, frames = runs["fan_in"]
    alone = history["val_adapter_accuracy"]
    together = history["val_accuracy"]
    moments = (0, half, EPOCHS - 1)
    for column, i in enumerate(moments):
        title = f"epoch {i + 1}, d = {frames[i][0]:.1f}\n"
        title += f"together {together[i]:.0%}, pairs alone {alone[i]:.0%}"
        axis = figure.add_subplot(grid[0, column])
        draw_frame(axis, kernel, frames[i], title)
    axis = figure.add_subplot(grid[1, :])
    epochs = np.arange(1, EPOCHS + 1)
    for height, name in ((100 * whole, "original"), (10, "chance")):
        axis.plot([0.6, EPOCHS + 0.1], [height, height], "k--", lw=1)
        axis.text(EPOCHS + 0.3, height, name, va="center", fontsize=10)
    axis.fill_between(
        epochs, 100 * np.array(history["decay"]), color="#e5e7eb", zorder=0
    )
    axis.text(START + 1, 52, "factor d of the kernels, in %", color="#6b7280")
    for start, (_, history, _) in runs.items():
        axis.plot(
            epochs,
            100 * np.array(history["val_adapter_accuracy"]),
            "o-",
            ms=3.5,
            c=COLORS[start],
            label=f"start: {NAMES[start]}",
        )
    for i in moments:
        axis.plot(i + 1, 100 * alone[i], "o", ms=9, mfc="none", c="#dc2626")
    axis.set(xlabel="epoch", ylabel="pairs alone: % right", ylim=(0, 104))
    axis.set(xlim=(0.6, EPOCHS * 1.09), xticks=epochs[1::2])
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.78))
    axis.spines[["top", "right"]].set_visible(False)
    course.show(figure, "03_weight_transfer")


# %% tags=["picture"] alt="Three frames of a layer with a random start: the 128 x 128 kernel fades from full colour to nothing, while the pair, 128 x 12 and 12 x 128, stays. Together they are right throughout, the pairs alone only at the end. Below, the accuracy of the pairs alone over epochs: with singular vectors it is high from the first epoch on; with a random or zero start it stays at chance while the first third of the kernels fades, and then rises steeply."
draw_transfer()

# %% [markdown]
# The rings mark the three frames above, which are of the random start. Look
# at the middle frame: half of the kernel is gone, kernel and pair together
# still read nearly every digit, and the pairs alone miss most of them. $A$ is
# still pale there. It gets its colour in the second half.
#
# ## Why so late?
#
# The loss is one of the *sum* $d\, x W + x A B$, and very different pairs
# give sums that are right. We can see in the training loss how much there is
# to gain:

# %% tags=["plot"] alt="Training loss over epochs. With a zero and with a random start it is near zero before the decay, climbs while the kernels fade, is highest in the second half of the decay, and falls after it. With singular vectors it stays low and flat."
figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
for start, (_, history, _) in runs.items():
    axis.plot(
        np.arange(1, EPOCHS + 1),
        history["loss"],
        "o-",
        ms=3.5,
        c=COLORS[start],
        label=f"start: {NAMES[start]}",
    )
axis.axvspan(START + 0.5, END + 0.5, color="#f3f4f6", zorder=0)
axis.text(START + 0.7, axis.get_ylim()[1] * 0.92, "the kernels fade")
axis.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "03_loss")

# %% [markdown]
# As long as $d$ is near 1 there is next to no loss, so next to nothing to
# learn. Then the loss climbs, for a reason that does not show in the digits:
# a faded kernel still points to the right one, only with less certainty. That
# loss is what pushes the pairs, and while it climbs, the pairs alone leave
# chance. They rise steeply because all have to become right together: the
# second pair has never met the features that the first makes alone. The loss
# falls again only when the decay is over, so train for some epochs after it.
# Exercise 2 measures what they are worth.
#
# The singular vectors avoid the problem: their pairs do most of the work
# from the beginning, and what fades is only what rank 12 cannot hold.
#
# ## What is left
#
# `finalize_transfer` replaces each layer by a `LowRank` layer of its pair,
# two thin products in the place of one. It refuses to as long as an original
# has not faded.

# %%
for model, _, _ in runs.values():
    ks.finalize_transfer(model)
small = runs["svd"][0]
for layer in small.layers:
    shapes = " and ".join(str(w.shape) for w in layer.trainable_weights)
    print(f"{layer.name:7} {type(layer).__name__:8} {shapes}")
print(f"{original.count_params():,} -> {small.count_params():,} weights")

# %% [markdown]
# ## Is it worth the trouble?
#
# There are two simpler ways to as small a network. `compress_model` cuts the
# kernels at once, by their singular values, and the cut network trains for as
# many epochs. Or a thin network trains from scratch, for all the epochs that
# the others had.

# %%
ratio = 1 - RANK * (size + 3 * WIDTH) / (size * WIDTH + WIDTH * WIDTH)
options = {"method": "uniform", "exclude": "logits"}
cut = ks.compress_model(original, ratio, **options)
found = {"original": (original, whole)}
found["cut, not trained"] = (cut, course.accuracy(cut, *test))
keras.utils.set_random_seed(7)
scratch = keras.models.clone_model(cut)  # the same layers, random weights
course.train(scratch, x, data.y, 3e-3, BEFORE + EPOCHS)
found["thin from scratch"] = (scratch, course.accuracy(scratch, *test))
course.train(cut, x, data.y, 1e-3, EPOCHS)
found["cut, then trained"] = (cut, course.accuracy(cut, *test))
for start, (model, _, _) in runs.items():
    name = f"transfer, start: {NAMES[start]}"
    found[name] = (model, course.accuracy(model, *test))

# %%
error = np.sqrt(whole * (1 - whole) / len(test_x))
course.table(
    f"Test accuracy; one standard error is {error:.1%}",
    ("way", "weights", "right"),
    [
        (name, f"{model.count_params():,}", f"{right:.1%}")
        for name, (model, right) in found.items()
    ],
)

# %% [markdown]
# The cut alone costs some points, and the training wins them back. Differences
# of one or two standard errors are ties, and this is one seed. So weight
# transfer is no way to a *better* small network here: to cut first and train
# then is as good as the best of the three starts, and simpler. Transfer is
# for a model that must not get worse on the way, since with singular vectors
# it starts as the original exactly. And it shows that a low loss does not
# tell which part of a network does the work.
#
# ## Checks

# %% tags=["checks"]
alone = {s: h["val_adapter_accuracy"] for s, (_, h, _) in runs.items()}
thin = RANK * (size + WIDTH) + WIDTH + RANK * (WIDTH + WIDTH) + WIDTH
assert factors == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
assert whole > 0.9
assert small.count_params() == thin + WIDTH * 10 + 10
assert small.count_params() < 0.35 * original.count_params()
assert cut.count_params() <= small.count_params()
assert scratch.count_params() == cut.count_params()
for start in ("zeros", "fan_in"):
    assert alone[start][early] < 0.5 < 0.75 < alone[start][-1]
    assert alone["svd"][early] > alone[start][early] + 0.3
assert runs["fan_in"][1]["val_accuracy"][half] > 0.85
assert runs["svd"][1]["decay"][-1] == 0
after = found["transfer, start: singular vectors"][1]
assert after > whole - 0.05
assert np.isclose(after, alone["svd"][-1], atol=5e-3)
assert found["cut, not trained"][1] < found["cut, then trained"][1]
assert abs(found["cut, then trained"][1] - after) < 0.05

# %% [markdown]
# ## Exercises
#
# 1. Stop too early: finish one epoch into a decay that takes 100. What does
#    `finalize_transfer` do, and what do the pairs alone reach?
# 2. Let the decay of the random start end with the last epoch, so that the
#    pairs never train alone. What is the finished network worth?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
model = new_model()
model.set_weights(original.get_weights())
ks.wrap_model(
    model, "decaying_lora", HIDDEN, rank=RANK, end_step=100 * STEPS, seed=7
)
course.train(model, x, data.y, 1e-3, 1)
try:
    ks.finalize_transfer(model)
except ValueError as refused:
    message = str(refused)
print(message)
assert "not faded" in message  # it refuses, and the model is as it was
with ks.adapters_alone(model):
    print(f"the pairs alone: {course.accuracy(model, *test):.1%}")

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
_, history, _ = transfer("fan_in", EPOCHS)
late = history["val_adapter_accuracy"][-1]
print(f"no training alone: {late:.1%}, with it: {alone['fan_in'][-1]:.1%}")
assert late < alone["fan_in"][-1] + 0.02

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685: the pair.
# - Meng et al. 2024, *PiSSA*, arXiv 2404.02948: a pair that starts from the
#   kernel's singular vectors.
# - Hinton et al. 2015, arXiv 1503.02531: another way from a large network to
#   a small one, by its outputs.
