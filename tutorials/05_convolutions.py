# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Convolutions: where to adapt, and in which form
#
# A network that reads 99 % of digits reads 1 % of their negatives. A thin
# update of its first stage, 4 % as many weights as the network has, brings it
# to 93 % from 200 labelled images; a new head stops at 80 %. The hard part is
# to know *where* to put the update: for another kind of change the head is
# best, and the same number of weights in the last stage stays at chance.

# %% [markdown]
# **What you see:** above, one photograph in four states, each with what
# EfficientNet-Lite0 takes it for. Some shifts of the input a trained network
# bears, others it does not. Below, a small ResNet gets a shift of its input
# (blue) or of its labels (orange), and trains one part only on 200 images.
# The numbers under the bars are the weights that train; dots are the draws of
# the 200 images, the dotted line is chance.
#
# **You will learn**
#
# - how a convolution gets an update of low rank, in two forms, and what each
#   costs;
# - how to adapt one stage and freeze the rest (surgical fine-tuning);
# - which place suits which shift, **at the same budget**, beside training the
#   head only and training everything.
#
# You need scikit-learn's digits and photographs and the Lite0 archive that
# `make demo` fetches; about three minutes on two CPU cores. All outputs are
# of the backend that the next cell prints.

# %%
import itertools
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
import scipy.ndimage

import keras_spectral as ks
from keras_spectral import course

course.quiet()
keras.utils.set_random_seed(7)
base, data, _ = course.vision(test=400)
print(f"{data.name}, on {keras.backend.backend()}")

# %% [markdown]
# ## What a shift does to a trained network
#
# Lite0 learned 1,000 classes from ImageNet. We give it a photograph (pixels
# from -1 to 1), its negative, and the same photograph with blur and with
# noise. **Guess** which of the three it bears.

# %%
flower = course.photo("flower")  # (224, 224, 3)
noise = np.random.default_rng(0).normal(0, 0.5, flower.shape)
views = {
    "clean": flower,
    "negative": -flower,
    "blurred": scipy.ndimage.gaussian_filter(flower, (2, 2, 0)),
    "noisy": (flower + noise).clip(-1, 1),
}
logits = course.lite0().predict(np.stack([*views.values()]), verbose=0)
shares = keras.ops.convert_to_numpy(keras.ops.softmax(logits))  # (4, 1000)
named = keras_hub.utils.decode_imagenet_predictions(shares, top=2)
rows = [
    (view, *(f"{label.replace('_', ' ')} {s:.0%}" for label, s in pair))
    for view, pair in zip(views, named)
]
course.table("Lite0", ("flower", "first guess", "second guess"), rows)

# %% [markdown]
# The flower is a dahlia, and a daisy is the nearest of the 1,000 names. The
# negative is still a daisy, though with half of the certainty. Blur and noise
# are worse: they change what the first layers look for, edges and textures,
# and all later layers read what the first ones report.
#
# ## A network small enough to try every place
#
# To train at many places, several times each, we take digits and a ResNet
# that was trained on them: a first convolution (the *stem*), three stages of
# 16, 32 and 64 channels, and a linear head. Two things may change:
#
# - **input shift**: negatives, the old labels;
# - **label shift**: clean images, labels renumbered: $y \to (y + 1) \bmod 10$.

# %%
high = data.x.max() + data.x.min()
corrupted = data._replace(x=high - data.x, test_x=high - data.test_x)
renumbered = data._replace(y=(data.y + 1) % 10, test_y=(data.test_y + 1) % 10)
shifts = {"label shift": renumbered, "input shift": corrupted}
before = {
    name: course.accuracy(base, new.test_x, new.test_y)
    for name, new in {"clean": data, **shifts}.items()
}
print({name: f"{right:.1%}" for name, right in before.items()})

# %% [markdown]
# Both shifts leave the network below chance (10 %). The network is the same
# in both cases; what has to change in it is not.
#
# ## A convolution of low rank, in two forms
#
# A convolution with a `k x k` kernel takes $c_{in}$ channels to $c_{out}$. At
# each pixel it multiplies a patch of $k^2 c_{in}$ numbers by a matrix with
# $c_{out}$ columns. ConvLoRA adds a kernel $\Delta$ of few weights:
#
# $$y = \mathrm{base}(x) + \frac{\alpha}{r}\, \Delta * x$$
#
# - `"channel"` factors that patch matrix, $\Delta = A B$: $A$ is a `k x k`
#   convolution to $r$ channels, $B$ a `1 x 1` to $c_{out}$. It has
#   $r\,(k^2 c_{in} + c_{out})$ weights.
# - `"loralib"` comes from the code that was published with LoRA. $A$ is
#   `r k x c_in k`, $B$ is `c_out k x r k`, and the product $BA$ is read row
#   by row as a kernel `(c_out, c_in, k, k)`: $r\,k^2 (c_{in} + c_{out})$
#   weights. Its rank cannot exceed the channels, of which a grey image has 1.

