# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convolutions: two kinds of ConvLoRA, and which layers to tune
#
# A trained ResNet gets images that it was not trained for: the input has
# changed, the task has not. Two questions follow. How does a convolution get
# an update of low rank? And does every layer need one, or only the layers
# that the change went through?
#
# **You will learn**
#
# - what ConvLoRA's two factorisations compute, and what each costs;
# - how to train one block and freeze the rest (surgical fine-tuning);
# - why corrupted inputs ask for early layers, and changed labels for late
#   ones, and whether gradients tell before the training.
#
# About a minute on a laptop. The backend is changed in one line.

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
console = rich.console.Console(width=90)
keras.utils.set_random_seed(7)
print("backend:", keras.backend.backend())

# %% [markdown]
# ## A trained model and a corrupted input
#
# The model is a small residual network: a first convolution (the *stem*),
# three stages of residual blocks with 16, 32 and 64 channels, and a linear
# head. The corruption turns dark into bright and bright into dark, as in a
# photographic negative. Of the negatives we use 200 with their labels.

# %%
base, data, _ = course.vision(test=400)
print("data:", data.name)
FEW = 200
low, high = float(data.x.min()), float(data.x.max())
corrupted = data._replace(
    x=low + high - data.x, test_x=low + high - data.test_x
)
clean_accuracy = course.accuracy(base, data.test_x, data.test_y)
before = course.accuracy(base, corrupted.test_x, data.test_y)
print(f"accuracy: clean {clean_accuracy:.1%}, corrupted {before:.1%}")
assert before < 0.75 * clean_accuracy

# %% [markdown]
# One helper trains a model on several shifts, each time from the same start.
# It compiles once, and puts the first values of weights and optimizer state
# back. The learning rates were chosen by trial on spare training images.


# %%
def fresh():
    model = keras.models.clone_model(base)
    model.set_weights(base.get_weights())
    return model


def adapt(model, shifts, learning_rate=1e-2):
    """Returns the test accuracy on each shift, and the last run's losses."""
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    start = model.get_weights()
    state = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
    accuracies = []
    for new in shifts:
        model.set_weights(start)
        for variable, value in zip(optimizer.variables, state, strict=True):
            variable.assign(value)
        x, y = new.x[:FEW], new.y[:FEW]
        history = model.fit(x, y, batch_size=50, epochs=8, verbose=0).history
        accuracies.append(course.accuracy(model, new.test_x, new.test_y))
    return accuracies, history["loss"]


# %% [markdown]
# ## Two factorisations
#
# A convolution with a `k x k` kernel takes `c_in` channels to `c_out`. At
# each pixel it multiplies a patch of $k^2 c_{in}$ numbers by a matrix with
# $c_{out}$ columns. ConvLoRA adds a kernel $\Delta$ of few weights:
#
# $$y = \mathrm{base}(x) + \frac{\alpha}{r}\, \Delta * x$$
#
# - `"channel"` factors that patch matrix, $\Delta = A B$. $A$ is a `k x k`
#   convolution to `r` channels, $B$ a `1 x 1` to `c_out`:
#   $r\,(k^2 c_{in} + c_{out})$ weights. The two run one after the other.
# - `"loralib"` comes from the code that was published with LoRA. $A$ is
#   `r k x c_in k`, $B$ is `c_out k x r k`, and the product $BA$ is read row
#   by row as a kernel `(c_out, c_in, k, k)`: $r\,k^2 (c_{in} + c_{out})$
#   weights. The layer runs one convolution with the summed kernel.
#
# In `"loralib"` the rank cannot exceed the channels, and an image has few of
# them: `overrides` gives the stem rank 1. `trainable=()` keeps the head
# frozen, so that adapters are all that trains.

# %%
RANK = 4
shapes = [  # (k, k, c_in, c_out) of each convolution
    layer.kernel.shape
    for layer in base.layers
    if isinstance(layer, keras.layers.Conv2D)
]
image_channels = data.x.shape[-1]
assert shapes[0] == (3, 3, image_channels, 16)
expected = {
    "channel": sum(RANK * (k * k * i + o) for k, _, i, o in shapes),
    "loralib": sum(RANK * k * k * (i + o) for k, _, i, o in shapes[1:])
    + 1 * 3 * 3 * (image_channels + 16),
}
options = {"channel": {}, "loralib": {"overrides": {"conv1": {"rank": 1}}}}
table = rich.table.Table(title=f"ConvLoRA of rank {RANK} on every convolution")
for heading in "kind,trainable,share,before,after,merge error".split(","):
    table.add_column(heading, justify="right")
