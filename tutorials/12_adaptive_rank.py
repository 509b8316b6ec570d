# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adaptive rank and uncertainty
#
# **AdaLoRA** starts with more rank than it needs and takes the least important
# directions away. **IVON**, an optimizer, trains a Gaussian over each weight:
# a measure of importance, and of how sure a prediction may be.
#
# **You will learn**
#
# - how AdaLoRA's triplets and its falling budget work;
# - what IVON's posterior is, and five criteria for what to keep;
# - to measure calibration: NLL, ECE and the reliability diagram.
#
# Half a minute on a laptop. Change `"jax"` below for another backend.

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

# %% [markdown]
# Three hidden layers learn clean images. The new ones come turned by a quarter
# and noisy, and we have only 400 of them to train on.

# %%
data = course.images()
print("backend:", keras.backend.backend(), "data:", data.name)
rng = np.random.default_rng(7)


def shift(x):
    x = np.rot90(x, axes=(1, 2))
    return (x + rng.normal(0, 0.4, x.shape)).astype("float32")


x, y = shift(data.x)[:400], data.y[:400]  # (400, height, width, 1), (400,)
test_x, test_y = shift(data.test_x), data.test_y
WIDTH, HIDDEN = 64, ["first", "second", "third"]
model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Flatten()])
for name in HIDDEN:
    model.add(keras.layers.Dense(WIDTH, activation="relu", name=name))
model.add(keras.layers.Dense(10, activation="softmax", name="head"))


def fit(optimizer, x, y, epochs, *callbacks):
    model.compile(optimizer, "sparse_categorical_crossentropy")
    history = model.fit(x, y, 50, epochs, verbose=0, callbacks=[*callbacks])
    return history.history["loss"][-1]


def predict(x):
    return model.predict(x, batch_size=len(x), verbose=0)  # (n, 10)


def accuracy(p):
    return float(np.mean(p.argmax(axis=-1) == test_y))


fit(keras.optimizers.Adam(2e-3), data.x, data.y, 5 if course.FAST else 10)
base_weights = model.get_weights()
clean = accuracy(predict(data.test_x))
before = accuracy(predict(test_x))
print(f"accuracy clean {clean:.1%}, shifted {before:.1%}")
assert before < clean - 0.3

# %% [markdown]
# ## Triplets and a budget
#
# AdaLoRA writes the update of a kernel in the form of an SVD,
#
# $$\Delta K = \frac{\alpha}{r}\, A\, \mathrm{diag}(E)\, B,$$
#
# with $A$ of `n_in x r`, $B$ of `r x n_out`, and $r$ numbers $E$ that start at
# zero; a penalty keeps $A$ and $B$ near orthonormal. Column $i$ of $A$, $E_i$
# and row $i$ of $B$ are a **triplet**. $E_i = 0$ switches it off.
#
# `RankBudget` scores the triplets of all layers together, lets all of them live
# for a while, then ever fewer by a cubic law. A triplet's score is that of
# $E_i$ and the means over its column and row; a weight's score is by default
# its **sensitivity**, smoothed $|w\, g|$ times how much that varies, with the
# gradient $g$.

# %%
RANK, TARGET = 8, 3
EPOCHS = 15 if course.FAST else 40
options = {"method": "adalora", "target": HIDDEN, "rank": RANK, "seed": 7}
ks.wrap_model(model, **options)
n_in = int(np.prod(data.x.shape[1:]))
sizes = {"first": n_in + WIDTH, "second": 2 * WIDTH, "third": 2 * WIDTH}
total = sum(RANK * (size + 1) for size in sizes.values())
assert course.count(model.trainable_weights) == total

budget = ks.callbacks.RankBudget(TARGET, interval=4)
fit(keras.optimizers.Adam(1e-2), x, y, EPOCHS, budget)
adapted = predict(test_x)  # (n, 10)
totals = [sum(ranks.values()) for ranks in budget.ranks]
print("triplets after every fifth epoch:", *totals[4::5])
print(f"accuracy shifted {before:.1%} -> {accuracy(adapted):.1%}")
assert (totals[0], totals[-1]) == (3 * RANK, 3 * TARGET)
assert totals == sorted(totals, reverse=True)
assert accuracy(adapted) > before + 0.1

