# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adaptive rank: weights where they are needed, and how sure to be
#
# AdaLoRA gives each of twelve kernels of MiniLM six directions and lets 24 of
# the 72 stay, where they matter most. IVON, an optimizer, trains a bell curve
# over each weight; on a small network it brings a calibration error of over
# 0.2 to about 0.05. The hard part is that importance is noisy and many gains
# are no larger than chance, so this page puts chance beside each of them.

# %% [markdown]
# **What you see:** on the left the rank of each kernel over the epochs; the
# budget falls from 72 to 24 triplets. In the middle where the 24 are at the
# end: the mean of the seeds in large type, each seed in small type. On the
# right the accuracy of this beside the same triplets, and LoRA, with rank 2
# everywhere, a dot for each seed. The bands are one standard error of an
# accuracy on this many test sentences; what lies within them may be chance.
#
# **You will learn**
#
# - how AdaLoRA's triplets and its falling budget work;
# - how to tell a gain from chance;
# - what IVON's posterior is, one step at a time;
# - to measure whether a model knows when it is wrong: NLL, ECE and the
#   reliability diagram.
#
# MiniLM and rated sentences on films, then scikit-learn's digits; about four
# minutes on two CPU cores. Change `"jax"` below for another backend; all
# outputs here are of the one that the first cell prints.

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

# %% [markdown]
# ## Which kernel needs how much rank?
#
# We adapt the last two of MiniLM's six blocks, twelve kernels. The four blocks
# below stay as they are, so we compute once what they say about a sentence.

# %%
LENGTH = 32  # tokens
train, test = (80, 80) if course.FAST else (500, 500)
films = course.sentences("films", train, test)
encoder = course.minilm(LENGTH)
backbone, read = encoder.cut(4)  # `read` runs the four blocks that stay
states, test_states = read(films.x), read(films.test_x)
print(films.name, states[0].shape)

# %%
hidden = keras.Input((LENGTH, 384))
mask = keras.Input((LENGTH,), dtype="int32")
fifth = backbone.get_layer("transformer_layer_4")(hidden, padding_mask=mask)
last = backbone.get_layer("transformer_layer_5")(fifth, padding_mask=mask)
pooled = backbone.get_layer("pooled_dense")(last[:, 0])  # (n, 384)
reader = keras.Model([hidden, mask], keras.layers.Dense(2, name="head")(pooled))

# %% [markdown]
# AdaLoRA writes the update of a kernel in the form of an SVD,
#
# $$\Delta K = \frac{\alpha}{r}\, A\, \mathrm{diag}(E)\, B,$$
#
# with $A$ of `n_in x r`, $B$ of `r x n_out`, and $r$ numbers $E$ that start at
# zero; a penalty keeps $A$ and $B$ near orthonormal. Column $i$ of $A$, $E_i$
# and row $i$ of $B$ are a **triplet**, and $E_i = 0$ switches it off:

# %% tags=["plot"] alt="The update of a 384 by 384 kernel as A of 384 by 6 times six numbers E times B of 6 by 384; two of the six triplets are on and blue, the others are off and grey."
figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
BLUE, RED, GREY, PALE = "#2563eb", "#dc2626", "#6b7280", "#e5e7eb"
axis.add_patch(plt.Rectangle((0, 0), 96, 96, fc="#dbeafe", ec=GREY))
axis.text(48, -8, "update of K\n384 x 384", ha="center", va="top")
axis.text(112, 48, "=", fontsize=16, ha="center", va="center")
for number in range(6):
    color = BLUE if number in (1, 4) else PALE
    near = 10 * number
    axis.add_patch(plt.Rectangle((126 + near, 0), 8, 96, fc=color, ec=GREY))
    spot = (204 + near, 68 - near)
    axis.add_patch(plt.Rectangle(spot, 8, 8, fc=color, ec=GREY))
    spot = (282, 68 - near)
    axis.add_patch(plt.Rectangle(spot, 96, 8, fc=color, ec=GREY))
for x, label in ((155, "A, 384 x 6"), (233, "E, 6"), (330, "B, 6 x 384")):
    axis.text(x, -8, label, ha="center", va="top")
