# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LoRA by hand: four directions instead of a whole matrix
#
# We write LoRA in twelve lines of Keras, see that the library's layer does the
# same, and turn one knob: the rank. A model that reads upright digits learns to
# read digits that lie on their side, from 10 % right to about 94 %, with 7 % of
# the numbers that its two kernels hold. What is hard to believe about it: the
# exact answer to this task is a change of rank 48, out of 64.

# %% [markdown]
# *What you see:* above, everything to scale, a trained kernel $K$ of 64 x 128
# numbers, the pair $A$, $B$ of rank 4 that was trained beside it, and their
# product, which is what the kernel changes by. Red is positive, blue negative.
# Below on the left, how the accuracy grows with the rank; on the right, the
# singular values of three changes of that kernel.
#
# **You will learn**
#
# - what rank and alpha are, and why one of the two factors starts at zero;
# - how many numbers LoRA trains, and why Keras's own LoRA trains six times as
#   many on the query layer of a BERT;
# - to read accuracy against rank, and a spectrum.
#
# It uses scikit-learn's digits and takes about a minute on two CPU cores.
# Change `"jax"` below for another backend; all outputs are of the backend that
# is printed.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On steps this small PyTorch's threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import ops

import keras_spectral as ks
from keras_spectral import course

course.quiet()
keras.utils.set_random_seed(7)
data = course.digits()
print("backend:", keras.backend.backend())
print("data:", data.name)

# %% tags=["plot"]
BLUE, RED, GREY = "#2563eb", "#dc2626", "#6b7280"


def draw_matrix(axis, matrix, x, y, name):
    """A heat map of unit squares, its left upper corner at x, y."""
    height, width = matrix.shape
    limit = np.quantile(np.abs(matrix), 0.99)
    axis.imshow(
        matrix,
        cmap="coolwarm",
        vmin=-limit,
        vmax=limit,
        extent=(x, x + width, y + height, y),
        interpolation="none",
    )
    axis.add_patch(
        plt.Rectangle((x, y), width, height, fill=False, ec="black", lw=0.6)
    )
    text = f"{name}\n{height} x {width} = {height * width:,}"
    place = (x + width / 2, max(y + height, 64) + 5)
    axis.text(*place, text, ha="center", va="top", fontsize=10)


def draw_equation(axis, kernel, a, b):
    """K and the pair beside it, and what the pair amounts to."""
    draw_matrix(axis, kernel, 0, 0, "K, frozen")
    draw_matrix(axis, a, 163, 0, "A")
    draw_matrix(axis, b, 195, 30, "B")
    draw_matrix(axis, a @ b, 350, 0, "A B")
    for x, sign in ((141, "+"), (180, "·"), (336, "=")):
        axis.text(x, 32, sign, ha="center", va="center", fontsize=16)
    axis.set(xlim=(-2, 482), ylim=(90, -2))
    axis.axis("off")


def draw_ranks(axis):
    """Accuracy against rank, the twin and three levels."""
    low, middle, high = np.quantile(after, (0, 0.5, 1), axis=1)
    axis.fill_between(ranks, low, high, color=BLUE, alpha=0.2, lw=0)
    label = f"LoRA, {len(seeds)} seeds" if len(seeds) > 1 else "LoRA"
    axis.plot(ranks, middle, "o-", color=BLUE, label=label)
    axis.plot(ranks, cut, "s--", color="#d97706", label="whole change, cut")
    for level, name, below in (
        (whole, "both kernels", False),
        (head_only, "head only", True),
        (before, "not adapted (chance: 0.1)", True),
    ):
        axis.axhline(level, color=GREY, ls=":", lw=1)
        place = (ranks[-1] * 1.1, level + (-0.015 if below else 0.015))
        where = {"ha": "right", "va": "top" if below else "bottom"}
        axis.text(*place, name, color=GREY, fontsize=9, **where)
    axis.set_xscale("log", base=2)
    names = [f"{r}\n{r * 448 / 24_576:.0%}" for r in ranks]
    axis.set_xticks(ranks, names)
    axis.set_xlabel("rank, and share of the kernels' numbers that trains")
    axis.set(ylabel="test accuracy", ylim=(0, 1.08))
    axis.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.4))


