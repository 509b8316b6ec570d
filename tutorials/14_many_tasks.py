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
# A small reader of digits is lost when they are turned by a quarter, and
# misses more than half of mirrored ones. Two adapters of 3,722 weights each,
# on one frozen base of 17,226, read more than nine in ten of both. What is
# hard: to serve both kinds from one model, because every mixture of the two
# reads each kind worse than its own adapter does.

# %% [markdown]
# What you see: on the left the three kinds of digits. In the middle the
# accuracy, mean of both tasks, of every mixture of the two adapters. Their
# average, halfway down the dashed line, is worse than its ends; their sum is
# the bright spot. On the right what each way to serve both tasks keeps of them.
# Only if each digit goes through its own adapter, nothing is lost.
#
# **You will learn**
#
# - to train, switch and mix adapters by name;
# - what lies between two adapters: their average, their sum, TIES;
# - to run a batch in which each example has its own adapter;
# - to save adapters together or apart, and to drop one.
#
# You need the digits of scikit-learn and about a minute. The page is about
# mechanics; they are the same on a language model.

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

import keras_spectral as ks
from keras_spectral import course

course.quiet()
keras.utils.set_random_seed(7)
data = course.digits()
print("backend:", keras.backend.backend())

# %% [markdown]
# All outputs below are of the backend that is printed here, and of one seed.
#
# ## A base that knows neither task
#
# The base reads upright digits. The two tasks are the same digits, turned by
# a quarter and mirrored: ten classes each, so that one test fits any mixture.

# %%
kinds = {  # of images (n, 8, 8, 1)
    "upright": lambda x: x,
    "turned": lambda x: np.rot90(x, axes=(1, 2)),
    "mirrored": lambda x: x[:, :, ::-1],
}
TASKS = ["turned", "mirrored"]


def flat(images):
    return np.ascontiguousarray(images).reshape(len(images), -1)  # (n, 64)


def new_base():
    hidden = [keras.layers.Dense(128, activation="relu", name="first")]
    hidden += [keras.layers.Dense(64, activation="relu", name="second")]
    head = keras.layers.Dense(10, name="head")
    return keras.Sequential([keras.Input((64,)), *hidden, head])


train = {name: flat(change(data.x)) for name, change in kinds.items()}
test = {name: flat(change(data.test_x)) for name, change in kinds.items()}
model = new_base()
course.train(model, train["upright"], data.y, 2e-3, 10 if course.FAST else 20)
base_weights = model.get_weights()
for name, images in test.items():
    print(f"{name:8} {course.accuracy(model, images, data.test_y):.1%}")

# %% [markdown]
# Chance is 10 %. Mirrored digits are easier, since 0 and 8 hardly change.
#
# ## Two adapters, two names
#
# `adapter=` names an adapter, `trainable="head"` gives each a copy of the
# head. A new name becomes the only active one, and it alone trains.

# %%
EPOCHS = 12 if course.FAST else 25
options = {"target": ["first", "second"], "trainable": "head", "rank": 8}
for name in TASKS:
    ks.wrap_model(model, "lora", adapter=name, seed=7, **options)
    course.train(model, train[name], data.y, 2e-3, EPOCHS)
    print(name, f"{course.count(model.trainable_weights):,} weights trained")
summary = ks.adapter_summary(model, rich.console.Console(width=90))

# %% [markdown]
# The one added last is active, the other is off. The base's own 17,226
# weights are what they were, bit for bit.
#
# ## Switch
#
# `set_adapters` says what is on. `train=[]` trains nothing: a model that only
# serves, for which no function is compiled anew, however often it switches.
# Guess before you look: does the adapter of turned digits help with mirrored
# ones, and does it still read upright digits?


# %%
def logits(active, task):
    ks.set_adapters(model, active, train=[])
    return model.predict(test[task], batch_size=497, verbose=0)  # (497, 10)


def right(active, task):
    return np.mean(logits(active, task).argmax(-1) == data.test_y)


actives = {"base": [], "turned": "turned", "mirrored": "mirrored"}
alone = {
    name: [right(active, task) for task in test]
    for name, active in actives.items()
}
course.table(
    "Accuracy with one adapter; one standard error is at most 2.2 points",
    ("active", *test),
    [(k, *(f"{share:.1%}" for share in row)) for k, row in alone.items()],
)

