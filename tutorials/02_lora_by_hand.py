# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LoRA by hand: from x W to LoRADense
#
# A Dense layer multiplies by a matrix. LoRA leaves the matrix alone and
# learns a thin product beside it. We write that in twelve lines of Keras,
# see that the library's layer does the same, count what it trains, and find
# out how much rank a task needs.
#
# **You will learn**
#
# - what rank and alpha are, and why one of the two factors starts at zero;
# - how many numbers LoRA trains, and why Keras's own LoRA trains six times as
#   many on the query layer of a BERT;
# - how to draw accuracy against rank, and what the curve means.
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
import rich.table
from keras import ops

import keras_spectral as ks
from keras_spectral import course

console = rich.console.Console(width=100)
keras.utils.set_random_seed(7)
data = course.images()
print("backend:", keras.backend.backend())
print("data:", data.name)

# %% [markdown]
# ## A correction of low rank
#
# A Dense layer without its activation is $y = x W + b$ with a kernel $W$ of
# $n_{in} \times n_{out}$ numbers. To fine-tune it is to find a change
# $\Delta W$ of that size. LoRA bets that a good change has a low rank $r$, so
# that it is a product of two thin matrices:
#
# $$y = x W + b + \frac{\alpha}{r}\, (x A) B, \qquad
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
        bound = n_in**-0.5
        start = keras.initializers.RandomUniform(-bound, bound, seed=1)
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
assert np.array_equal(
    ops.convert_to_numpy(hand(x)), ops.convert_to_numpy(dense(x))
)
print("at the start the layer is the base, bit for bit")

# %% [markdown]
# $A$ starts random and $B$ at zero, so $A B$ is zero and training begins at
# the base model. Both at zero would never move: the gradient of each is a
# product with the other.
#
# `ks.LoRADense` is this layer, plus what one needs in practice: the base's
# activation stays outside of the sum, masks pass through, other kinds of
# layers fit, the correction can be merged. Given the same factors it gives
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
assert difference < 1e-5

# %% [markdown]
# ## What alpha is for
#
# The correction is multiplied by $\alpha / r$. With $\alpha$ fixed, a layer
# of rank 16 whose factors have the same size as those of rank 4 does not
# shout louder, so that one learning rate serves several ranks. It is a
# number and no weight: twice the $\alpha$ is twice the correction.

# %%
corrections = []
for alpha in (8, 16):
    layer.scale.assign(alpha / 4)
    change = ops.convert_to_numpy(layer(x) - dense(x))
    corrections.append(np.linalg.norm(change))
print(f"correction with alpha 8 and 16: {np.round(corrections, 3)}")
assert np.isclose(corrections[1], 2 * corrections[0], rtol=1e-4)

# %% [markdown]
# ## Counting, and a factor of six
#
# LoRA trains $r (n_{in} + n_{out})$ numbers a layer. Keras has a LoRA of its
# own, `layer.enable_lora(rank)`. On a Dense layer it trains as many. But the
# attention of a transformer is made of `EinsumDense` layers, whose kernel has
# three axes: width x heads x head size. Keras takes the last axis for
# $n_{out}$ and all the others for $n_{in}$:
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
frozen = course.count(own.weights)
own.enable_lora(RANK)
ours = ks.LoRADense(query(), rank=RANK)
ours.build((None, None, 384))
counts = {
    "the kernel itself": frozen,
    "Keras's enable_lora": course.count(own.trainable_weights),
    "LoRADense": course.count(ours.trainable_weights),
}
table = rich.table.Table(title=f"Query layer of MiniLM, rank {RANK}")
table.add_column("what trains")
table.add_column("numbers", justify="right")
for name, number in counts.items():
    table.add_row(name, f"{number:,}")
console.print(table)
assert counts["the kernel itself"] == 384 * 384
assert counts["Keras's enable_lora"] == RANK * (384 * 12 + 32) == 37120
assert counts["LoRADense"] == RANK * (384 + 384) == 6144