axis.text(155, 102, "two triplets on (blue), four off", color=GREY)
axis.set(xlim=(-4, 384), ylim=(-30, 112), aspect="equal")
axis.axis("off")
course.show(figure, "12_adaptive_rank_triplets")

# %% [markdown]
# `RankBudget` scores the triplets of all kernels together, lets all of them
# live for a while, then ever fewer by a cubic law. The score is made of each
# weight's **sensitivity**, $|w\, g|$ with the gradient $g$, smoothed and
# multiplied by how much it varies; a triplet has that of $E_i$ and the means
# over its column and its row. Every kernel starts with 6 triplets; the budget
# ends at 2 for each on average. There are two baselines of the same budget,
# spread evenly: the same triplets with rank 2 everywhere, and LoRA of rank 2.
# (The triplets' rate and penalty did best of six settings on 400 sentences
# that this page does not use; LoRA has the rate of the library's study.) Where
# will the 24 triplets end: in attention or in the feed-forward net?

# %%
SEEDS = (7,) if course.FAST else (7, 8, 9)
SKIP = "pooled_dense|transformer_layer_4.*" if course.FAST else "pooled_dense"


def adapt(seed, rate, method, rank, callbacks=None, **options):
    # Accuracy and weights of one training; the reader is then as before.
    keras.utils.set_random_seed(seed)
    options |= {"rank": rank, "exclude": SKIP, "seed": seed}
    ks.wrap_model(reader, method, "all-linear", trainable="head", **options)
    course.train(reader, states, films.y, rate, 3, 20, callbacks=callbacks)
    right = course.accuracy(reader, test_states, films.test_y)
    if callbacks:
        ks.compact_ranks(reader)  # each kernel a LoRA of the rank it has left
    weights = course.count(reader.trainable_weights) - 770  # without the head
    ks.unwrap_model(reader)
    return right, weights


# %%
budgets = {seed: ks.callbacks.RankBudget(2, interval=5) for seed in SEEDS}
found = {"LoRA, 2": [], "triplets, 2": [], "triplets, 6 to 2": []}
for seed, budget in budgets.items():
    loose = {"orthogonality": 0.01, "seed": seed, "rate": 1e-2}
    runs = (
        adapt(seed, 3e-3, "lora", 2),
        adapt(method="adalora", rank=2, **loose),
        adapt(method="adalora", rank=6, callbacks=[budget], **loose),
    )
    for name, run in zip(found, runs, strict=True):
        found[name].append(run)

# %%
rows = []
for name, runs in found.items():
    rights, weights = np.array(runs).T  # (seeds,) each
    each = " ".join(f"{right:.1%}" for right in rights)
    rows.append((name, f"{weights.mean():,.0f}", each, f"{rights.mean():.1%}"))
error = (0.25 / test) ** 0.5
heads = ("rank", "weights at the end", f"seeds {SEEDS}", "mean")
course.table(f"Films; one standard error is {error:.1%}", heads, rows)

# %% tags=["plot"]
NAMES = ("query", "key", "value", "output", "ffn in", "ffn out")


def final_ranks():
    last = [list(budget.ranks[-1].values()) for budget in budgets.values()]
    return np.array(last).reshape(len(SEEDS), -1, 6)  # seeds, blocks, kernels