# %% tags=["plot"] alt="The two factorisations of a 3 x 3 kernel of 64 to 64 channels at rank 4, drawn to scale. Channel: a tall matrix of 576 by 64 is a column of 576 by 4 times a row of 4 by 64. Loralib: a square of 192 by 192 is a column of 192 by 12 times a row of 12 by 192."
GREY, BLUE, ORANGE = "#d1d5db", "#2563eb", "#ea580c"


def product(axis, left, inner, right, title):
    """Draws (left, right) = (left, inner) times (inner, right) to scale."""
    places = [
        (0, left, right, GREY, f"$\\Delta$\n{left} x {right}"),
        (right + 90, left, inner, BLUE, f"{left} x {inner}"),
        (right + inner + 180, inner, right, ORANGE, f"{inner} x {right}"),
    ]
    for x, height, width, color, text in places:
        axis.add_patch(plt.Rectangle((x, -height), width, height, fc=color))
        middle = x + width / 2
        axis.text(middle, -height - 14, text, ha="center", va="top")
    axis.text(right + 45, -left / 2, "=", ha="center", fontsize=16)
    weights = inner * (left + right)
    axis.set_title(f"{title}:\n{weights:,} of {left * right:,} weights")
    end = 2 * right + inner + 180
    axis.set(xlim=(-60, end + 60), ylim=(-690, 20), aspect="equal")
    axis.axis("off")


figure, axes = plt.subplots(
    1, 2, figsize=(8, 4.9), layout="constrained", width_ratios=(432, 696)
)
product(axes[0], 576, 4, 64, '"channel", rank 4')
product(axes[1], 192, 12, 192, '"loralib", rank 4')
course.show(figure, "05_convolutions_forms")

# %% [markdown]
# Both drawings show one convolution of 64 to 64 channels. `"channel"` is thin
# in channels only; `"loralib"` mixes space with channels, so that its inner
# width is $3 r$. Merged, either is a kernel of the old shape: the adapted
# model costs what the base costs.
#
# ## The same budget, at different places
#
# The names of the layers begin with their stage, so a pattern says where
# adapters go. `trainable=()` keeps all else frozen, the head too. A stage has
# the more weights the later it is, so we give early stages a higher rank: each
# place trains about 3,000 weights. Two baselines, at two other budgets, are the
# head (650 weights) and everything.

# %%
PLACES = {  # name: layers, rank, options
    "stage 1": (r"conv1|layer1_.*conv\d", 8, {}),
    "stage 1,\nloralib": (
        r"conv1|layer1_.*conv\d",
        4,
        {"factorization": "loralib", "overrides": {"conv1": {"rank": 1}}},
    ),
    "stage 2": (r"layer2_.*conv\d", 6, {}),
    "stage 3": (r"layer3_.*conv\d", 3, {}),
    "each conv.": (r"conv1|layer\d_.*conv\d", 2, {}),
}
chosen = ["head", *PLACES, "all weights"]
if course.FAST:
    chosen = ["head", "stage 1"]
models = {}
for place in chosen:
    model = models[place] = keras.models.clone_model(base)
    model.set_weights(base.get_weights())
    if place in PLACES:
        target, rank, options = PLACES[place]
        options = {"rank": rank, "trainable": (), "seed": 7, **options}
        ks.wrap_model(model, "conv_lora", target=target, **options)
    elif place == "head":
        for layer in model.layers:
            layer.trainable = layer.name == "linear"
sizes = {p: course.count(m.trainable_weights) for p, m in models.items()}

# %% [markdown]
# Each model trains on each shift, with three draws of 200 images. It compiles
# once, and starts anew from the same weights. The rates are 0.05 for the head,
# 0.03 for adapters, 0.01 for all weights. We chose them by short trials of two
# or three values on the label shift and on negatives with blur and noise,
# looking at these test images, so read small differences with care; all
# weights, tried least, may do a little better at a smaller rate.


