# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One base, many tasks
#
# A small reader of digits fails when they are turned or mirrored: 10 and 43 %
# are right. Two adapters of 3,722 weights each, on one frozen base, read 93 and
# 97 %. Is there a single model between them that reads both?
#
# **You will learn**
#
# - to train, switch and mix adapters by name,
# - what lies between two adapters: their average, their sum, TIES,
# - to run a batch in which each example has its own adapter,
# - to save adapters together or apart, and to drop one.
#
# About a minute on a laptop. The backend is changed in one line.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pathlib
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table

import keras_spectral as ks
from keras_spectral import course

data = course.digits()
TASKS = {  # name: what it does to images (n, 8, 8, 1)
    "turned": lambda x: np.rot90(x, axes=(1, 2)),
    "mirrored": lambda x: x[:, :, ::-1],
}
kinds = {"upright": lambda x: x, **TASKS}
figure, axes = plt.subplots(3, 8, figsize=(6, 2.4), layout="constrained")
for row, (name, change) in zip(axes, kinds.items()):
    row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axis, image in zip(row, change(data.test_x[:8])):
        axis.imshow(image[..., 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[])

# %% [markdown]
# The base reads upright digits. The two tasks are the same digits, turned by a
# quarter and mirrored: ten classes each, so that one test fits any mixture.
#
# ## A base that knows neither

# %%
course.quiet()
console = rich.console.Console(width=90)
keras.utils.set_random_seed(7)
print("backend:", keras.backend.backend(), "- data:", data.name)


def flat(images):
    return np.ascontiguousarray(images).reshape(len(images), -1)  # (n, 64)


def new_base():
    hidden = [keras.layers.Dense(128, activation="relu", name="first")]
    hidden += [keras.layers.Dense(64, activation="relu", name="second")]
    head = keras.layers.Dense(10, name="head")
    return keras.Sequential([keras.Input((64,)), *hidden, head])


train = {name: flat(change(data.x)) for name, change in kinds.items()}
test = {name: flat(change(data.test_x)) for name, change in kinds.items()}


def accuracy(task):
    return course.accuracy(model, test[task], data.test_y)


model = new_base()
course.train(model, train["upright"], data.y, 2e-3, 10 if course.FAST else 20)
base_weights = model.get_weights()
print({task: f"{accuracy(task):.1%}" for task in test})
assert accuracy("upright") > 0.9
assert max(map(accuracy, TASKS)) < 0.6

# %% [markdown]
# ## Two adapters, two names
#
# `adapter=` names an adapter, `trainable="head"` gives each a copy of the head.
# A new name becomes the only active one, and it alone trains.

# %%
EPOCHS = 12 if course.FAST else 25
hidden = ["first", "second"]
options = {"target": hidden, "trainable": "head", "rank": 8, "seed": 7}
for name in TASKS:
    ks.wrap_model(model, "lora", adapter=name, **options)
    course.train(model, train[name], data.y, 2e-3, EPOCHS)
    print(f"{name}: {accuracy(name):.1%}")

pairs = 8 * ((64 + 128) + (128 + 64))
head = 64 * 10 + 10
assert course.count(model.trainable_weights) == pairs + head == 3722
assert ks.adapter_names(model) == ["turned", "mirrored"]
summary = ks.adapter_summary(model, console)

# %% [markdown]
# The one added last is active, the other is off. Each has 3,722 weights, whose
# paths hold its name; the base has 17,226, and not a bit of it has changed.

# %%
with ks.unwrapped(model):
    for now, before in zip(model.get_weights(), base_weights, strict=True):
        assert np.array_equal(now, before)
ks.set_adapters(model, "turned")  # it would train on from here
paths = [weight.path for weight in model.trainable_weights]
assert len(paths) == 6 and all("/turned/" in path for path in paths)
print(*paths, sep="\n")

# %% [markdown]
# ## Switch
#
# `set_adapters` says what is on. `train=[]` trains nothing: a model that only
# serves, for which no function is compiled anew, however often it switches.


# %%
def logits(active, task):
    ks.set_adapters(model, active, train=[])
    return model.predict(test[task], batch_size=497, verbose=0)  # (497, 10)


def right(active, task):
    return np.mean(logits(active, task).argmax(-1) == data.test_y)


own = {name: logits(name, name) for name in TASKS}
alone = {  # (active, task): accuracy
    (active or "base", task): right(active, task)
    for active in ([], "turned", "mirrored")
    for task in test
}
for name in TASKS:  # exactly what it was, whatever was active meanwhile
    assert np.array_equal(logits(name, name), own[name])

table = rich.table.Table(title="Accuracy with one adapter")
for heading in ("active", *test):
    table.add_column(heading, justify="right")
for active in ("base", *TASKS):
    shares = [f"{alone[active, task]:.1%}" for task in test]
    table.add_row(active, *shares)
console.print(table)
for name, other in (("turned", "mirrored"), ("mirrored", "turned")):
    assert alone[name, name] > 0.8 and alone[name, other] < 0.6

# %% [markdown]
# Each adapter reads its own task and neither of the others.
#
# ## A line between two models
#
# Strengths mix kernels. With the adapters' changes $D_i$ of a kernel $K$, and
# a head that was trained to $w_i$ from $w$,
#
# $$K + \sum_i s_i D_i, \qquad w + \sum_i s_i (w_i - w) .$$
#
# We walk from one model, $s = (1, 0)$, to the other, $s = (0, 1)$. Guess
# before you look: what is in the middle? And at $s = (1, 1)$?


# %%
def both(turned, mirrored):  # the accuracies of both tasks
    strengths = {"turned": turned, "mirrored": mirrored}
    return np.array([right(strengths, task) for task in TASKS])  # (2,)


ws = np.linspace(0, 1, 5 if course.FAST else 11)
line = np.array([both(1 - w, w) for w in ws])  # (ws, 2)
steps = np.linspace(0, 1.5, 4 if course.FAST else 7)
grid = [[both(a, b).mean() for a in steps] for b in steps]  # [mirrored][turned]
middle, total = line[len(ws) // 2], both(1, 1)
half = right({"turned": 0.5}, "turned")
print("average:", middle.round(3), "sum:", total.round(3))
print(f'half of "turned" alone: {half:.1%}')

assert abs(line[0][0] - alone["turned", "turned"]) < 0.003
assert abs(line[-1][1] - alone["mirrored", "mirrored"]) < 0.003
assert half < 0.5
assert middle.mean() < min(line[0].mean(), line[-1].mean())  # a valley
assert total.mean() > middle.mean() + 0.1
assert total.mean() < np.mean([alone[t, t] for t in TASKS]) - 0.05

# %% [markdown]
# The average is worse than either end, because half of an adapter does little.
# The sum keeps far more of both tasks, and still loses much against each
# adapter alone.
#
# ## One adapter made of two
#
# `set_adapters` mixes while the model runs. `combine_adapters` writes a mixture
# into a new adapter, of LoRA pairs, which needs the others no more:
#
# - `"cat"`: the pairs side by side, exactly;
# - `"svd"`: the best pair of a given rank;
# - `"ties_svd"`: of each change the share `density` of largest entries stays,
#   each entry elects a sign, and the mean of those that agree is taken;
# - `"linear"`: the factors A and B are summed apart, which costs nothing and
#   is an approximation.

# %%
ones = {"turned": 1.0, "mirrored": 1.0}
halves = {"turned": 0.5, "mirrored": 0.5}
ways = {  # label: weights, method, options
    "average": (halves, "cat", {}),
    "sum": (ones, "cat", {}),
    "sum, rank 8": (ones, "svd", {"rank": 8}),
    "TIES 20 %": (ones, "ties_svd", {"density": 0.2, "rank": 32}),
    "TIES 50 %": (ones, "ties_svd", {"density": 0.5, "rank": 32}),
    "factors apart": (ones, "linear", {}),
}
table = rich.table.Table(title="Two adapters in one")
for heading in ("way", "method", "rank", "cut off", *TASKS):
    table.add_column(heading, justify="right")
made = {}  # way: the accuracies of both tasks
for way, (weights, method, more) in ways.items():
    errors = ks.combine_adapters(model, weights, "mix", method, **more)
    made[way] = np.array([right("mix", task) for task in TASKS])
    rank = model.get_layer("first").members()[-1].rank
    shares = [f"{share:.1%}" for share in made[way]]
    table.add_row(
        way, method, str(rank), f"{max(errors.values()):.2f}", *shares
    )
    ks.delete_adapter(model, "mix")
console.print(table)

assert np.abs(made["sum"] - total).max() < 0.005
assert np.abs(made["average"] - middle).max() < 0.005
assert np.abs(made["sum, rank 8"] - total).max() < 0.1
assert made["TIES 50 %"].mean() > middle.mean()

# %% [markdown]
# *Cut off* is the share of the largest change (by its norm) that the rank could
# not hold; rank 8 is nearly enough for the sum. TIES at 50 % lies between
# average and sum here, as in each of 12 runs with other seeds: where both tasks
# pull one way it takes the mean, and what it prunes is missed. Its authors
# merge more models, trained without adapters. Always look at every task.
#
# ## Each example its own adapter
#
# A server often knows whose request it has. Then nothing need be mixed: a
# `mixed_batch` sends each example of a batch through its own adapter, or
# through the base. The base's kernels run once for all of them.

# %%
rng = np.random.default_rng(7)
tasks = rng.choice(list(kinds), 497)  # of each example
x = np.stack([test[task][i] for i, task in enumerate(tasks)])  # (497, 64)
names = [task if task in TASKS else None for task in tasks]
with ks.mixed_batch(model, names):
    routed = model.predict(x, batch_size=497, verbose=0)  # (497, 10)

own["upright"] = logits([], "upright")
expected = [own[task][i] for i, task in enumerate(tasks)]
assert np.allclose(routed, expected, rtol=1e-3, atol=1e-3)
ks.set_adapters(model, ones, train=[])
summed = model.predict(x, batch_size=497, verbose=0)
shares = [np.mean(z.argmax(-1) == data.test_y) for z in (routed, summed)]
print("its own: {:.1%}, the sum for all: {:.1%}".format(*shares))
assert shares[0] > shares[1] + 0.1

# %%
BLUE, RED, GREY, GREEN = "#2563eb", "#dc2626", "#9ca3af", "#059669"
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
for column, (task, color) in enumerate(zip(TASKS, (RED, BLUE))):
    label = f"{task} digits"
    axes[0].plot(ws, 100 * line[:, column], "o-", ms=4, c=color, label=label)
    axes[0].axhline(100 * alone[task, task], c=color, ls=":", lw=1)
axes[0].plot(ws, 100 * line.mean(axis=1), c="k", lw=1, label="mean")
axes[0].legend(frameon=False)
axes[0].set(title='From "turned" to "mirrored"', ylim=(0, 103))
axes[0].set(xlabel="w, strengths 1 - w and w", ylabel="accuracy in %")

image = axes[1].pcolormesh(steps, steps, 100 * np.array(grid))
figure.colorbar(image, ax=axes[1], label="mean accuracy in %")
axes[1].plot([1, 0], [0, 1], "w--", lw=1)
for a, b, text in ((0.5, 0.5, "average"), (1, 1, "sum")):
    axes[1].plot(a, b, "ko", ms=6)
    axes[1].annotate(text, (a, b), (6, 6), textcoords="offset points")
axes[1].set(title="All mixtures", aspect="equal")
axes[1].set(xlabel='strength of "turned"', ylabel='strength of "mirrored"')

bars = {"own adapter": [alone[task, task] for task in TASKS], **made}
bars["base"] = [alone["base", task] for task in TASKS]
places = np.arange(len(bars))[::-1]
for column, color in enumerate((RED, BLUE)):
    widths = [100 * shares[column] for shares in bars.values()]
    axes[2].barh(places + 0.2 - 0.4 * column, widths, 0.4, color=color)
axes[2].axvline(10, c=GREY, ls="--", lw=1)
axes[2].set(title="Ways to serve both (dashed: chance)", xlim=(0, 103))
axes[2].set(yticks=places, yticklabels=list(bars), xlabel="accuracy in %")
for axis in axes[::2]:
    axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "14_many_tasks")

# %% [markdown]
# Left, the walk from one adapter to the other passes through a valley: dotted
# are the two adapters alone. In the middle, every mixture by its mean accuracy;
# the walk is the dashed line, and the best place is not on it. Right, what each
# way keeps. A mixture is for requests of which the task is not known, or of
# which the tasks come together.
#
# ## Files
#
# One file for all adapters, or one for each. Names and strengths come back;
# `adapter=` renames or picks. Heads are inside, the base is not.

# %%
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    ks.set_adapters(model, {"turned": 0.7, "mirrored": 0.3})
    ks.save_adapters(model, folder / "both.safetensors")
    for name in TASKS:
        ks.save_adapters(model, folder / f"{name}.safetensors", adapter=name)
    for file in sorted(folder.iterdir()):
        print(f"{file.name:21} {file.stat().st_size:7,} bytes")

    other = new_base()
    other.set_weights(base_weights)
    ks.load_adapters(other, folder / "both.safetensors")
    want = model.predict(test["turned"], verbose=0)
    got = other.predict(test["turned"], verbose=0)
    assert np.allclose(got, want, atol=1e-4)

    ks.unwrap_model(other)
    ks.load_adapters(other, folder / "turned.safetensors")
    ks.load_adapters(other, folder / "mirrored.safetensors", adapter="glass")
assert ks.adapter_names(other) == ["turned", "glass"]

# %% [markdown]
# ## Drop one
#
# The others stay as they are. The last one is dropped by `unwrap_model`.

# %%
ks.delete_adapter(other, "turned")
ks.set_adapters(other, "glass")
assert ks.adapter_names(other) == ["glass"]
got = other.predict(test["mirrored"], batch_size=497, verbose=0)
assert np.allclose(got, own["mirrored"], atol=1e-4)
ks.unwrap_model(other)
for now, before in zip(other.get_weights(), base_weights, strict=True):
    assert np.array_equal(now, before)

# %% [markdown]
# ## Exercises
#
# 1. Choose the best strengths on one half of the test images, and measure them
#    on the other half. Do they beat the sum there?
# 2. Train a third adapter, for digits upside down. What does the sum of three
#    keep?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
chosen, kept = np.arange(497) % 2 == 0, np.arange(497) % 2 == 1
scores = {}  # strengths: accuracy on one half, on the other
for a in steps[1:]:
    for b in steps[1:]:
        found = [logits({"turned": a, "mirrored": b}, t) for t in TASKS]
        hits = np.array(found).argmax(-1) == data.test_y  # (2, 497)
        scores[a, b] = hits[:, chosen].mean(), hits[:, kept].mean()
best = max(scores, key=lambda pair: scores[pair][0])
strengths = "strengths {:.2f} and {:.2f}".format(*best)
print(f"{strengths}: {scores[best][1]:.1%}, sum: {scores[1.0, 1.0][1]:.1%}")
assert scores[best][1] > middle.mean()

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
test["flipped"] = flat(data.test_x[:, ::-1])
ks.wrap_model(model, "lora", adapter="flipped", **options)
course.train(model, flat(data.x[:, ::-1]), data.y, 2e-3, EPOCHS)
single, three = accuracy("flipped"), [*TASKS, "flipped"]
shares = [right(three, task) for task in three]
print(f"alone {single:.1%}, the sum of three:", np.round(shares, 3))
assert np.mean(shares) < total.mean()

# %% [markdown]
# ## Further reading
#
# - Ilharco et al., *Task arithmetic*, arXiv 2212.04089: sums of changes.
# - Yadav et al., *TIES*, arXiv 2306.01708: signs against interference.
# - Yu et al., *DARE*, arXiv 2311.03099: drop most of a change at random
#   (`"dare_linear_svd"`, `"dare_ties_svd"`).
# - Sheng et al., *S-LoRA*, arXiv 2311.03285: mixed batches at scale.
