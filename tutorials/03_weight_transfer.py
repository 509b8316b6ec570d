# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Weight transfer: decaying the original away
#
# LoRA leaves the original weights in place. What if they faded while the thin
# pair learned to do their work? When they are gone, the pair is the layer,
# and the network has become smaller while it trained. We repeat the founders'
# experiment with its failure and its late jump, and mend it.
#
# **You will learn**
#
# - how `DecayingLoRA` moves a layer's work into a low-rank pair;
# - why the pair of a plain LoRA learns nothing until it is almost too late,
#   and why starting it at zero is worse;
# - how a start from the kernel's own singular value decomposition mends it,
#   and how to take out the finished, smaller network.
#
# It takes about a minute on a laptop. The same code runs on JAX, TensorFlow
# and PyTorch: change `"jax"` below.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On steps this small PyTorch's threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
from keras import ops

import keras_spectral as ks
from keras_spectral import course

console = rich.console.Console(width=100)
keras.utils.set_random_seed(7)
data = course.images()
size = int(np.prod(data.x.shape[1:]))
x, test_x = (a.reshape(len(a), size) for a in (data.x, data.test_x))
test = (test_x, data.test_y)
print("backend:", keras.backend.backend())
print("data:", data.name)

# %% [markdown]
# ## The original
#
# Three Dense layers, trained as usual.