def draw_spectra(axis):
    """Singular values of three changes of the first kernel."""
    for name, change, color, style in (
        ("exact: turn the kernel", exact, GREY, "-"),
        ("all numbers train", changes[0], "#d97706", "--"),
        ("LoRA, rank 4", pair[0] @ pair[1], BLUE, "o-"),
    ):
        values = np.linalg.svd(change, compute_uv=False)
        values = values[values > 1e-4 * values[0]]
        places = np.arange(1, len(values) + 1)
        axis.plot(places, values, style, color=color, label=name, ms=5)
    axis.set(xlabel="direction", ylabel="singular value", ylim=(0, None))
    axis.set_xticks([1, 4, 16, 32, 48, 64])
    axis.legend(frameon=False)


def draw_all():
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[0.85, 1])
    draw_equation(figure.add_subplot(grid[0, :]), first_kernel, *pair)
    left, right = (figure.add_subplot(grid[1, i]) for i in (0, 1))
    draw_ranks(left)
    left.set_title("Digits on their side: accuracy against rank", fontsize=11)
    draw_spectra(right)
    right.set_title("The first kernel's change: its spectrum", fontsize=11)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


# %% [markdown]
# ## A correction of low rank
#
# A Dense layer without its activation is $y = x K + b$ with a kernel $K$ of
# $n_{in} \times n_{out}$ numbers. To fine-tune it is to find a change of that
# size. LoRA bets that a good change has a low rank $r$, which makes it a
# product of two thin matrices:
#
# $$y = x K + b + \frac{\alpha}{r}\, (x A) B, \qquad
# A: n_{in} \times r, \quad B: r \times n_{out}$$
#
# The brackets matter. Computed from the left, $x A$ has only $r$ columns, and
# the matrix $A B$ of full size is never made.


# %%
class HandLoRA(keras.layers.Layer):
    def __init__(self, dense, rank, alpha):
        super().__init__()
        self.dense = dense
        dense.trainable = False
        n_in, n_out = dense.kernel.shape
        start = keras.initializers.RandomUniform(-(n_in**-0.5), n_in**-0.5)
        self.a = self.add_weight(shape=(n_in, rank), initializer=start)
        self.b = self.add_weight(shape=(rank, n_out), initializer="zeros")
        self.scale = alpha / rank

    def call(self, x):  # (batch, n_in)
        thin = ops.matmul(x, self.a)  # (batch, r)
        return self.dense(x) + self.scale * ops.matmul(thin, self.b)


dense = keras.layers.Dense(48)
dense.build((None, 32))
hand = HandLoRA(dense, rank=4, alpha=8)
x = keras.random.normal((5, 32), seed=2)
start = ops.convert_to_numpy(hand(x) - dense(x))  # (5, 48)
print("largest difference to the base:", np.abs(start).max())

# %% [markdown]
# $A$ starts random and $B$ at zero, so $A B$ is zero and training begins
# exactly at the base model. Both at zero would never move: the gradient of
# each factor is a product with the other one.
#
# `ks.LoRADense` is this layer, plus what one needs in practice: the base's
# activation stays outside of the sum, masks pass through, other kinds of
# layers fit, and the correction can be merged. With the same factors it gives
# the same outputs.

# %%
layer = ks.LoRADense(dense, rank=4, alpha=8)
layer.build((None, 32))
rng = np.random.default_rng(0)
for mine, theirs in ((hand.a, layer.lora_a), (hand.b, layer.lora_b)):
    values = rng.normal(0, 0.1, mine.shape)
    mine.assign(values)
    theirs.assign(values)
difference = np.abs(ops.convert_to_numpy(hand(x) - layer(x))).max()
print(f"by hand against LoRADense: {difference:.1e}")

# %% [markdown]
# What is left is at most the rounding of float32.
#
# ## What alpha is for
#
# The correction is multiplied by $\alpha / r$. It is a setting and no weight.
# With $\alpha$ fixed, a sum over 16 directions weighs each of them a quarter
# as much as a sum over 4, so that one learning rate serves several ranks.
# Guess: what does twice the $\alpha$ do to the correction?

