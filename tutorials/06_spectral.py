# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Spectral adapters: moving what a kernel already knows
#
# LoRA starts a new matrix beside the kernel at random. A spectral adapter looks
# into the kernel first: its singular value decomposition says which directions
# it listens to, how strongly, and what it answers. Training then moves these
# directions, turns them, or only stretches them.
#
# **You will learn**
#
# - the three modes of `SpectralDense` and what each costs;
# - what turning singular vectors does to a matrix;
# - how two adapters on different directions are fused into one.
#
# About half a minute on a laptop. Change `"jax"` below for another backend.

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

course.quiet()
console = rich.console.Console(width=90)
keras.utils.set_random_seed(7)
data = course.images(train=2000, test=500)
print("backend:", keras.backend.backend(), "data:", data.name)

# %% [markdown]
# ## A trained model and two new tasks
#
# Three Dense layers learn the images. Then come images **upside down**, and
# **mirrored** ones, each a task of its own.

# %%
pixels = int(np.prod(data.x.shape[1:]))
base = keras.Sequential([keras.Input((pixels,))])
base.add(keras.layers.Dense(64, activation="relu", name="first"))
base.add(keras.layers.Dense(64, activation="relu", name="second"))
base.add(keras.layers.Dense(10, name="head"))


def task(change):
    x, test_x = (change(x).reshape(len(x), -1) for x in (data.x, data.test_x))
    return data._replace(x=x, test_x=test_x)  # (n, pixels)


def score(model, new):
    return course.accuracy(model, new.test_x, new.test_y)


def fresh():
    model = keras.models.clone_model(base)
    model.set_weights(base.get_weights())
    return model


upright = task(lambda x: x)
tasks = {
    "upside down": task(lambda x: x[:, ::-1]),
    "mirrored": task(lambda x: x[:, :, ::-1]),
}
course.train(base, upright.x, upright.y, 3e-3, 8 if course.FAST else 15)
before = {name: score(base, new) for name, new in tasks.items()}
clean = score(base, upright)
print(f"upright {clean:.1%}", *[f"{n} {v:.1%}" for n, v in before.items()])
assert max(before.values()) < clean - 0.1

# %% [markdown]
# ## Three modes
#
# Take a kernel $K$ (`n_in x n_out`) apart,
#
# $$K = U_1 \mathrm{diag}(S_1) V_1^T + U_2 \mathrm{diag}(S_2) V_2^T,$$
#
# where $U_1, S_1, V_1$ are the $r$ triplets that the adapter may change, by
# default those with the largest singular values.
#
# - **additive**: $(U_1 + dU)\,\mathrm{diag}(S_1)\,(V_1 + dV)^T$. The vectors
#   move freely. $r (n_{in} + n_{out})$ weights, as many as LoRA has.
# - **rotate**: $U_1 Q(a)\,\mathrm{diag}(c\,S_1)\,(V_1 Q(b))^T$. The vectors
#   turn among themselves, and $c$ stretches. $2 r^2 + r$ weights, whatever
#   the size of the layer.
# - **values**: $U\,\mathrm{diag}(\mathrm{relu}(S + d))\,V^T$. The vectors
#   stay. One weight for each singular value: $\min(n_{in}, n_{out})$.
#
# $Q$ is the Cayley map, $Q(X) = (I - Z)(I + Z)^{-1}$ with
# $Z = (X - X^T)/2$. It makes a rotation of any square matrix, so that plain
# gradient descent can train one. All three start exactly at the base.

# %%
RANK = 8
EPOCHS = 10 if course.FAST else 25
LAYERS = ["first", "second"]
new = tasks["upside down"]
shapes = [base.get_layer(name).kernel.shape for name in LAYERS]
modes = {  # mode: (options, weights)
    "additive": ({"rank": RANK}, sum(RANK * sum(shape) for shape in shapes)),
    "rotate": ({"rank": RANK}, len(shapes) * (2 * RANK**2 + RANK)),
    "values": ({}, sum(min(shape) for shape in shapes)),
}
start = base.predict(new.test_x, verbose=0)  # (n, 10)
table = rich.table.Table(title=f"Upside down, from {before['upside down']:.1%}")
for heading in ("mode", "weights", "accuracy", "merge error"):
    table.add_column(heading, justify="right")