# %%
WIDTH, RANK = 128, 12
EPOCHS = 12 if course.FAST else 24
STEPS = -(-len(x) // 50)  # training steps of an epoch


def new_model():
    return keras.Sequential(
        [
            keras.Input((size,)),
            keras.layers.Dense(WIDTH, "relu", name="first"),
            keras.layers.Dense(WIDTH, "relu", name="second"),
            keras.layers.Dense(10, name="logits"),
        ]
    )


original = new_model()
course.train(original, x, data.y, 3e-3, 8 if course.FAST else 15)
before = course.accuracy(original, *test)
print(f"{original.count_params():,} weights, {before:.1%} right")
assert before > 0.7

# %% [markdown]
# ## The layer
#
# $$y = d(t)\,\bigl(x W\bigr) + \frac{\alpha}{r}\, x A B + b$$
#
# The factor $d$ falls from 1 to 0 between two training steps. The layer
# counts steps itself, in a variable, so that nothing in the training loop has
# to know. Here it falls linearly:

# %%
start, end = EPOCHS // 6, EPOCHS - EPOCHS // 6
layer = ks.DecayingLoRA(keras.layers.Dense(4), rank=2, end_step=4)
layer.build((None, 8))
factors = []
for _ in range(6):
    factors.append(layer.decay_factor())
    layer(ops.ones((1, 8)), training=True)
print("d after 0, 1, 2 ... steps:", factors)
assert factors == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

# %% [markdown]
# ## Three starts
#
# - `"zeros"`: $B = 0$, as in LoRA. At first the original does all the work
#   and the loss is small: no one needs the pair, and little moves it.
# - `"fan_in"`: both factors random, scaled by their inputs. That was the
#   founders' start.
# - `"svd"`: the kernel's own leading singular vectors,
#   $A_0 B_0 \approx W$. Only the rest, $W - A_0 B_0$, has to fade.
#
# `TransferMonitor` evaluates after every epoch the sum of original and pair,
# the pair alone, and the factor $d$.

# %%
histories, finished = {}, {}
for name in ("zeros", "fan_in", "svd"):
    keras.utils.set_random_seed(7)
    model = new_model()
    model.set_weights(original.get_weights())
    ks.wrap_model(
        model,
        "decaying_lora",
        ["first", "second", "logits"],
        rank=RANK,
        initializer=name,
        start_step=start * STEPS,
        end_step=end * STEPS,
        overrides={"logits": {"rank": 10}},
        seed=7,
    )
    histories[name] = course.train(
        model,
        x,
        data.y,
        1e-3,
        EPOCHS,
        callbacks=[ks.callbacks.TransferMonitor(test)],
    )
    ks.finalize_transfer(model)
    finished[name] = model
for name, history in histories.items():
    alone = history["val_adapter_accuracy"]
    print(
        f"{name:8} the pair alone: {alone[0]:.1%} after one epoch, "
        f"{alone[start]:.1%} when the decay has begun, {alone[-1]:.1%} at last"
    )

alone = {name: h["val_adapter_accuracy"] for name, h in histories.items()}
assert alone["fan_in"][start] < 0.5 < alone["fan_in"][-1]
assert alone["svd"][0] > alone["fan_in"][start] + 0.3
assert alone["svd"][-1] > before - 0.05
assert histories["svd"]["decay"][-1] == 0

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
for axis, (name, history) in zip(axes, histories.items()):
    ks.plots.plot_transfer(history, ax=axis)
    axis.set_title(f"start: {name}", fontsize=11)
for axis in axes[:-1]:
    axis.get_legend().remove()
figure.tight_layout()
course.show(figure, "03_weight_transfer")

# %% [markdown]
# In the middle is the founders' picture. While the original is there the pair
# alone is close to guessing, because nothing in the loss asks it to be
# anything by itself; original and pair together look fine. Only when little
# of the original is left does the pair have to stand on its own, and jumps.
# The training has to go on beyond that point, or the jump never comes.
#
# On the left the pair began at zero. The original's gradient reaches it as
# well, but it starts later still.
#
# On the right the pair is a good approximation from the first epoch on, and
# stays one. What fades is only what the rank could not hold.
#
# ## What is left
#
# `finalize_transfer` replaced every layer by a `LowRank` layer of its pair:
# two thin matrix products in place of one, and no original any more.

# %%
small = finished["svd"]
after = course.accuracy(small, *test)
print([type(layer).__name__ for layer in small.layers])
print(
    f"{original.count_params():,} -> {small.count_params():,} weights, "
    f"{before:.1%} -> {after:.1%} right"
)
hidden = RANK * (size + WIDTH) + WIDTH + RANK * (WIDTH + WIDTH) + WIDTH
logits = 10 * (WIDTH + 10) + 10
assert small.count_params() == hidden + logits
assert small.count_params() < 0.6 * original.count_params()
assert np.isclose(after, alone["svd"][-1], atol=1e-3)

# %% [markdown]
# The output layer has only ten columns, so a pair of rank 10 saves nothing
# there: it has more weights than the kernel. One would leave it out of
# `target`; it is here because the founders replaced all three.
#
# ## Exercises
#
# 1. Stop too early: finish with `end_step` beyond the end of the training.
#    What does `finalize_transfer` do, and what does the pair alone reach?
# 2. How good is the SVD start without any training? Truncate the two hidden
#    layers to rank 12 with `ks.compress_model` and compare.

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
model = new_model()
model.set_weights(original.get_weights())
ks.wrap_model(
    model, "decaying_lora", ["first", "second"], rank=RANK, end_step=100 * STEPS
)
course.train(model, x, data.y, 1e-3, 1)
try:
    ks.finalize_transfer(model)
except ValueError as error:
    message = str(error)
print(message)
assert "not faded" in message  # refused, and the model is as it was
with ks.adapters_alone(model):
    print(f"the pair alone: {course.accuracy(model, *test):.1%}")

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
ratio = 1 - RANK * (size + 3 * WIDTH) / (size * WIDTH + WIDTH * WIDTH)
truncated = ks.compress_model(
    original, ratio, method="uniform", exclude=["logits"]
)
untrained = course.accuracy(truncated, *test)
print(f"truncated, not trained: {untrained:.1%}, transferred: {after:.1%}")
assert untrained < after + 0.03

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685: the pair.
# - Meng et al. 2024, *PiSSA*, arXiv 2404.02948: a pair that starts from the
#   kernel's singular vectors.
# - Hinton et al. 2015, arXiv 1503.02531: another way from a large network to
#   a small one, by its outputs.