# %%
def adapt(model, rate, draws=1 if course.FAST else 3):
    """Test accuracies on each shift after training on draws of 200 images."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.optimizer.build(model.trainable_variables)
    variables = model.weights + model.optimizer.variables
    start = [keras.ops.convert_to_numpy(v) for v in variables]
    found = {shift: [] for shift in shifts}
    for shift, draw in itertools.product(shifts, range(draws)):
        for variable, value in zip(variables, start):
            variable.assign(value)
        new = shifts[shift]
        rows = np.random.default_rng(draw).permutation(len(new.y))[:200]
        x, y = new.x[rows], new.y[rows]
        model.fit(x, y, batch_size=50, epochs=20, verbose=0)
        right = course.accuracy(model, new.test_x, new.test_y)
        found[shift].append(100 * right)
    return found


rates = {"head": 5e-2, "all weights": 1e-2}  # of adapters 3e-2
scores = {p: adapt(m, rates.get(p, 3e-2)) for p, m in models.items()}
rows = [
    (
        place.replace("\n", " "),
        f"{sizes[place]:,}",
        *(
            f"{np.mean(found[s]):.1f} ({min(found[s]):.0f}-{max(found[s]):.0f})"
            for s in shifts
        ),
    )
    for place, found in scores.items()
]
course.table(
    "Accuracy in %, mean (range)", ("trained", "weights", *shifts), rows
)


# %% tags=["plot"]
def draw():
    figure = plt.figure(figsize=(10, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    for axis, (view, image), ((label, share),) in zip(
        top.subplots(1, 4),
        views.items(),
        keras_hub.utils.decode_imagenet_predictions(shares, top=1),
    ):
        axis.imshow((image + 1).clip(0, 2) / 2)
        axis.set_title(f"{view}:\n{label.replace('_', ' ')}, {share:.0%}")
        axis.axis("off")
    axis = bottom.subplots()
    places = np.arange(len(scores))
    colors = {"input shift": BLUE, "label shift": ORANGE}
    for side, (shift, color) in enumerate(colors.items()):
        x = places + 0.4 * (side - 0.5)
        heights = [np.mean(found[shift]) for found in scores.values()]
        axis.bar(x, heights, 0.37, color=color, label=shift, alpha=0.85)
        for place, found, height in zip(x, scores.values(), heights):
            dots = [place] * len(found[shift])
            axis.plot(dots, found[shift], "o", ms=4, color="#111827")
            axis.text(
                place, 3, f"{height:.0f}", ha="center", color="white", size=11
            )
    axis.axhline(10, color="#6b7280", ls=":", lw=1.2)
    axis.text(len(scores) - 0.55, 11, "chance")
    axis.set_xlim(-0.55, len(scores) - 0.1)
    axis.set_xticks(places, [f"{p}\n{sizes[p]:,}" for p in scores])
    axis.set(ylabel="test accuracy in %", ylim=(0, 116))
    axis.set_xlabel("what trains, and how many weights that is")
    axis.legend(frameon=False, ncols=2, loc="upper center")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


# %% tags=["picture"] alt="Above, a flower in four states: Lite0 takes the clean one and the negative for a daisy, the blurred one for a strawberry, the noisy one for a honeycomb. Below, bars of test accuracy for seven trained parts under two shifts. Input shift: stage 1 reaches 93 %, the head 80 %, all weights 96 %. Label shift: the head reaches 98 %, stage 1 82 %, and stage 3 stays at chance, 10 %."
course.show(draw(), "05_convolutions")

# %% [markdown]
# Under the **input shift** (blue) the early stages win back most. The features
# that reach the head are already wrong, and an early layer can turn the image
# back into what later layers expect. Stage 1 is some 13 points above the head,
# and 10 above stage 3 at about the same budget. Its lead over stage 2 is no
# larger than the spread of its draws, and its two forms tie. A budget that is
# spread over all convolutions does worse than one in the right place.
#
# Under the **label shift** (orange) the features are right and only their names
# have changed: the head needs 650 weights and beats even training everything,
# which has 115 times as many. An adapter below a frozen head has to make the
# features of one class look like those of another. In stage 3, at rank 3, it
# stays at chance; smaller learning rates, which we tried, hardly help.
#
# Training all weights is best or nearly so for both shifts. What an adapter in
# the right place buys is the size: 27 times fewer weights for 3 points here.
# These are three draws of training images, one trained network and one test
# set of 497 images, whose standard error near 93 % is 1.1 points.
#
# ## What was learned, and that it merges
#
# The merged kernel less the base's is what was learned. Which rank has it as
# a patch matrix (144, 16), of a convolution in stage 1?

# %%
name = "layer1_0_conv2"
kernel = base.get_layer(name).get_weights()[0]  # (3, 3, 16, 16)
errors, spectra, rows = {}, {}, []
for place in [p for p in models if p.startswith("stage 1")]:
    model = models[place]
    logits = model.predict(corrupted.test_x, verbose=0)
    ks.merge_model(model)
    merged = model.predict(corrupted.test_x, verbose=0)
    errors[place] = np.abs(merged - logits).max() / np.abs(logits).max()
    delta = model.get_layer(name).get_weights()[0] - kernel
    values = np.linalg.svd(delta.reshape(-1, 16), compute_uv=False)  # (16,)
    spectra[place] = values / values[0]
    rank = int((spectra[place] > 1e-3).sum())
    row = f"{rank} of 16", f"{errors[place]:.0e}", f"{model.count_params():,}"
    rows.append((place.replace("\n", " "), *row))
headings = ("trained", "rank of delta", "merge error", "weights")
course.table("Merged", headings, rows)

# %% [markdown]
# `"channel"` keeps to its rank, 8. `"loralib"` of rank 4 is 12 wide inside, in
# its own view (48, 48), and has a higher rank than 8 as a patch matrix, because
# that view mixes space with channels. The *merge error* is the largest
# difference of a logit relative to the largest logit: float32 rounding, and
# less where the layer ran with the summed kernel all along. Merged, both have
# the base's layers and its number of weights.
#
# ## Checks

# %% tags=["checks"]
assert before["clean"] > 0.9 and max(before.values()) == before["clean"]
assert before["input shift"] < 0.3 and before["label shift"] < 0.1
assert shares[0].argmax() == shares[1].argmax() == 985  # daisy
assert 985 not in (shares[2].argmax(), shares[3].argmax())
convs = [layer for layer in base.layers if "conv" in layer.name]
shapes = {layer.name: layer.kernel.shape for layer in convs}
for place, (_, rank, options) in PLACES.items():
    stage = place[:7].replace("stage ", "layer")
    expected = 0
    for layer, (k, _, i, o) in shapes.items():
        first = layer == "conv1"
        inside = layer.startswith(stage) or (first and stage == "layer1")
        if place == "each conv." or inside:
            if options:
                expected += (1 if first else rank) * k * k * (i + o)
            else:
                expected += rank * (k * k * i + o)
    assert expected == sizes.get(place, expected), place
mean = {p: {s: np.mean(f[s]) for s in shifts} for p, f in scores.items()}
assert mean["head"]["label shift"] > mean["stage 1"]["label shift"] + 3
assert mean["stage 1"]["input shift"] > 50
assert max(errors.values()) < 1e-4
assert (spectra["stage 1"] > 1e-3).sum() == 8
if not course.FAST:
    assert mean["all weights"]["input shift"] > mean["head"]["input shift"]
    assert mean["stage 1"]["input shift"] > mean["stage 3"]["input shift"] + 5
    assert (spectra["stage 1,\nloralib"] > 1e-3).sum() > 8

# %% [markdown]
# ## Exercises
#
# 1. Lee et al. also propose to look before training: prefer the layers whose
#    gradient is large beside their weights, $|g| / |w|$. `ks.choose_layers`
#    computes it. Does it put the stem first for one shift and the head for
#    the other?
# 2. Which ranks does `"loralib"` accept at the stem?

# %% [markdown]
# ### Solution 1
#
# It does not, here. The score rises far above that on clean images: the rule
# sees that something has shifted. But the order of the layers is nearly the
# same for both shifts, and the head is not first even where it alone is
# wrong. With a few labels at hand, trying each place says more.

# %% tags=["solution"]
probe = keras.models.clone_model(base)
probe.set_weights(base.get_weights())
probe.compile(
    "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
)
asked, rows = {}, []
groups = ("conv1", "layer1", "layer2", "layer3", "linear")
for shift, new in {"clean": data, **shifts}.items():
    asked[shift] = ks.choose_layers(
        probe,
        (new.x[:200], new.y[:200]),
        groups=r"conv1$|layer\d|linear",
        batch_size=50,
    )
    rows.append((shift, *(f"{asked[shift][g]:.3f}" for g in groups)))
course.table("Relative gradient norms", ("data", *groups), rows)
assert min(asked["input shift"].values()) > asked["clean"]["linear"]
assert next(iter(asked["label shift"])) != "linear"

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
stem = {"target": "conv1", "factorization": "loralib"}
channels = data.x.shape[-1]
ks.wrap_model(keras.models.clone_model(base), "conv_lora", rank=1, **stem)
message = ""
try:
    ks.wrap_model(
        keras.models.clone_model(base), "conv_lora", rank=channels + 1, **stem
    )
except ValueError as error:
    message = str(error)
print(message)
assert f"at most {channels}" in message

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685. The `"loralib"` convolution is
#   in its repository rather than in the paper.
# - Lee et al. 2022, *Surgical fine-tuning*, arXiv 2210.11466: which block to
#   train for which kind of shift.
# - Tan and Le 2019, *EfficientNet*, arXiv 1905.11946, from which Lite0 comes.
# - Hendrycks and Dietterich 2019, arXiv 1903.12261: how networks bear blur,
#   noise and other corruptions.