adapted, kernels, reached = {}, {}, {}
for mode, (options, weights) in modes.items():
    model = adapted[mode] = fresh()
    ks.wrap_model(model, "spectral", target=LAYERS, mode=mode, **options)
    assert course.count(model.trainable_weights) == weights
    assert np.allclose(model.predict(new.test_x, verbose=0), start, atol=1e-4)
    losses = course.train(model, new.x, new.y, 1e-2, EPOCHS)["loss"]
    assert losses[-1] < 0.8 * losses[0]
    logits = model.predict(new.test_x, verbose=0)  # (n, 10)
    reached[mode] = np.mean(logits.argmax(axis=-1) == new.test_y)
    assert reached[mode] > before["upside down"] + 0.05
    with ks.merged(model) as plain:
        difference = plain.predict(new.test_x, verbose=0) - logits
        kernels[mode] = plain.get_layer("second").kernel.numpy()  # (64, 64)
    error = np.abs(difference).max() / np.abs(logits).max()
    assert error < 1e-4
    row = f"{weights:,}", f"{reached[mode]:.1%}", f"{error:.0e}"
    table.add_row(mode, *row)
console.print(table)
assert reached["additive"] > reached["values"]

# %% [markdown]
# Vectors that move freely win here: an image upside down needs input directions
# that the old ones do not span. Turning and stretching cost far less and win
# back a part. They fit where a task uses what the model already looks at.
#
# ## What a rotation does
#
# In two dimensions a matrix maps the unit circle to an ellipse. Its output
# singular vectors are the axes, its singular values half their lengths.
# *rotate* turns the axes and scales them.
# For the trained layer we write the change of its kernel in the old singular
# vectors, $U^T (K' - K)\,V$. Entry $(i, j)$ says how much of what the layer
# hears in its $i$-th direction is now answered in its $j$-th.


# %%
def cayley(x):
    z, eye = (x - x.T) / 2, np.eye(len(x))
    return (eye - z) @ np.linalg.inv(eye + z)


q = cayley(np.array([[0, 0.47], [-0.47, 0]]))
assert np.allclose(q.T @ q, np.eye(2))
t = np.deg2rad(20)
axes_of_k = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
matrices = {
    "circle": np.eye(2),
    "K": axes_of_k @ np.diag([2, 0.7]),
    "K turned": axes_of_k @ q @ np.diag([0.8 * 2, 1.3 * 0.7]),
}

old = base.get_layer("second").kernel.numpy()  # (64, 64)
u, s, vt = np.linalg.svd(old)
changes = {mode: u.T @ (k - old) @ vt.T for mode, k in kernels.items()}
for mode, change in changes.items():
    size = np.abs(change).max()
    outside = np.abs(np.r_[change[RANK:].ravel(), change[:RANK, RANK:].ravel()])
    beside = np.abs(change - np.diag(np.diag(change)))
    print(f"{mode}: {size:.2f}, outside the block {outside.max():.2f}")
    assert (outside.max() < 1e-4 * size) == (mode == "rotate")
    assert (beside.max() < 1e-4 * size) == (mode == "values")

figure, axes = plt.subplots(
    1, 4, figsize=(13, 3.6), layout="constrained", width_ratios=[1.25, 1, 1, 1]
)
t = np.linspace(0, 2 * np.pi, 200)
circle = np.stack([np.cos(t), np.sin(t)])  # (2, 200)
for color, (label, matrix) in zip(
    ("#9ca3af", "#2563eb", "#dc2626"), matrices.items(), strict=True
):
    axes[0].plot(*(matrix @ circle), color=color, label=label)
    for x, y in matrix.T if label != "circle" else ():
        axes[0].plot([0, x], [0, y], color=color, lw=1)
axes[0].set(title="A matrix, turned and stretched", box_aspect=1)
axes[0].set(xlim=(-2.3, 2.3), ylim=(-2, 2.6), xlabel="first output")
axes[0].set_ylabel("second output")
axes[0].legend(frameon=False, ncols=3, fontsize=8, loc="upper center")
for axis, (mode, change) in zip(axes[1:], changes.items(), strict=True):
    shown = np.abs(change[:20, :20]) / np.abs(change[:20, :20]).max()
    picture = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    axis.axhline(RANK - 0.5, color="#9ca3af", lw=1)
    axis.axvline(RANK - 0.5, color="#9ca3af", lw=1)
    axis.set(title=mode, xlabel="output direction", yticks=range(0, 20, 5))