# %%
corrections = []
for alpha in (8, 16):
    layer.scale.assign(alpha / 4)
    change = ops.norm(layer(x) - dense(x))
    corrections.append(float(ops.convert_to_numpy(change)))
    print(f"alpha {alpha:2}: size of the correction {corrections[-1]:.3f}")

# %% [markdown]
# It doubles. If you name no `alpha`, `ks.LoRADense` takes `alpha = rank`, and
# the scale is 1.
#
# ## Counting, and a factor of six
#
# LoRA trains $r (n_{in} + n_{out})$ numbers a layer. Keras has a LoRA of its
# own, `layer.enable_lora(rank)`. On a Dense layer it trains as many. But the
# attention of a transformer is made of `EinsumDense` layers, whose kernel has
# three axes: width x heads x head size. `enable_lora` splits off the last axis
# alone, so that each of the heads gets an $A$ of its own:
#
# $$r\,(384 \cdot 12 + 32) = 4640\, r \quad\text{instead of}\quad
# r\,(384 + 12 \cdot 32) = 768\, r$$
#
# for the query layer of MiniLM. `LoRADense` sees the matrix behind the
# kernel, 384 x 384.

# %%
RANK = 8


def query():
    equation = "btd,dnh->btnh"  # (batch, tokens, 384) -> (.., 12, 32)
    einsum = keras.layers.EinsumDense(equation, (None, 12, 32))
    einsum.build((None, None, 384))
    return einsum


own = query()
own.enable_lora(RANK)
ours = ks.LoRADense(query(), rank=RANK)
ours.build((None, None, 384))
print([course.count(each.trainable_weights) for each in (own, ours)])

# %% tags=["plot"] alt="The query kernel of MiniLM, 384 x 384, drawn to scale with what trains beside it at rank 8. With enable_lora these are twelve tall strips of 384 x 8 and one small block of 8 x 32; with LoRADense one tall strip of 384 x 8 and one wide strip of 8 x 384."
frozen = 384 * 384
counts = {
    "the kernel itself": frozen,
    "Keras's enable_lora": course.count(own.trainable_weights),
    "LoRADense": course.count(ours.trainable_weights),
}
course.table(
    f"Query layer of MiniLM, rank {RANK}",
    ["what trains", "numbers", "share"],
    [(k, f"{n:,}", f"{n / frozen:.0%}") for k, n in counts.items()],
)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
sides = {
    "Keras's enable_lora: an A for each head, one B": [
        *((420 + 20 * head, 0, 8, 384) for head in range(12)),
        (420, 410, 32, 8),
    ],
    "LoRADense: one A, one B": [(420, 0, 8, 384), (0, 410, 384, 8)],
}
for axis, (title, boxes) in zip(axes, sides.items()):
    axis.add_patch(plt.Rectangle((0, 0), 384, 384, fc="#d1d5db", ec="none"))
    axis.text(192, 192, "K\n384 x 384", ha="center", va="center", fontsize=12)
    for left, top, width, height in boxes:
        axis.add_patch(plt.Rectangle((left, top), width, height, fc=BLUE))
    numbers = sum(width * height for _, _, width, height in boxes)
    axis.text(424, 440, f"{numbers:,} numbers", color=BLUE, va="top")
    axis.set(xlim=(-5, 680), ylim=(465, -5), aspect="equal")
    axis.set_title(title, fontsize=11, loc="left")
    axis.axis("off")
course.show(figure, "02_enable_lora")

# %% [markdown]
# Blue is what trains. The twelve strips on the left are the factor of six.
#
# ## A task that is far away
#
# A net of two hidden layers learns upright digits. Then the images are turned
# by a quarter, which permutes the 64 pixels: to the first layer everything is
# new. Only the two kernels shall change; the head stays as it is.