# `compact_ranks` makes each layer a LoRA of the rank it has left, exactly.
ranks = ks.compact_ranks(model)
left = sum(rank * sizes[name] for name, rank in ranks.items())
assert course.count(model.trainable_weights) == left
assert np.abs(predict(test_x) - adapted).max() < 1e-4
print(ranks, f"{total:,} -> {left:,} weights")

# %% [markdown]
# ## A Gaussian over each weight
#
# IVON gives each weight a mean $m$ and a deviation
#
# $$\sigma = \frac{1}{\sqrt{\lambda\,(h + \delta)}},$$
#
# where $h$ estimates the curvature of the loss, $\delta$ is the weight decay
# and $\lambda$ (`ess`) about the number of examples. Each step takes the
# gradient at a sample $m + \sigma\epsilon$ and updates $m$ and $h$. Weights can
# then be scored by `"snr"`, $\lvert m\rvert / \sigma$ (surely not zero);
# `"mean"`, $\lvert m\rvert$ (large); `"precision"`, $1/\sigma$ (fixed by the
# data); or `"snr_abs"`, the mean of $\lvert\theta\rvert$ over its deviation.
#
# IVON goes on, with each criterion, from triplets that Adam trained.
# `MeanWeights` puts the means in. Its settings, here and below, were chosen
# beforehand on training images not used otherwise.

# %%
ks.unwrap_model(model)
model.set_weights(base_weights)
ks.wrap_model(model, **options)
fit(keras.optimizers.Adam(1e-2), x, y, 20)
tuned = model.get_weights()
ivon = {"ess": len(x), "beta_2": 0.999, "seed": 7}
kept = {}
table = rich.table.Table(title="Nine triplets, by criterion")
for heading in ("criterion", *HIDDEN, "last loss", "accuracy"):
    table.add_column(heading, justify="right")
criteria = ("sensitivity", "precision", "snr", "mean", "snr_abs")
for criterion in criteria[:3] if course.FAST else criteria:
    model.set_weights(tuned)
    chosen = ks.callbacks.RankBudget(TARGET, criterion, interval=4)
    optimizer = ks.optimizers.IVON(0.2, hess_init=1.0, **ivon)
    loss = fit(optimizer, x, y, 20, chosen, ks.callbacks.MeanWeights())
    e = np.stack([model.get_layer(name).lora_e.numpy() for name in HIDDEN])
    kept[criterion] = e != 0  # (layers, rank)
    assert kept[criterion].sum() == 3 * TARGET
    score = accuracy(predict(test_x))
    assert score > before + 0.2
    numbers = map(str, kept[criterion].sum(axis=1))
    table.add_row(criterion, *numbers, f"{loss:.2f}", f"{score:.1%}")
ks.unwrap_model(model)
console.print(table)
masks = np.stack(list(kept.values()))  # (criteria, layers, rank)
shared = np.sum(masks[:-1] & masks[1:], axis=(1, 2))
print("neighbouring rows share", *shared, "triplets")
assert np.mean(shared) >= 4  # by chance 9 * 9 / 24 = 3.4

# %% [markdown]
# All rows keep nine triplets, many in common. A few points are chance.
#
# ## Does it know when it is wrong?
#
# Now all weights train: with Adam, whose answer is one point, and with IVON,
# averaging predictions over 16 samples. Two numbers measure probabilities:
#
# $$\mathrm{NLL} = -\frac1n \sum_i \log p_i(y_i), \qquad
# \mathrm{ECE} = \sum_b \frac{n_b}{n}\,
# \lvert \mathrm{accuracy}_b - \mathrm{confidence}_b \rvert.$$
#
# For the ECE predictions are sorted into bins $b$ by their confidence, the
# largest probability. Calibrated means: of answers with 70 %, 70 % are right.


# %%
def nll(p):
    return -np.log(p[np.arange(len(p)), test_y].clip(1e-7)).mean()


def reliability(p):
    confidence, right = p.max(axis=-1), p.argmax(axis=-1) == test_y
    bin_of = (confidence * 9.999).astype(int)
    rows = [bin_of == b for b in np.unique(bin_of)]
    table = [(confidence[r].mean(), right[r].mean(), r.mean()) for r in rows]
    return np.array(table).T  # confidence, accuracy, size of each used bin


