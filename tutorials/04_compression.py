# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Compression: how much of a trained kernel is needed?
#
# The singular values of a trained kernel fall: a few directions do most of
# the work. To keep only those makes a layer smaller and faster, without any
# training. The art is in choosing how many, in which layer.
#
# **You will learn**
#
# - to read the spectrum of a kernel, and what truncating it costs;
# - four ways to spread a budget over layers: uniform, energy, global, ALDS;
# - to win back what was lost with a LoRA on the truncated kernels;
# - to measure size, accuracy and speed, and to save the small model.
#
# It takes a minute or two on a laptop. The same code runs on JAX, TensorFlow
# and PyTorch: change `"jax"` below.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# On steps this small PyTorch's threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pathlib
import tempfile
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
from keras import ops

import keras_spectral as ks
from keras_spectral import course

console = rich.console.Console(width=96)
quiet = rich.console.Console(quiet=True)
keras.utils.set_random_seed(7)
model, data, _ = course.vision(test=500)
test = (data.test_x, data.test_y)
whole = course.accuracy(model, *test)
print("backend:", keras.backend.backend())
print("data:", data.name)
print(f"{model.name}: {model.count_params():,} weights, {whole:.1%} right")
assert whole > 0.7

# %% [markdown]
# ## Spectra of real kernels
#
# A convolution is a matrix too: each patch of $k \times k$ pixels and
# $c_{in}$ channels is a row of inputs, so that $n_{in} = k^2 c_{in}$ and
# $n_{out} = c_{out}$. Here are the singular values $\sigma_i$ of a few
# kernels, each over the largest one, beside those of a random matrix of the
# same shape as the last.