# %% [markdown]
# Each adapter reads its own task and not the other's, and has forgotten a part
# of the upright digits, which the base still reads.
#
# ## A line between two models
#
# Strengths mix kernels. With the adapters' changes $D_i$ of a kernel $K$, and
# a head that was trained to $w_i$ from $w$,
#
# $$K + \sum_i s_i D_i, \qquad w + \sum_i s_i (w_i - w) .$$
#
# We walk from one model, $s = (1, 0)$, to the other, $s = (0, 1)$. Guess
# again: what is in the middle? And at $s = (1, 1)$, off the line?


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
print(f"average of both: {middle.mean():.1%}, sum: {total.mean():.1%}")
print(f'half of "turned" alone, on its own task: {half:.1%}')

# %% tags=["plot"] alt="Accuracy on turned and on mirrored digits along the line from one adapter to the other. Turned falls from about 90 % to chance, mirrored rises from a third to above 90 %, and their mean is lowest near the middle."
BLUE, RED, GREY = "#2563eb", "#dc2626", "#6b7280"
figure, axis = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for column, (task, color) in enumerate(zip(TASKS, (RED, BLUE))):
    axis.plot(ws, 100 * line[:, column], "o-", ms=4, c=color, label=task)
axis.plot(ws, 100 * line.mean(axis=1), c="k", lw=2.5, label="mean of both")
axis.axhline(10, c=GREY, ls=":", lw=1)
axis.text(1, 11, "chance", ha="right", va="bottom", color=GREY)
axis.set(ylim=(0, 103), ylabel="accuracy in %")
axis.set(xlabel='w: "turned" with strength 1 - w and "mirrored" with w')
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "14_line")

# %% [markdown]
# The average is worse than either end, because half of an adapter does
# little. The sum keeps far more of both tasks, and still loses much against
# each adapter alone.
#
# ## One adapter made of two
#
# `set_adapters` mixes while the model runs. `combine_adapters` writes a
# mixture into a new adapter, of LoRA pairs, which needs the others no more:
#
# - `"cat"`: the pairs side by side, exactly;
# - `"svd"`: the best pair of a given rank;
# - `"ties_svd"`: of each change the share `density` of largest entries stays,
#   each entry elects a sign, and the mean of those that agree is taken;
# - `"linear"`: the factors A and B are summed apart, which costs nothing and
#   is an approximation.

# %%
one, less = dict.fromkeys(TASKS, 1.0), dict.fromkeys(TASKS, 0.5)
ways = {  # label: weights, method, options
    "average": (less, "cat", {}),
    "sum": (one, "cat", {}),
    "sum, rank 8": (one, "svd", {"rank": 8}),
    "TIES 20 %": (one, "ties_svd", {"density": 0.2, "rank": 32}),
    "TIES 50 %": (one, "ties_svd", {"density": 0.5, "rank": 32}),
    "factors apart": (one, "linear", {}),
}
made, rows = {}, []  # way: the accuracies of both tasks
for way, (weights, method, more) in ways.items():
    errors = ks.combine_adapters(model, weights, "mix", method, **more)
    made[way] = np.array([right("mix", task) for task in TASKS])
    shares = [f"{share:.1%}" for share in made[way]]
    rows.append((way, method, f"{max(errors.values()):.2f}", *shares))
    ks.delete_adapter(model, "mix")
course.table("Two adapters in one", ("way", "method", "cut off", *TASKS), rows)

# %% [markdown]
# *Cut off* is the share of the largest change (by its norm) that the rank
# could not hold; rank 8 is nearly enough for the sum. TIES at 50 % lies
# between average and sum here: where both tasks pull one way it takes the
# mean, and what it prunes is missed. Its authors merge more models, trained
# without adapters. Always look at every task.
#
# ## Each example its own adapter
#
# A server often knows whose request it has. Then nothing need be mixed: a
# `mixed_batch` sends each example of a batch through its own adapter, or
# through the base (`None`). The base's kernels run once for all of them.