# %%
x, test_x = (a.reshape(len(a), 64) for a in (data.x, data.test_x))
rows = np.rot90(np.arange(64).reshape(8, 8)).ravel()
turned, test_turned = x[:, rows], test_x[:, rows]  # (1300, 64), (497, 64)
model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(128, "relu", use_bias=False, name="first"),
        keras.layers.Dense(128, "relu", use_bias=False, name="second"),
        keras.layers.Dense(10, name="head"),
    ]
)
EPOCHS = 6 if course.FAST else 15
course.train(model, x, data.y, 3e-3, EPOCHS)
base = model.get_weights()  # (64, 128), (128, 128), (128, 10), (10,)
upright = course.accuracy(model, test_x, data.test_y)
before = course.accuracy(model, test_turned, data.test_y)
print(f"upright {upright:.1%}, turned {before:.1%}")

# %% [markdown]
# We know an exact answer: turn each column of the first kernel as the images
# were turned, and the model does as well as before. How many directions does
# this change have?

# %%
first_kernel = base[0]  # (64, 128)
exact = first_kernel[rows] - first_kernel
model.set_weights([first_kernel + exact, *base[1:]])
exactly = course.accuracy(model, test_turned, data.test_y)
rank_of_exact = np.linalg.matrix_rank(exact)
print(f"{exactly:.1%} right with a change of rank {rank_of_exact}")

# %% [markdown]
# Of 64 possible directions the exact change takes most. So much for a low
# rank, one might think. Guess: at which rank does LoRA get near the model
# whose kernels train whole?

# %%
seeds = (7,) if course.FAST else (7, 8, 9)
ranks = (1, 4) if course.FAST else (1, 2, 4, 8, 16, 32)
after = np.zeros((len(ranks), len(seeds)))
trained = []
for i, rank in enumerate(ranks):
    for j, seed in enumerate(seeds):
        model.set_weights(base)
        ks.wrap_model(model, "lora", ["first", "second"], rank=rank, seed=seed)
        course.train(model, turned, data.y, 1e-2, EPOCHS)
        after[i, j] = course.accuracy(model, test_turned, data.test_y)
        if (rank, seed) == (4, 7):
            first = model.get_layer("first")
            pair = [ops.convert_to_numpy(first.lora_a)]  # (64, 4)
            pair += [ops.convert_to_numpy(first.lora_b)]  # (4, 128)
        trained.append(course.count(model.trainable_weights))
        ks.unwrap_model(model)  # the base, bit for bit
kept = model.get_weights()
print({r: f"{v:.1%}" for r, v in zip(ranks, after.mean(axis=1))})

# %% [markdown]
# Two rivals: the head alone, 1,290 numbers, which is nearly the budget of rank
# 3; and both kernels whole, all 24,576 numbers. From the latter we also get a
# twin of LoRA: its change, cut to rank $r$ by the singular value
# decomposition, the best approximation of that rank.


# %%
def tune(names, rate):
    model.set_weights(base)
    for name in ("first", "second", "head"):
        model.get_layer(name).trainable = name in names
    course.train(model, turned, data.y, rate, EPOCHS)
    return course.accuracy(model, test_turned, data.test_y)