axes[1].set_ylabel("input direction")
figure.colorbar(picture, ax=axes[1:], label="relative change", shrink=0.8)
course.show(figure, "06_spectral")

# %% [markdown]
# The lines mark the first eight directions; 20 of 64 are shown. *rotate*
# mixes within its block and cannot leave it. *values* changes the diagonal
# alone. *additive* writes outside of its block: old inputs get new answers
# (upper right), and new inputs are heard (lower left).
#
# ## Two adapters, fused
#
# If adapters of one base use **different triplets**, their updates can be added
# on one decomposition, without any data. The adapter above has triplets 0 to
# 7; `columns=8` gives the other task the next eight.

# %%
new = tasks["mirrored"]
model = adapted["mirrored"] = fresh()
ks.wrap_model(model, "spectral", target=LAYERS, rank=RANK, columns=RANK)
course.train(model, new.x, new.y, 1e-2, EPOCHS)
with tempfile.TemporaryDirectory() as folder:
    files = [pathlib.Path(folder) / f"{i}.safetensors" for i in range(2)]
    ks.save_adapters(adapted["additive"], files[0])
    ks.save_adapters(model, files[1])
    fused = ks.fuse_adapters(fresh(), files)
assert fused.get_layer("second").column_list == tuple(range(2 * RANK))

table = rich.table.Table(title="Two tasks")
for heading in ("model", *tasks, "mean"):
    table.add_column(heading, justify="right")
rows = []
models = {"base": base, "for upside down": adapted["additive"]}
models |= {"for mirrored": adapted["mirrored"], "fused": fused}
for name, model in models.items():
    rows.append([score(model, new) for new in tasks.values()])
    shown = [f"{x:.1%}" for x in (*rows[-1], np.mean(rows[-1]))]
    table.add_row(name, *shown)
console.print(table)
untouched, first, second, both = np.array(rows)  # (2,) each
assert both.mean() > untouched.mean() + 0.02
assert both.min() > max(first[1], second[0])
assert first[0] > both[0] and second[1] > both[1]

# %% [markdown]
# The fused model has seen no data again. It is better than the base on average,
# and on either task better than a specialist for the other. On its own task
# each specialist is ahead: the triplets are apart, the neurons are shared.
#
# We picked this pair because fusion works well on it. In a trial of five
# changes (besides, a quarter turn, inverted contrast, a shift to the side) it
# was among the best of twenty ordered pairs, and in nearly half of them one
# task came out worse than with the base. Test a fused model on each task.
#
# ## Exercises
#
# 1. From which rank on does *rotate* train more weights than *additive*, for
#    a layer of `n` inputs and `n` outputs?
# 2. Turn the *additive* adapter into LoRA with `ks.to_lora`. Which rank does
#    it need, and do the logits change?

# %% [markdown]
# ### Solution 1
# $2 r^2 + r > 2 n r$ means $r > n - 1/2$: only at full rank.

# %% tags=["solution"]
assert [r for r in range(1, 65) if 2 * r**2 + r > r * (64 + 64)] == [64]

# %% [markdown]
# ### Solution 2
#
# $2 r$: the update is $U_1 S_1 dV^T + dU\,S_1 (V_1 + dV)^T$.

# %% tags=["solution"]
model = adapted["additive"]
logits = model.predict(upright.test_x, verbose=0)
ks.to_lora(model)
assert model.get_layer("second").rank == 2 * RANK
error = np.abs(model.predict(upright.test_x, verbose=0) - logits).max()
assert error < 1e-4 * np.abs(logits).max()

# %% [markdown]
# ## Further reading
#
# - Zhang and Pilanci 2024, Spectral Adapter, arXiv 2405.13952: the additive
#   and the rotated form, and fusing by columns.
# - Han et al. 2023, SVDiff, arXiv 2303.11305: training singular values alone.