def draw_ranks():
    figure, axes = plt.subplots(
        1,
        3,
        figsize=(14, 4),
        layout="constrained",
        width_ratios=[1.1, 1.5, 0.95],
    )
    history = budgets[SEEDS[0]].ranks
    ranks = np.array([list(epoch.values()) for epoch in history])
    ranks = np.vstack([np.full(ranks.shape[1], 6), ranks])  # (epochs + 1, 12)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, 6))
    rng = np.random.default_rng(0)
    for number, line in enumerate(ranks.T):
        block, name = divmod(number, 6)
        axes[0].plot(
            line + rng.uniform(-0.12, 0.12),
            color=colors[name],
            ls="--" if block else "-",
            label=None if block else NAMES[name],
        )
    axes[0].plot([], [], color=GREY, ls="--", label="(block 6)")
    axes[0].set(title="Ranks while training, one seed", xlabel="epoch")
    axes[0].set(ylabel="rank", ylim=(-0.3, 8.6), yticks=range(7))
    axes[0].set_xticks(range(len(ranks)))
    axes[0].legend(fontsize=8, ncols=2, loc="upper right", framealpha=0.9)
    final = final_ranks()
    mean = final.mean(axis=0)
    axes[1].imshow(mean, cmap="Blues", vmin=0, vmax=6, aspect="auto")
    for (block, name), rank in np.ndenumerate(mean):
        color = "white" if rank > 3.5 else "black"
        place = {"ha": "center", "color": color}
        axes[1].text(name, block - 0.02, f"{rank:.1f}", fontsize=16, **place)
        each = " ".join(map(str, final[:, block, name]))
        axes[1].text(name, block + 0.2, each, fontsize=9, **place)
    axes[1].set_xticks(range(6), NAMES)
    names = ["block 5", "block 6"][-len(mean) :]
    axes[1].set_yticks(range(len(names)), names)
    axes[1].set_title(f"Ranks at the end of a budget of {12 * len(mean)}")
    for place, runs in enumerate(found.values()):
        rights = 100 * np.array(runs)[:, 0]
        color = (BLUE, GREY, RED)[place]
        axes[2].bar(
            place,
            200 * error,
            0.7,
            rights.mean() - 100 * error,
            color=color,
            alpha=0.15,
        )
        spread = np.linspace(-0.15, 0.15, len(rights)) if len(rights) > 1 else 0
        axes[2].scatter(place + spread, rights, color=color, s=45)
        axes[2].plot([place - 0.35, place + 0.35], [rights.mean()] * 2, c=color)
    names = [name.replace(", ", "\n") for name in found]
    axes[2].set_xticks(range(3), names)
    axes[2].set(xlim=(-0.6, 2.6), ylabel="films rated right, in %")
    axes[2].set_title("The same budget")
    for axis in (axes[0], axes[2]):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# %% tags=["picture"] alt="Left: the ranks of twelve kernels fall from 6 each to between 0 and 6. Middle: a map of the final ranks of two blocks by six kernels, for three seeds; they sum to 24. Right: accuracy of LoRA of rank 2, of triplets of rank 2 and of the adaptive rank, three seeds each, with bands of one standard error."
course.show(draw_ranks(), "12_adaptive_rank")

# %% [markdown]
# The triplets went to the feed-forward outputs of both blocks and to value and
# output in the last attention; query and key of block 5 lost theirs with every
# seed. That much repeats. Single numbers do not: the feed-forward output of
# block 5 kept 6, 1 and 3, so do not read much into one map.
#
# Did it help? The adaptive triplets and those of rank 2 everywhere are a tie:
# their means lie well within one standard error of each other. LoRA of rank 2
# is ahead of both by about three points, and each of its seeds is above each of
# theirs. Triplets start with $E = 0$ between small $A$ and $B$, and 75 steps
# are few for them. So on a task this short the map is what you gain, and not
# accuracy; the gains that Zhang et al. report are from trainings of many
# thousand steps.
#
# ## A bell curve over each weight
#
# The scores above are guesses of which weights matter. An optimizer that
# keeps track of how sure it is of each weight gives another one, and it also
# says how sure a prediction may be. This takes a slow look, on a small
# network: digits that are turned by a quarter and noisy, of which we have
# only 400.
# (The rates were chosen beforehand, on training images that this page does not
# use.)

# %%
data = course.images()
rng = np.random.default_rng(7)


def shift(x):
    x = np.rot90(x, axes=(1, 2))
    return (x + rng.normal(0, 0.4, x.shape)).astype("float32")


x, y = shift(data.x)[:400], data.y[:400]  # (400, height, width, 1), (400,)
test_x, test_y = shift(data.test_x), data.test_y
model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Flatten()])
for name in ("first", "second", "third"):
    model.add(keras.layers.Dense(64, activation="relu", name=name))
model.add(keras.layers.Dense(10, activation="softmax", name="head"))


def fit(optimizer, x, y, epochs):
    model.compile(optimizer, "sparse_categorical_crossentropy")
    model.fit(x, y, 50, epochs, verbose=0)


# %%
fit(keras.optimizers.Adam(2e-3), data.x, data.y, 5 if course.FAST else 10)
start = model.get_weights()
predictions = {}
for epochs in (16, 60):
    model.set_weights(start)
    fit(keras.optimizers.Adam(2e-3), x, y, epochs)
    predictions[f"Adam, {epochs} epochs"] = model.predict(
        test_x, batch_size=500, verbose=0
    )