# %%
rng = np.random.default_rng(7)
tasks = rng.choice(list(kinds), 497)  # of each example
x = np.stack([test[task][i] for i, task in enumerate(tasks)])  # (497, 64)
names = [task if task in TASKS else None for task in tasks]
with ks.mixed_batch(model, names):
    routed = model.predict(x, batch_size=497, verbose=0)  # (497, 10)
ks.set_adapters(model, one, train=[])
summed = model.predict(x, batch_size=497, verbose=0)
for name, z in (("own adapter", routed), ("sum for all", summed)):
    print(f"{name}: {np.mean(z.argmax(-1) == data.test_y):.1%}")

# %% tags=["plot"]
own = {task: alone[task][list(test).index(task)] for task in TASKS}
base = dict(zip(test, alone["base"]))


def draw_digits(figure):
    shown = [int(np.argmax(data.test_y == digit)) for digit in (2, 4, 7)]
    for row, axes in zip(kinds.items(), figure.subplots(3, 3)):
        name, change = row
        axes[1].set_title(name, fontsize=11)
        for axis, image in zip(axes, change(data.test_x[shown])):
            axis.imshow(image[..., 0], cmap="gray_r")
            axis.set(xticks=[], yticks=[])


def draw_mixtures(axis):
    image = axis.pcolormesh(steps, steps, 100 * np.array(grid), cmap="viridis")
    axis.figure.colorbar(image, ax=axis, label="mean accuracy in %", shrink=0.8)
    axis.plot([1, 0], [0, 1], "w--", lw=1.5)
    for a, b, text in ((0.5, 0.5, "average"), (1, 1, "sum")):
        axis.plot(a, b, "o", c="w", mec="k", ms=8)
        axis.annotate(
            text,
            (a, b),
            (0, 10),
            textcoords="offset points",
            ha="center",
            fontsize=11,
            bbox={"fc": "w", "ec": "none", "alpha": 0.75, "pad": 1.5},
        )
    ticks = [0, 0.5, 1, 1.5]
    axis.set(aspect="equal", xticks=ticks, yticks=ticks)
    axis.set_xlabel('strength of "turned"')
    axis.set(ylabel='strength of "mirrored"', title="all mixtures")


def draw_ways(axis):
    bars = {"own adapter": [own[task] for task in TASKS], **made}
    bars["base"] = [base[task] for task in TASKS]
    places = np.arange(len(bars))[::-1]
    for column, (task, color) in enumerate(zip(TASKS, (RED, BLUE))):
        widths = [100 * shares[column] for shares in bars.values()]
        up = places + 0.2 - 0.4 * column
        axis.barh(up, widths, 0.4, color=color, label=f"{task} digits")
    axis.axvline(10, c="k", ls=":", lw=1)
    axis.set(yticks=places, yticklabels=list(bars), xlim=(0, 103))
    axis.set(xlabel="accuracy in % (dotted: chance)")
    axis.legend(
        frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1)
    )
    axis.spines[["top", "right"]].set_visible(False)