# %%
convolutions = [
    layer
    for layer in model.layers
    if isinstance(layer, keras.layers.Conv2D) and layer.name != "conv1"
]
chosen = [convolutions[i] for i in (0, len(convolutions) // 2, -1)]


def matrix_of(layer):
    kernel = ops.convert_to_numpy(layer.kernel)  # (k, k, c_in, c_out)
    return kernel.reshape(-1, kernel.shape[-1])  # (n_in, n_out)


figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for layer in chosen:
    values = np.linalg.svd(matrix_of(layer), compute_uv=False)
    places = np.arange(len(values)) / len(values)
    axis.plot(places, values / values[0], ".-", label=layer.name)
random = np.random.default_rng(0).normal(size=matrix_of(chosen[-1]).shape)
flat = np.linalg.svd(random, compute_uv=False)
axis.plot(
    np.arange(len(flat)) / len(flat),
    flat / flat[0],
    "--",
    color="grey",
    label="random",
)
axis.set(
    title="Singular values of trained kernels",
    xlabel="place in the order",
    ylabel="over the largest",
    ylim=(0, 1.05),
)
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "04_spectra")
last = np.linalg.svd(matrix_of(chosen[-1]), compute_uv=False)
assert last[len(last) // 2] / last[0] < flat[len(flat) // 2] / flat[0]

# %% [markdown]
# A random matrix needs all of its directions. The last trained kernel has a
# few strong ones, as many as there are classes to tell apart, and a long weak
# tail; early kernels look almost random. So no single share suits all layers.
#
# Keeping $r$ of them, $K \approx (U_r \Sigma_r) V_r^T$, is the best
# approximation of that rank (Eckart and Young), and its error is the next
# singular value, $\lVert K - K_r \rVert_2 = \sigma_{r+1}$:

# %%
u, s, v = np.linalg.svd(matrix_of(chosen[-1]), full_matrices=False)
rank = len(s) // 4
kept = (u[:, :rank] * s[:rank]) @ v[:rank]
error = np.linalg.norm(matrix_of(chosen[-1]) - kept, 2)
print(f"rank {rank} of {len(s)}: error {error:.4f}, next value {s[rank]:.4f}")
assert np.isclose(error, s[rank], rtol=1e-4)

# %% [markdown]
# ## Four ways to spend a budget
#
# As layers, the pair is a convolution of $k \times k$ to $r$ channels and a
# 1 x 1 back to $c_{out}$, with $r (k^2 c_{in} + c_{out})$ weights.
# `compress_model` returns a new model; the old one is not touched.
#
# - **uniform** takes the same share of weights from every layer;
# - **energy** keeps the same share of $\sum \sigma_i^2$ in every layer;
# - **global** keeps every value above one share of the layer's largest;
# - **ALDS** makes the largest relative error of all layers as small as it can
#   be, and may cut a convolution into slices of its input channels first.
#   Many slices save weights and cost time, so that by default it takes no more
#   than run as fast as the whole layer. Here it may take up to eight.

# %%
METHODS = ("uniform", "energy", "global", "alds")
ratios = (0.1, 0.25, 0.5, 0.75)
# The share to win back below. ResNet20 on photographs has less to spare.
removed = 0.5 if "digits" in data.name else 0.25
if course.FAST:
    METHODS, ratios = ("energy", "global"), (removed,)
table = rich.table.Table(title="Test accuracy, compressed but not trained")
table.add_column("removed")
for method in METHODS:
    table.add_column(method, justify="right")
found, models = {}, {}
for ratio in ratios:
    for method in METHODS:
        small = ks.compress_model(model, ratio, method=method, max_slices=8)
        found[ratio, method] = course.accuracy(small, *test)
        models[ratio, method] = small
    cells = [f"{found[ratio, method]:.1%}" for method in METHODS]
    table.add_row(f"{ratio:.0%}", *cells)
console.print(table)
for ratio in () if course.FAST else (0.1, 0.25):
    assert found[ratio, "uniform"] == min(found[ratio, m] for m in METHODS)
    assert found[ratio, "alds"] > whole - 0.05
assert course.accuracy(model, *test) == whole

# %% [markdown]
# Up to a quarter, ALDS loses next to nothing. *uniform*, which takes the same
# share from every layer, is worst: the layers that matter most should give
# none of it. Where more goes, the best rule depends on the model. Here is what
# happened to each layer:

# %%
small = models[removed, "energy"]
report = ks.compression_report(small, console)
before, after = report.weights
assert (before, after) == (model.count_params(), small.count_params())
assert after < (1.05 - removed) * before

# %% [markdown]
# ## Winning it back
#
# Half of the weights are gone (a quarter on photographs), and much of the
# accuracy. Two ways back: train the thin factors themselves
# (`recover="train"`), or freeze them and let a LoRA restore what was lost
# (`recover="lora"`). The LoRA takes over 4 of each layer's ranks, so that the
# model has the same size but begins lower, and `finalize_transfer` joins the
# two pairs into one. Factors that hold what was learnt need small steps, a
# LoRA that starts from nothing needs larger ones.

# %%
epochs = 4 if course.FAST else 8
results = {}
for way, learning_rate in (("train", 5e-4), ("lora", 2e-3)):
    candidate = ks.compress_model(
        model, removed, method="energy", recover=way, recover_rank=4
    )
    trained = course.count(candidate.trainable_weights)
    begin = course.accuracy(candidate, *test)
    course.train(candidate, data.x, data.y, learning_rate, epochs)
    if way == "lora":
        ks.finalize_transfer(candidate)
    results[way] = course.accuracy(candidate, *test)
    print(
        f"{way:5}: {trained:,} weights trained, "
        f"{begin:.1%} before, {results[way]:.1%} after"
    )
    assert candidate.count_params() <= small.count_params() * 1.02
    assert results[way] > begin + 0.05
    if way == "train":
        best = candidate
assert results["train"] > whole - 0.12

# %% [markdown]
# Training all factors has far more to turn than a LoRA of rank 4, and comes
# further in the same time. The LoRA has its place where memory for gradients
# and optimizer is short, or where several tasks share one truncated base.
#
# ## Size, accuracy, speed
#
# Fewer weights are fewer multiplications, but a computer likes large ones
# better than many small ones, so time has to be measured. We take the median
# of several passes over the test images.


# %%
def milliseconds(candidate):
    candidate.predict(data.test_x, batch_size=500, verbose=0)  # compiles
    times = []
    for _ in range(3 if course.FAST else 7):
        begin = time.perf_counter()
        candidate.predict(data.test_x, batch_size=500, verbose=0)
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times))