def cut_to(rank, change):
    u, s, v = np.linalg.svd(change, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


head_only = tune(["head"], 1e-2)
whole = tune(["first", "second"], 3e-3)
changes = [w - b for w, b in zip(model.get_weights()[:2], base)]
cut = []
for rank in ranks:
    kernels = [b + cut_to(rank, c) for b, c in zip(base, changes)]
    model.set_weights([*kernels, *base[2:]])
    cut.append(course.accuracy(model, test_turned, data.test_y))
print(f"head only {head_only:.1%}, both kernels {whole:.1%}")

# %% tags=["picture"] alt="Above, to scale: the kernel K of 64 x 128 numbers as a heat map, plus A of 64 x 4 times B of 4 x 128, equals their product of 64 x 128. Below left: accuracy over rank; LoRA rises steeply up to rank 4 and flattens out near the level of training both kernels, above the head only, and above the whole change cut to the same rank. Below right: singular values; those of LoRA end at the fourth, those of the two other changes go on to about fifty."
course.show(draw_all(), "02_lora_by_hand")

# %% tags=["plot"]
course.table(
    f"Digits on their side, {EPOCHS} epochs on {keras.backend.backend()}",
    ["what trains", "numbers", "right"],
    [
        ("nothing", "0", f"{before:.1%}"),
        ("head only", "1,290", f"{head_only:.1%}"),
        *(
            (f"LoRA, rank {r}", f"{448 * r:,}", f"{v:.1%}")
            for r, v in zip(ranks, after.mean(axis=1))
        ),
        ("both kernels", "24,576", f"{whole:.1%}"),
        ("nothing, kernel turned exactly", "0", f"{exactly:.1%}"),
    ],
)

# %% [markdown]
# (LoRA's rows are means over the seeds.) LoRA need not find the exact change.
# It needs *some* change that lets the head answer correctly, and there are such
# changes of very low rank. They are not simply the leading part of what full
# training finds: cut to four directions or fewer, the whole change loses most
# of what it learned, while LoRA was *trained* to do with few. From rank 8 on
# the two curves meet.
#
# Two honest remarks. The head alone is a strong rival here: its 1,290 numbers
# do about as much as LoRA of rank 2, and only rank 4 is clearly better. And
# both kernels whole stay a little ahead; from rank 16 on the distance is about
# the standard error of 497 images, 1 %, which is a tie.
#
# The curve bends between rank 2 and 8. The usual advice, rank 4 to 16 on every
# linear layer, is the bend of this curve on larger models.
#
# ## Exercises
#
# 1. $A B$ has rank at most $r$. Train a rank-2 adapter, and show by its
#    singular values that `delta_matrix()` has no third direction.
# 2. Merge the adapter of exercise 1 by hand: add `delta_matrix()` to the
#    kernel, and compare with `ks.merge_model`.

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
model.set_weights(base)
ks.wrap_model(model, "lora", ["first"], rank=2, seed=7)
course.train(model, turned, data.y, 1e-2, 2)
adapter = model.get_layer("first")
delta = ops.convert_to_numpy(adapter.delta_matrix())  # (64, 128)
values = np.linalg.svd(delta, compute_uv=False)
print(np.round(values[:4], 5))
assert values[1] > 1e-3 > 1e-4 > values[2]

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
by_hand = ops.convert_to_numpy(adapter.layer.kernel) + delta
ks.merge_model(model)
merged = ops.convert_to_numpy(model.get_layer("first").kernel)
print("largest difference:", np.abs(by_hand - merged).max())
assert type(model.get_layer("first")) is keras.layers.Dense
assert np.allclose(by_hand, merged, atol=1e-6)

# %% [markdown]
# ## Checks

# %% tags=["checks"]
assert not start.any() and difference < 1e-5
assert np.isclose(corrections[1], 2 * corrections[0], rtol=1e-4)
assert counts["the kernel itself"] == 384 * 384
assert counts["Keras's enable_lora"] == RANK * (384 * 12 + 32) == 37_120
assert counts["LoRADense"] == RANK * (384 + 384) == 6_144
assert trained == [448 * rank for rank in ranks for _ in seeds]
for weight, value in zip(kept, base, strict=True):
    assert np.array_equal(weight, value)
assert abs(exactly - upright) < 0.01 and rank_of_exact > 30
assert upright > before + 0.3
means = after.mean(axis=1)
four = ranks.index(4)
assert before < means[0] < means[four] + 0.02
assert means[four] > cut[four] and means[four] > whole - 0.15
assert np.linalg.matrix_rank(pair[0] @ pair[1], tol=1e-4) <= 4

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685: the method, and where to put it.
# - Aghajanyan et al. 2020, arXiv 2012.13255: how few directions fine-tuning
#   needs.
# - Kalajdzievski 2023, arXiv 2312.03732: why $\alpha / \sqrt r$ is the better
#   scale for large ranks (`scaling="rslora"`).
# - Meng et al. 2024, *PiSSA*, arXiv 2404.02948: starting from the kernel's
#   leading singular vectors (`initializer="pissa"`).