adapted = {}
for name, chosen in options.items():
    model = adapted[name] = fresh()
    chosen |= {"factorization": name, "rank": RANK, "seed": 7}
    ks.wrap_model(model, "conv_lora", target="conv", trainable=(), **chosen)
    trained = course.count(model.trainable_weights)
    assert trained == expected[name]
    (accuracy,), losses = adapt(model, [corrupted])
    assert losses[-1] < 0.7 * losses[0] and accuracy > before + 0.05
    logits = model.predict(corrupted.test_x, batch_size=500, verbose=0)
    ks.merge_model(model)
    merged = model.predict(corrupted.test_x, batch_size=500, verbose=0)
    error = np.abs(merged - logits).max() / np.abs(logits).max()
    assert error < 1e-4
    share = trained / course.count(base.weights)
    cells = (f"{p:.1%}" for p in (share, before, accuracy))
    table.add_row(name, f"{trained:,}", *cells, f"{error:.0e}")
console.print(table)

# %% [markdown]
# *Before* and *after* are accuracies on corrupted images. The weights agree
# with the formulas. The *merge error* is the largest difference of a logit,
# relative to the largest logit: float32 rounding. Merged, both run for free.
#
# The merged kernel less the base's is what was learned. What rank has it as a
# patch matrix `(k k c_in, c_out)`?

# %%
name = "layer3_0_conv2"
kernel = base.get_layer(name).get_weights()[0]  # (3, 3, 64, 64)
for factorization, model in adapted.items():
    delta = model.get_layer(name).get_weights()[0] - kernel
    values = np.linalg.svd(delta.reshape(-1, 64), compute_uv=False)  # (64,)
    rank = int((values > 1e-3 * values[0]).sum())
    print(f"{factorization}: rank {rank} of 64")
    assert rank == RANK if factorization == "channel" else rank > RANK

# %% [markdown]
# `"channel"` keeps to its rank. `"loralib"` exceeds it, because the view row
# by row mixes space with channels. It pays with more weights and with a full
# convolution at every training step.
#
# ## Surgical fine-tuning
#
# Lee et al. train one contiguous block of the network and freeze the rest.
# Which block is best depends on where the change happened. We try two changes:
#
# - **input shift**: the corrupted images with the old labels;
# - **output shift**: clean images, labels renumbered: $y \to (y + 1) \bmod 10$.
#
# The names of the layers begin with their stage, so `trainable` flags are
# enough. A frozen batch normalisation uses its stored mean and variance; one
# that trains measures them anew. At last the early block again with ConvLoRA:
# `trainable` names what trains beside adapters, here its normalisations.

# %%
blocks = {  # name: what the names of its layers begin with
    "stem, stage 1": ("conv1", "bn1", "layer1"),
    "stage 2": ("layer2",),
    "stage 3": ("layer3",),
    "head": ("linear",),
}
if course.FAST:
    del blocks["stage 2"]
renumbered = data._replace(y=(data.y + 1) % 10, test_y=(data.test_y + 1) % 10)
shifts = {"input shift": corrupted, "output shift": renumbered}
models = {}
for block, prefixes in blocks.items():
    model = models[block] = fresh()
    for layer in model.layers:
        layer.trainable = layer.name.startswith(prefixes)
model = models["ConvLoRA on\nstem, stage 1"] = fresh()
convs, norms = r"conv1|layer1_.*conv.", r"bn1|layer1_.*bn."
ks.wrap_model(
    model, "conv_lora", target=convs, trainable=norms, rank=RANK, seed=7
)

sizes, scores = {}, {}  # weights; accuracies on the two shifts
for block, model in models.items():
    sizes[block] = course.count(model.trainable_weights)
    rate = 5e-2 if block == "head" else 1e-2  # few weights, large steps
    scores[block], _ = adapt(model, shifts.values(), rate)