def draw_tasks():
    figure = plt.figure(figsize=(12.5, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(0.7, 1.25, 1.2))
    draw_digits(left)
    draw_mixtures(middle.subplots())
    draw_ways(right.subplots())
    course.show(figure, "14_many_tasks")


# %% tags=["picture"] alt="Left: digits upright, turned by a quarter and mirrored. Middle: heat map of the mean accuracy over the strengths of two adapters, darker at the average of both than at either adapter, and brightest near their sum. Right: bars of accuracy on both tasks; own adapters are above 90 %, the sum and its rank 8 version keep less, TIES and the average much less, the base least on turned digits."
draw_tasks()

# %% [markdown]
# Every mixture on the walk is on the dashed line, and the best place is not
# on it. A mixture is for requests of which the task is not known, or of which
# the tasks come together.
#
# ## Files
#
# One file holds all adapters, or one each. Names and strengths come back;
# `adapter=` renames or picks. Heads are inside, the base is not.

# %%
other = new_base()
other.set_weights(base_weights)
with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    ks.set_adapters(model, {"turned": 0.7, "mirrored": 0.3})
    ks.save_adapters(model, folder / "both.safetensors")
    for name in TASKS:
        ks.save_adapters(model, folder / f"{name}.safetensors", adapter=name)
    for file in sorted(folder.iterdir()):
        print(f"{file.name:21} {file.stat().st_size:7,} bytes")
    ks.load_adapters(other, folder / "both.safetensors")
    want, got = (m.predict(test["turned"], verbose=0) for m in (model, other))
    ks.unwrap_model(other)
    ks.load_adapters(other, folder / "turned.safetensors")
    ks.load_adapters(other, folder / "mirrored.safetensors", adapter="glass")
print("adapters:", ks.adapter_names(other))

# %% [markdown]
# ## Drop one
#
# The others stay as they are. The last one is dropped by `unwrap_model`.

# %%
ks.delete_adapter(other, "turned")
ks.set_adapters(other, "glass")
print(f"glass: {course.accuracy(other, test['mirrored'], data.test_y):.1%}")

# %% [markdown]
# ## Checks

# %% tags=["checks"]
with ks.unwrapped(model):
    for now, before in zip(model.get_weights(), base_weights, strict=True):
        np.testing.assert_array_equal(now, before)
ks.set_adapters(model, "turned")  # it would train on from here
paths = [weight.path for weight in model.trainable_weights]
assert len(paths) == 6 and all("/turned/" in path for path in paths)
pairs, head = 8 * ((64 + 128) + (128 + 64)), 64 * 10 + 10
assert course.count(model.trainable_weights) == pairs + head == 3722
assert base["upright"] > 0.9 and max(base[task] for task in TASKS) < 0.6
for name, task in (("turned", "mirrored"), ("mirrored", "turned")):
    assert own[name] > 0.8 > 0.6 > alone[name][list(test).index(task)]

# The walk: its ends are the adapters, its middle is a valley.
assert abs(line[0][0] - own["turned"]) < 0.003
assert abs(line[-1][1] - own["mirrored"]) < 0.003
assert half < 0.5
assert middle.mean() < min(line[0].mean(), line[-1].mean())
assert middle.mean() + 0.1 < total.mean() < np.mean([*own.values()]) - 0.05
assert np.abs(made["sum"] - total).max() < 0.005
assert np.abs(made["average"] - middle).max() < 0.005
assert np.abs(made["sum, rank 8"] - total).max() < 0.1
assert made["TIES 50 %"].mean() > middle.mean()

# A mixed batch gives what each adapter gives; so do files.
exact = {task: logits(task, task) for task in TASKS}
exact["upright"] = logits([], "upright")
expected = [exact[task][i] for i, task in enumerate(tasks)]
np.testing.assert_allclose(routed, expected, rtol=1e-3, atol=1e-3)
np.testing.assert_array_equal(logits("turned", "turned"), exact["turned"])
np.testing.assert_allclose(got, want, atol=1e-4)
assert ks.adapter_names(other) == ["glass"]
got = other.predict(test["mirrored"], batch_size=497, verbose=0)
np.testing.assert_allclose(got, exact["mirrored"], atol=1e-4)
ks.unwrap_model(other)
for now, before in zip(other.get_weights(), base_weights, strict=True):
    np.testing.assert_array_equal(now, before)

# %% [markdown]
# ## Exercises
#
# 1. Choose the best strengths on one half of the test images, and measure
#    them on the other half. Do they beat the sum there?
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
ks.wrap_model(model, "lora", adapter="flipped", seed=7, **options)
course.train(model, flat(data.x[:, ::-1]), data.y, 2e-3, EPOCHS)
single = course.accuracy(model, test["flipped"], data.test_y)
three = [*TASKS, "flipped"]
shares = [right(three, task) for task in three]
print(f"alone {single:.1%}, mean of the sum of three {np.mean(shares):.1%}")
assert np.mean(shares) < total.mean()

# %% [markdown]
# ## Further reading
#
# - Ilharco et al., *Task arithmetic*, arXiv 2212.04089: sums of changes.
# - Yadav et al., *TIES*, arXiv 2306.01708: signs against interference.
# - Yu et al., *DARE*, arXiv 2311.03099: drop most of a change at random
#   (`"dare_linear_svd"`, `"dare_ties_svd"`).
# - Sheng et al., *S-LoRA*, arXiv 2311.03285: mixed batches at scale.