model.set_weights(base_weights)
fit(keras.optimizers.Adam(2e-3), x, y, 60)
predictions = {"Adam": predict(test_x)}
model.set_weights(base_weights)
optimizer = ks.optimizers.IVON(0.05, hess_init=0.5, **ivon)
fit(optimizer, x, y, 60)
posterior = ks.optimizers.predict_mean(model, test_x, samples=16)
predictions["IVON, 16 samples"] = posterior

table = rich.table.Table(title="Shifted images")
for heading in ("prediction", "accuracy", "NLL", "ECE"):
    table.add_column(heading, justify="right")
bins, eces = {}, {}
for name, p in predictions.items():
    confidence, right, share = bins[name] = reliability(p)
    eces[name] = np.sum(share * np.abs(right - confidence))
    values = accuracy(p), nll(p), eces[name]
    table.add_row(name, *[f"{value:.3f}" for value in values])
console.print(table)
assert nll(posterior) < 0.9 * nll(predictions["Adam"])
assert eces["IVON, 16 samples"] < 0.8 * eces["Adam"]

_, sigma = optimizer.posterior(model.get_layer("first").kernel)  # (n_in, 64)
assert np.median(sigma) > 1.02 * (len(x) * 0.5) ** -0.5  # it has grown

figure, axes = plt.subplots(2, 2, figsize=(11, 7.6), layout="constrained")
ks.plots.plot_rank_history(budget.ranks, ax=axes[0, 0])
axes[0, 0].set_title("Ranks while Adam trains, by sensitivity")
axes[0, 0].legend(frameon=False, loc="lower left")
axis = axes[0, 1]
rows = masks.reshape(len(masks), -1)  # (criteria, 24)
axis.pcolormesh(rows, cmap="Blues", vmax=1.5, edgecolors="white")
axis.set(title="Triplets kept with IVON (blue)", xlabel="triplet, by layer")
axis.set_xticks((np.arange(len(HIDDEN)) + 0.5) * RANK, HIDDEN)
axis.set_yticks(np.arange(len(kept)) + 0.5, list(kept))
axis.vlines((RANK, 2 * RANK), 0, len(kept), color="#6b7280", lw=1)
axis.invert_yaxis()
ks.plots.plot_posterior(model, ax=axes[1, 0])
axes[1, 0].set(title="IVON's posterior, all weights trained", xscale="linear")
axis = axes[1, 1]
axis.plot([0, 1], [0, 1], "--", color="#6b7280", lw=1, label="calibrated")
for name, color in (("Adam", "#d1495b"), ("IVON, 16 samples", "#30638e")):
    confidence, right, share = bins[name]
    axis.plot(confidence, right, color=color, label=name)
    axis.scatter(confidence, right, s=10 + 300 * share, color=color, alpha=0.5)
axis.set(title="Reliability", xlabel="confidence", ylabel="right answers")
axis.legend(frameon=False, loc="upper left")
course.show(figure, "12_adaptive_rank")

# %% [markdown]
# Top left, the layers share the falling budget. Top right, a column is one
# triplet. Bottom left, histograms of $\sigma$, one line a variable: all began
# at one value, and where the loss is flat $h$ falls and $\sigma$ grows. Bottom
# right, dots are bins, larger with more examples. Below the diagonal Adam is
# surer than it may be; the average is better calibrated.
#
# ## Exercises
#
# 1. Estimate `snr_abs` for $m = 0$ from samples (the formula gives 1.3236).
# 2. Adam was given as many epochs as IVON. What if it stops after 16?

# %% [markdown]
# ### Solution 1
# It is the same for every $\sigma$, and not zero as the `snr` is.

# %% tags=["solution"]
theta = np.abs(rng.normal(0, [[0.01], [0.3]], (2, 1_000_000)))
assert np.abs(theta.mean(1) / theta.std(1) - 1.3236).max() < 0.01

# %% [markdown]
# ### Solution 2
# Overfitting makes Adam too sure. Stopping early mends much of it, but knowing
# when takes more labelled data.

# %% tags=["solution"]
model.set_weights(base_weights)
fit(keras.optimizers.Adam(2e-3), x, y, 16)
assert nll(predict(test_x)) < 0.95 * nll(predictions["Adam"])

# %% [markdown]
# ## Further reading
#
# - Zhang et al. 2023, AdaLoRA, arXiv 2303.10512: triplets and budget.
# - Shen et al. 2024, on IVON, arXiv 2402.17641: the optimizer.
# - Chen et al. 2024, arXiv 2409.10673: Bayesian criteria for AdaLoRA.