early, slim = "stem, stage 1", "ConvLoRA on\nstem, stage 1"
assert scores[early][0] > scores["head"][0] + 0.03
assert scores["head"][1] > scores[early][1] + 0.03
assert scores[slim][0] > before + 0.05
assert sizes[slim] < sizes[early] / 2
assert sizes[early] < sizes["stage 3"] / 5

# %%
figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
places = np.arange(len(models))
for side, (shift, color) in enumerate(zip(shifts, ("#2563eb", "#ea580c"))):
    heights = [100 * scores[block][side] for block in models]
    bars = axis.bar(
        places + 0.4 * side, heights, 0.38, color=color, label=shift
    )
    axis.bar_label(bars, fmt="%.0f", fontsize=9, padding=1)
axis.set_xticks(places + 0.2, [f"{b}\n{sizes[b]:,} weights" for b in models])
axis.tick_params(axis="x", labelsize=9)
axis.set(title="What one trained block mends", ylabel="accuracy in %")
axis.set(xlabel="the only trained block", ylim=(0, 120))
axis.legend(frameon=False, ncols=3, loc="upper center")
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "05_convolutions")

# %% [markdown]
# Under the **input shift** the early block beats the head: the features that
# reach the head are already wrong. An early block can turn the image back into
# what the later layers expect. Under the **output shift** the features are
# right and only their names have changed: the head mends that. An early block
# would have to make one class look like another. It has few channels and so
# few weights; ConvLoRA on it has fewer still, and less freedom.

# %% [markdown]
# ## Could we have known?
#
# The authors also propose a rule that looks before training: prefer layers
# whose gradient is large beside their weights, $|g| / |w|$. `ks.choose_layers`
# computes it. If the rule knew what the picture shows, it would put the stem
# first for one shift and the head for the other.

# %%
probe = fresh()
probe.compile(
    "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
)
table = rich.table.Table(title="Relative gradient norms")
for heading in ("data", "conv1", "layer1", "layer2", "layer3", "linear"):
    table.add_column(heading, justify="right")
asked = {"clean": data, **shifts}
for shift, given in asked.items():
    few = given.x[:FEW], given.y[:FEW]
    found = ks.choose_layers(
        probe, few, groups=r"conv1$|layer\d|linear", batch_size=50
    )
    names = ("conv1", "layer1", "layer2", "layer3", "linear")
    table.add_row(shift, *(f"{found[name]:.3f}" for name in names))
    asked[shift] = found
console.print(table)
assert min(asked["input shift"].values()) > asked["clean"]["linear"]
assert next(iter(asked["output shift"])) != "linear"

# %% [markdown]
# It does not, here. Every score is far above that on clean images: the rule
# sees that something has shifted. But the order is nearly the same for both
# shifts, and the head is last or next to last even where only the head is
# wrong. Layers with small weights have large relative gradients, whatever the
# shift. Where a few labels are at hand, as here, trying each block says more.
#
# ## Exercises
#
# 1. How many weights has `"channel"` of rank 2 on stage 1 alone?
# 2. Which ranks does `"loralib"` accept at the stem?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
model = fresh()
ks.wrap_model(model, "conv_lora", target=r"layer1_.*conv.", rank=2)
summary = ks.adapter_summary(model, console)
assert summary.trainable == len(summary.rows) * 2 * (3 * 3 * 16 + 16)

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
stem = {"target": "conv1", "factorization": "loralib"}
ks.wrap_model(fresh(), "conv_lora", rank=image_channels, **stem)
message = ""
try:
    ks.wrap_model(fresh(), "conv_lora", rank=image_channels + 1, **stem)
except ValueError as error:
    message = str(error)
print(message)
assert f"at most {image_channels}" in message

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685. The `"loralib"` convolution is
#   in its repository rather than in the paper.
# - Lee et al. 2022, *Surgical fine-tuning*, arXiv 2210.11466: which block to
#   train for which kind of shift.
# - Liebenwein et al. 2021, *ALDS*, arXiv 2107.11442: convolutions of low rank
#   for compression instead of adaptation.