points = [("whole", model.count_params(), whole, milliseconds(model))]
for ratio in ratios:
    candidate = models[ratio, "energy"]
    right = found[ratio, "energy"]
    size, time_taken = candidate.count_params(), milliseconds(candidate)
    points.append((f"{ratio:.0%} cut", size, right, time_taken))
trained = (best.count_params(), results["train"], milliseconds(best))
points.append((f"{removed:.0%} cut, trained", *trained))

figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
names, sizes, accuracies, times = zip(*points)
dots = axis.scatter(sizes, accuracies, c=times, s=110, cmap="viridis")
for name, size, right, _ in points:
    below = right > 0.5
    axis.annotate(
        name,
        (size, right),
        (0, -16 if below else 12),
        textcoords="offset points",
        ha="center",
        fontsize=9,
    )
axis.set(
    title="Energy truncation: size, accuracy, speed",
    xlabel="weights of the whole model",
    ylabel="test accuracy",
    ylim=(0, 1.08),
    xlim=(0, 1.12 * max(sizes)),
)
figure.colorbar(dots, ax=axis, label="milliseconds for the test images")
axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "04_compression")
assert list(sizes[:-1]) == sorted(sizes[:-1], reverse=True)

# %% [markdown]
# Dots to the left are smaller; a dot at the top has lost nothing. The trained
# one stands above its untrained twin at the same size.
#
# ## Saving it
#
# The small model is plain Keras but for `LowRank` layers, which Keras knows
# once `keras_spectral.compression` is imported. The file shrinks with the
# model.

# %%
logits = best.predict(data.test_x, batch_size=500, verbose=0)
with tempfile.TemporaryDirectory() as folder:
    files = []
    for name, candidate in (("whole", model), ("small", best)):
        file = pathlib.Path(folder) / f"{name}.keras"
        candidate.compile()  # a new optimizer, that has nothing to save
        candidate.save(file)
        files.append(file.stat().st_size)
    again = keras.saving.load_model(file, compile=False)
    print("KiB:", [round(size / 1024) for size in files])
same = again.predict(data.test_x, batch_size=500, verbose=0)
gap = np.abs(logits - same).max()
assert files[1] < files[0]
assert gap < 1e-4

# %% [markdown]
# ## Exercises
#
# 1. Choose ranks by `max_error=0.7` instead of a share. How much goes?
# 2. Spare the first and the last layer (`keep_ends=True`) at the same share.
#    Is the model more accurate, and what does that cost the layers between?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
bounded = ks.compress_model(model, max_error=0.7, method="energy")
report = ks.compression_report(bounded, quiet)
print(f"{1 - report.weights[1] / report.weights[0]:.0%} removed")
assert max(layer.bound for layer in report.layers) <= 0.7 + 1e-4

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
spared = ks.compress_model(model, removed, method="energy", keep_ends=True)
ends = [layer.path for layer in ks.compression_report(small, quiet).layers]
between = [layer.path for layer in ks.compression_report(spared, quiet).layers]
cut = found[removed, "energy"]
print(f"{course.accuracy(spared, *test):.1%} against {cut:.1%}")
assert set(ends) - set(between) == {ends[0], ends[-1]}

# %% [markdown]
# ## Further reading
#
# - Liebenwein et al. 2021, *ALDS*, arXiv 2107.11442: ranks from the largest
#   relative error, and slices.
# - Hinton et al. 2015, arXiv 1503.02531: training the small model on the
#   outputs of the large one; here `ks.distiller`.