# %% [markdown]
# **Step 1: two numbers for a weight.** Adam ends with one number for each
# weight. IVON has a mean $m$ and a deviation
#
# $$\sigma = \frac{1}{\sqrt{\lambda\,(h + \delta)}},$$
#
# where $h$ estimates the curvature of the loss, $\delta$ is the weight decay
# and $\lambda$ (`ess`) about the number of examples. Where the loss is curved,
# the data say what the weight has to be, and $\sigma$ is small. Where it is
# flat, many values would do, and $\sigma$ is large.
#
# **Step 2: one update.** The model holds a sample $m + \sigma\epsilon$ while
# the gradient is taken. $m$ moves against the gradient, divided by $h$. And
# where the gradient rises and falls with $\epsilon$, the loss is curved: $h$
# grows. All $h$ start at `hess_init`, here 0.5, so all $\sigma$ start at
# $1 / \sqrt{400 \cdot 0.5} = 0.071$. Will they grow or shrink?

# %%
model.set_weights(start)
optimizer = ks.optimizers.IVON(
    0.05, ess=len(x), hess_init=0.5, beta_2=0.999, seed=7
)
fit(optimizer, x, y, 60)
# (64, 64) each:
mean, sigma = optimizer.posterior(model.get_layer("first").kernel)
low, middle, high = np.quantile(sigma, (0.05, 0.5, 0.95))
print(f"sigma: 5 % below {low:.3f}, median {middle:.3f}, 5 % over {high:.3f}")
print(f"mean: median size {np.median(np.abs(mean)):.3f}")

# %% [markdown]
# Most have grown as far as 480 steps allow: `beta_2` lets $h$ fall by 0.1 % a
# step, to 0.31, and then $\sigma$ is 0.090. So for most weights the data say
# less than the start assumed. And the typical $\sigma$ is not much smaller than
# the typical $|m|$: of many a weight not even the sign is known.
#
# **Step 3: many models in one.** Each draw from the posterior is a model. We
# draw 16 and ask all of them about every test image.

# %%
drawn = []
with optimizer.mean():  # puts the means back at the end
    for _ in range(16):
        optimizer.sample()
        drawn.append(model.predict(test_x, batch_size=500, verbose=0))
drawn = np.stack(drawn)  # (16, n, 10)
predictions["IVON, mean of 16"] = drawn.mean(axis=0)

# %% tags=["plot"] alt="Left: the bell curves of four weights; the means of two are far from zero, the curves of the others cover it. Right: two test images with the probabilities that 16 drawn models give to the ten classes; for the first all agree, for the second they disagree."
figure, axes = plt.subplots(
    1, 3, figsize=(14, 3.8), layout="constrained", width_ratios=[1.2, 1, 1]
)
order = np.argsort(np.abs(mean / sigma).ravel())
places = order[[0, len(order) // 3, 2 * len(order) // 3, -20]]
grid = np.linspace(-0.8, 0.8, 400)
shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, 4))
for place, color in zip(places, shades, strict=True):
    m, deviation = mean.ravel()[place], sigma.ravel()[place]
    curve = np.exp(-((grid - m) ** 2) / 2 / deviation**2) / deviation
    axes[0].plot(grid, curve / (2 * np.pi) ** 0.5, color=color)
    axes[0].fill_between(
        grid, curve / (2 * np.pi) ** 0.5, color=color, alpha=0.1
    )
axes[0].set(title="Four weights of the first kernel", xlabel="weight")
axes[0].set_ylabel("density")
spread = drawn.std(axis=0).max(axis=-1)  # (n,)
for axis, number in zip(
    axes[1:], (spread.argmin(), spread.argmax()), strict=True
):
    for probabilities in drawn[:, number]:
        axis.plot(range(10), 100 * probabilities, "o-", color=BLUE, alpha=0.3)
    axis.set(title=f"16 models on a digit {test_y[number]}", xticks=range(10))
    axis.set(xlabel="class", ylabel="probability in %", ylim=(-3, 103))
    top = drawn[:, number].max(axis=0)  # (10,)
    free = np.argmin([top[:3].max(), top[3:7].max(), top[7:].max()])
    inset = axis.inset_axes([(0.03, 0.37, 0.7)[free], 0.62, 0.28, 0.3])
    inset.imshow(test_x[number, ..., 0], cmap="gray_r")
    inset.set(xticks=[], yticks=[])
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "12_adaptive_rank_samples")