# %% [markdown]
# ## How much rank does a task need?
#
# An MLP learns our images. Then the images are turned by a quarter, which
# permutes the pixels: to the first layer everything is new. We adapt with
# several ranks, always from the same trained weights, and compare with
# training every weight.

# %%
size = int(np.prod(data.x.shape[1:]))
x, test_x = (a.reshape(len(a), size) for a in (data.x, data.test_x))
turned, test_turned = (
    np.rot90(a, axes=(1, 2)).reshape(len(a), size)
    for a in (data.x, data.test_x)
)  # (n, size)

model = keras.Sequential(
    [
        keras.Input((size,)),
        keras.layers.Dense(128, "relu", name="first"),
        keras.layers.Dense(128, "relu", name="second"),
        keras.layers.Dense(10, name="logits"),
    ]
)
course.train(model, x, data.y, 3e-3, 6 if course.FAST else 15)
base = model.get_weights()
upright = course.accuracy(model, test_x, data.test_y)
before = course.accuracy(model, test_turned, data.test_y)
print(f"upright images {upright:.1%}, turned images {before:.1%}")
assert upright > before + 0.3

# %%
EPOCHS = 6 if course.FAST else 15
ranks = (1, 4, 16) if course.FAST else (1, 2, 4, 8, 16, 32)
trained, after = [], []
for rank in ranks:
    ks.wrap_model(
        model, "lora", ["first", "second"], rank=rank, trainable=(), seed=7
    )
    trained.append(course.count(model.trainable_weights))
    assert trained[-1] == rank * (size + 128 + 128 + 128)
    course.train(model, turned, data.y, 1e-2, EPOCHS)
    after.append(course.accuracy(model, test_turned, data.test_y))
    ks.unwrap_model(model)  # the base, bit for bit
for weight, value in zip(model.get_weights(), base, strict=True):
    assert np.array_equal(weight, value)
course.train(model, turned, data.y, 3e-3, EPOCHS)
full = course.accuracy(model, test_turned, data.test_y)
assert after[-1] > after[0] > before
assert after[-1] > full - 0.1

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
axis.plot(ranks, after, "o-", color="#2563eb", label="LoRA")
axis.axhline(full, color="#6b7280", ls="--", lw=1, label="all weights")
axis.axhline(before, color="#dc2626", ls=":", lw=1, label="not adapted")
axis.set_xscale("log", base=2)
axis.set_xticks(
    ranks,
    [
        f"{r}\n{n / course.count(model.weights):.0%}"
        for r, n in zip(ranks, trained)
    ],
)
axis.set(
    title="Turned images: accuracy against rank",
    xlabel="rank, and the share of the model's weights that it trains",
    ylabel="test accuracy",
    ylim=(0, 1.02),
)
axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.1))
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "02_lora_by_hand")

# %% [markdown]
# The curve rises steeply and then bends: the first few directions buy most of
# it. A rank near the layers' width has no saving left. The usual advice, rank
# 4 to 16 on every linear layer, is the bend of this curve on larger models.
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
ks.wrap_model(model, "lora", ["first"], rank=2, trainable=(), seed=7)
course.train(model, turned, data.y, 1e-2, 2)
adapter = model.get_layer("first")
delta = ops.convert_to_numpy(adapter.delta_matrix())  # (size, 128)
values = np.linalg.svd(delta, compute_uv=False)
print(np.round(values[:4], 5))
assert values[1] > 1e-3 > 1e-4 > values[2]

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
by_hand = ops.convert_to_numpy(adapter.layer.kernel) + delta
ks.merge_model(model)
merged = ops.convert_to_numpy(model.get_layer("first").kernel)
assert type(model.get_layer("first")) is keras.layers.Dense
assert np.allclose(by_hand, merged, atol=1e-6)

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685: the method, and where to put it.
# - Kalajdzievski 2023, arXiv 2312.03732: why $\alpha / \sqrt r$ is the better
#   scale for large ranks (`scaling="rslora"`).
# - Meng et al. 2024, *PiSSA*, arXiv 2404.02948: starting from the kernel's
#   leading singular vectors (`initializer="pissa"`).