# %% [markdown]
# On the left are four weights, from one that is surely not zero to one that
# may be. On the digit in the middle all 16 models agree. On that on the right
# they do not, and their mean is unsure, as it should be. The mean is what
# `ks.optimizers.predict_mean` computes.
#
# **Step 4: is it as sure as it may be?** Two numbers measure probabilities:
#
# $$\mathrm{NLL} = -\frac1n \sum_i \log p_i(y_i), \qquad
# \mathrm{ECE} = \sum_b \frac{n_b}{n}\,
# \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert.$$
#
# For the ECE predictions are sorted into bins $b$ by their confidence, the
# largest probability. Calibrated means: of the answers with 70 %, 70 % are
# right. A fair comparison needs Adam twice: as long as IVON, and stopped
# early, after 16 epochs.


# %%
def reliability(p):
    # Confidence, accuracy and share of examples of each used bin.
    confidence, right = p.max(axis=-1), p.argmax(axis=-1) == test_y
    bin_of = (confidence * 9.999).astype(int)
    rows = [bin_of == b for b in np.unique(bin_of)]
    bins = [(confidence[r].mean(), right[r].mean(), r.mean()) for r in rows]
    return np.array(bins).T


scores = {}
for name, p in predictions.items():
    confidence, right, share = reliability(p)
    nll = -np.log(p[np.arange(len(p)), test_y].clip(1e-7)).mean()
    ece = np.sum(share * np.abs(right - confidence))
    scores[name] = np.mean(p.argmax(axis=-1) == test_y), nll, ece
heads = ("prediction", "accuracy", "NLL", "ECE")
rows = [
    (n, f"{a:.1%}", f"{b:.2f}", f"{c:.3f}") for n, (a, b, c) in scores.items()
]
course.table("Turned and noisy digits, one seed", heads, rows)

# %% tags=["plot"] alt="Reliability diagrams of Adam after 16 and after 60 epochs and of IVON: right answers over confidence. Adam after 60 epochs lies far below the diagonal, after 16 epochs less so, IVON lies near it."
figure, axes = plt.subplots(
    1, 3, figsize=(13, 4.2), layout="constrained", sharey=True
)
for axis, (name, p) in zip(axes, predictions.items(), strict=True):
    confidence, right, share = 100 * reliability(p)
    color = BLUE if "IVON" in name else RED
    axis.plot([0, 100], [0, 100], "--", color=GREY, lw=1)
    axis.plot(confidence, right, color=color)
    axis.scatter(confidence, right, s=10 + 5 * share, color=color, alpha=0.5)
    axis.set(title=f"{name}, ECE {scores[name][2]:.3f}", aspect="equal")
    axis.set(xlim=(0, 103), ylim=(0, 103), xlabel="confidence in %")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("right answers in %")
axes[0].text(8, 22, "calibrated", rotation=45, color=GREY)
course.show(figure, "12_adaptive_rank_reliability")

# %% [markdown]
# Adam is far too sure after 60 epochs: of its answers with over 90 %
# confidence, fewer than 80 % are right. Stopping after 16 epochs cures much of
# that, but to know when to stop takes more labelled data. IVON trained for all
# 60 epochs and has the lowest NLL and ECE. How much of this is chance? The
# accuracies are a tie, with a standard error of two points. A model that is
# calibrated perfectly shows an ECE of 0.016 or more on 497 images (exercise 2).
# So the gap to Adam after 60 epochs is real, and that to Adam after 16, on one
# seed, may not be.
#
# ## Checks

# %% tags=["checks"]
final = final_ranks()
assert (final.sum(axis=(1, 2)) == 12 * final.shape[1]).all()
for budget in budgets.values():
    totals = [sum(epoch.values()) for epoch in budget.ranks]
    assert totals == sorted(totals, reverse=True)
assert final.max() > final.min()
sizes = np.array([768, 768, 768, 768, 1920, 1920])
assert all(
    weights == 2 * final.shape[1] * sizes.sum()
    for _, weights in found["LoRA, 2"]
)
left = [int((one * sizes).sum()) for one in final]
assert [weights for _, weights in found["triplets, 6 to 2"]] == left
if not course.FAST:
    chance = max(films.test_y.mean(), 1 - films.test_y.mean())
    assert all(
        np.mean([r for r, _ in runs]) > chance + 0.05 for runs in found.values()
    )
adam, ivon = scores["Adam, 60 epochs"], scores["IVON, mean of 16"]
assert ivon[1] < 0.9 * adam[1] and ivon[2] < 0.8 * adam[2]
assert scores["Adam, 16 epochs"][1] < 0.95 * adam[1]
assert ivon[0] > adam[0] - 0.08
assert middle > 1.02 * (len(x) * 0.5) ** -0.5

# %% [markdown]
# ## Exercises
#
# 1. `RankBudget` also takes criteria from IVON's posterior: `"snr"`,
#    $|m| / \sigma$ (surely not zero), `"mean"`, $|m|$ (large), and
#    `"precision"`, $1 / \sigma$ (fixed by the data). Let AdaLoRA of rank 8 on
#    the three hidden layers go on with IVON from what Adam trained, once with
#    `"sensitivity"` and once with `"snr"`, down to 9 of 24 triplets. How many
#    triplets do the two choices share, and how many would two random choices?
# 2. Show that the ECE of a sure model can be small by chance: what is the ECE
#    of a model that answers 497 questions with 70 % and is right 70 % of the
#    time by coin toss?

# %% [markdown]
# ### Solution 1
# Two random choices of 9 out of 24 share $9 \cdot 9 / 24 = 3.4$ on average,
# with a deviation of 1.2, so from 1 to 6 is chance.

# %% tags=["solution"]
HIDDEN = ["first", "second", "third"]
model.set_weights(start)
ks.wrap_model(model, "adalora", HIDDEN, rank=8, seed=7)
fit(keras.optimizers.Adam(1e-2), x, y, 20)
tuned, masks = model.get_weights(), []
for criterion in ("snr", "sensitivity")[: 1 if course.FAST else 2]:
    model.set_weights(tuned)
    optimizer = ks.optimizers.IVON(
        0.2, ess=len(x), hess_init=1.0, beta_2=0.999, seed=7
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    callbacks = [
        ks.callbacks.RankBudget(3, criterion, interval=4),
        ks.callbacks.MeanWeights(),
    ]
    model.fit(x, y, 50, 20, verbose=0, callbacks=callbacks)
    e = [model.get_layer(name).lora_e for name in HIDDEN]
    masks.append(np.stack([keras.ops.convert_to_numpy(v) for v in e]) != 0)
    p = model.predict(test_x, batch_size=500, verbose=0)
    ranks = masks[-1].sum(axis=1)
    print(criterion, ranks, f"{np.mean(p.argmax(axis=-1) == test_y):.1%}")
    assert masks[-1].sum() == 9
shared = int(np.sum(masks[0] & masks[-1]))
print(f"{shared} of 9 triplets are in both; by chance 3.4, with deviation 1.2")
draws = [
    len({*rng.permutation(24)[:9]} & {*rng.permutation(24)[:9]})
    for _ in range(4000)
]
assert abs(np.mean(draws) - 81 / 24) < 0.1 and abs(np.std(draws) - 1.19) < 0.1

# %% [markdown]
# ### Solution 2
# About 0.016: with one bin it is the error of one accuracy, and with ten bins
# it is larger. Differences of that size between two models are chance.

# %% tags=["solution"]
tosses = (rng.random((4000, 497)) < 0.7).mean(axis=1)
print(f"mean ECE of a perfect model: {np.abs(tosses - 0.7).mean():.3f}")
assert 0.013 < np.abs(tosses - 0.7).mean() < 0.02

# %% [markdown]
# ## Further reading
#
# - Zhang et al. 2023, AdaLoRA, arXiv 2303.10512: triplets and budget.
# - Shen et al. 2024, on IVON, arXiv 2402.17641: the optimizer.
# - Chen et al. 2024, arXiv 2409.10673: Bayesian criteria for AdaLoRA.
