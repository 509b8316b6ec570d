# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Small models for small machines
#
# A phone or a microcontroller counts bytes. Two old ideas make a trained
# network need fewer of them: set the weights that matter least to zero
# (**pruning**), and store the others with few bits (**quantisation**). We do
# both by hand, then let Keras quantise a model, and at last train an adapter
# on top of a model that is stored as integers.
#
# **You will learn**
#
# - how to measure which layer bears pruning, and how much of it,
# - linear and k-means quantisation to $n$ bits, and what they cost in bytes,
# - what `model.quantize("int8")` stores,
# - how LoRA adapts an int8 model without touching its integers.
#
# It takes about a minute on a laptop. The backend is changed in one line.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pathlib
import tempfile
import warnings

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
import scipy.ndimage
from keras.ops import convert_to_numpy as numpy

import keras_spectral as ks
from keras_spectral import course

# `quantize` names the layer that it cannot quantise, the input.
warnings.filterwarnings("ignore", message=".*does not have a `quantize`")
console = rich.console.Console(width=90)
keras.utils.set_random_seed(7)
data = course.images()
print("backend:", keras.backend.backend())
print("data:", data.name)

# %% [markdown]
# ## A model to make smaller
#
# Three Dense layers on flat images. Nearly all of its weights are in the
# kernels, so the kernels are what we shrink; the biases stay as they are.

# %%
x, test_x = (a.reshape(len(a), -1) for a in (data.x, data.test_x))


def new_model():
    return keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Dense(128, activation="relu", name="first"),
            keras.layers.Dense(64, activation="relu", name="second"),
            keras.layers.Dense(10, name="head"),
        ]
    )


def accuracy(model):
    return course.accuracy(model, test_x, data.test_y)


model = new_model()
course.train(model, x, data.y, 2e-3, 10 if course.FAST else 20)
kernels = {layer.name: numpy(layer.kernel) for layer in model.layers}
base_weights = model.get_weights()
base_accuracy = accuracy(model)
base_bytes = 4 * course.count(model.weights)  # float32
print(f"{base_bytes:,} bytes, {base_accuracy:.1%} right")
assert base_accuracy > 0.7


def accuracy_with(changed):
    """Accuracy with some of the kernels replaced, for a moment."""
    for name, kernel in changed.items():
        model.get_layer(name).kernel.assign(kernel)
    result = accuracy(model)
    model.set_weights(base_weights)
    return result


assert accuracy_with({}) == base_accuracy

# %% [markdown]
# ## Pruning, and how sensitive each layer is
#
# Magnitude pruning sets the share $s$ of a kernel's weights to zero that is
# smallest in absolute value:
#
# $$\hat K_{ij} = K_{ij}\,[\,|K_{ij}| > t\,], \qquad
# t = \text{the } s\text{-quantile of } |K|$$
#
# A **sensitivity curve** prunes one layer, leaves the others alone, and plots
# accuracy over $s$. Nothing is trained.


# %%
def prune(kernel, share):
    threshold = np.quantile(np.abs(kernel), share)
    return np.where(np.abs(kernel) > threshold, kernel, 0)


shares = np.array([0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0])
curves = {
    name: [accuracy_with({name: prune(kernel, s)}) for s in shares]
    for name, kernel in kernels.items()
}
curves["all three"] = [
    accuracy_with({n: prune(k, s) for n, k in kernels.items()}) for s in shares
]

table = rich.table.Table(title="Accuracy when a share of a kernel is zero")
table.add_column("layer")
for share in shares:
    table.add_column(f"{share:.0%}", justify="right")
for name, curve in curves.items():
    table.add_row(name, *(f"{100 * value:.0f}" for value in curve))
console.print(table)

# The library's own scan, one layer at a time, says the same.
scan = ks.sensitivity_scan(model, (test_x, data.test_y), shares)
for name in kernels:
    found = list(scan[name].values())
    assert np.allclose(found, curves[name], atol=0.02), name
half = list(shares).index(0.5)
for curve in curves.values():
    assert curve[half] > base_accuracy - 0.15  # half of it is hardly missed
    assert curve[-1] < base_accuracy / 2  # a layer of zeros knows nothing
zeros = np.mean(prune(kernels["first"], 0.5) == 0)
assert abs(zeros - 0.5) < 0.01

# %% [markdown]
# Each row stays flat for a long while and then falls off. Half of the weights
# can go from every layer at once without any training. Where the curve of a
# layer bends tells how much to prune *there*; one share for all layers wastes
# what the robust ones could give.
#
# Zeros alone save nothing. They save bytes in a file that stores positions
# and values, or is compressed, and time only on hardware that skips them.
# That is the difference from the low rank of `ks.compress_model`, whose
# thinner layers are ordinary dense ones.
#
# ## Quantisation by hand
#
# With $n$ bits a weight can take $2^n$ values. The file then holds a table of
# the values (the codebook $c$), and for each weight its number
# $q_{ij} \in \{0, \dots, 2^n - 1\}$, so that $\hat K_{ij} = c_{q_{ij}}$.
#
# - **linear**: the values stand at equal distances from the smallest to the
#   largest weight. Two numbers, offset and step, describe them.
# - **k-means**: the values go where the weights are. Repeat: give each weight
#   to its nearest value, move each value to the mean of its weights. Neither
#   step can raise the squared error.


# %%
def nearest(values, kernel):
    """The number of the nearest of the sorted values, for every weight."""
    return np.searchsorted((values[1:] + values[:-1]) / 2, kernel)


def linear(kernel, bits):
    return np.linspace(kernel.min(), kernel.max(), 2**bits)  # (2**bits,)


def k_means(kernel, bits, rounds=30):
    values = linear(kernel, bits)
    for _ in range(rounds):
        codes = nearest(values, kernel).ravel()
        sums = np.bincount(codes, kernel.ravel(), 2**bits)
        members = np.bincount(codes, minlength=2**bits)
        values = np.where(members, sums / np.maximum(members, 1), values)
    return values  # (2**bits,), still sorted


def pack(codes, bits):
    """The codes without gaps: `bits` bits each, as bytes."""
    ones = np.unpackbits(codes.astype("uint8")[..., None], axis=-1)
    return np.packbits(ones[..., -bits:])  # (ceil(size * bits / 8),)


results = {}  # (method, bits): (bytes, relative error, accuracy)
for method in (linear, k_means):
    for bits in (1, 2, 3, 4, 6, 8):
        quantised, size, error = {}, 0, 0
        for name, kernel in kernels.items():
            values = method(kernel, bits)
            codes = nearest(values, kernel)  # the shape of the kernel
            quantised[name] = values[codes]
            table_bytes = 4 * (2 if method is linear else 2**bits)
            size += pack(codes, bits).nbytes + table_bytes
            error += np.sum((quantised[name] - kernel) ** 2)
        size += 4 * (128 + 64 + 10)  # the biases, as they are
        error /= sum(np.sum(kernel**2) for kernel in kernels.values())
        results[method.__name__, bits] = (
            size,
            error**0.5,
            accuracy_with(quantised),
        )

table = rich.table.Table(title="All three kernels with n bits a weight")
for heading in ("method", "bits", "bytes", "error", "accuracy"):
    table.add_column(heading, justify="right")
table.add_row("float32", "32", f"{base_bytes:,}", "0", f"{base_accuracy:.1%}")
for (method, bits), (size, error, right) in results.items():
    table.add_row(
        method, str(bits), f"{size:,}", f"{error:.3f}", f"{right:.1%}"
    )
console.print(table)

for bits in (1, 2, 3, 4, 6, 8):
    assert results["k_means", bits][1] <= results["linear", bits][1] + 1e-6
assert results["k_means", 2][1] < 0.7 * results["linear", 2][1]
assert results["k_means", 4][2] > base_accuracy - 0.05
assert results["linear", 8][2] > base_accuracy - 0.02
assert results["k_means", 8][2] > base_accuracy - 0.02
assert results["k_means", 4][0] < base_bytes / 7
weights = sum(kernel.size for kernel in kernels.values())
assert results["linear", 4][0] == weights // 2 + 3 * 8 + 4 * 202

# %% [markdown]
# *Error* is the norm of all changes divided by the norm of the kernels.
# k-means started from the linear values, so its error is at most theirs. The
# gain is large at few bits: most weights are near zero, and equal steps spend
# their values on the few large ones. At 8 bits both are as good as float32.
# The price of k-means is a look-up: a codebook's values are no integers that
# hardware could multiply.

# %% [markdown]
# The library does the same for any model, and lets the codebook **train**: the
# numbers $q_{ij}$ stay, and a value's gradient is the sum of those of its
# weights. Two bits then cost less accuracy.

# %%
few = ks.cluster_weights(model, bits=2)
by_means = accuracy(few)
course.train(few, x, data.y, 2e-3, 3)
trained_means = accuracy(few)
few = ks.finalize_quantized(few)  # plain Dense layers again
for layer in few.layers:
    assert len(np.unique(numpy(layer.kernel))) <= 4
print(f"2 bits: {by_means:.1%}, with trained values {trained_means:.1%}")
assert trained_means > by_means - 0.02

# %%
BLUE, RED, GREEN, GREY = "#2563eb", "#dc2626", "#059669", "#6b7280"
figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
colors = {"first": BLUE, "second": GREEN, "head": RED, "all three": GREY}
for name, curve in curves.items():
    axes[0].plot(
        100 * shares, 100 * np.array(curve), "o-", ms=4, c=colors[name]
    )
axes[0].legend(curves, frameon=False, loc="lower left")
axes[0].set(
    title="Sensitivity to pruning",
    xlabel="weights set to zero in %",
    ylabel="accuracy in %",
    ylim=(0, 105),
)

kernel = kernels["second"]
axes[1].hist(kernel.ravel(), 80, color="#d1d5db")
top = axes[1].get_ylim()[1]
for row, (method, color) in enumerate(((linear, RED), (k_means, BLUE))):
    values = method(kernel, 3)
    place = np.full(len(values), (1.08 + 0.1 * row) * top)
    name = method.__name__.replace("_", "-")
    axes[1].plot(values, place, "|", ms=13, mew=2, c=color, label=name)
axes[1].legend(frameon=False, loc="upper center", ncols=2)
axes[1].set(
    title='Weights of "second", and the 8 values of 3 bits',
    xlabel="weight",
    ylabel="number of weights",
    ylim=(0, 1.45 * top),
)

for method, color in (("linear", RED), ("k_means", BLUE)):
    rows = [(b, r[1]) for (m, b), r in results.items() if m == method]
    label = method.replace("_", "-")
    axes[2].plot(*zip(*rows), "o-", c=color, label=label)
axes[2].legend(frameon=False)
axes[2].set(
    title="Error of all kernels",
    xlabel="bits a weight",
    ylabel="norm of the error / norm",
    yscale="log",
)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "10_small_machines")

# %% [markdown]
# ## Keras does it: `quantize("int8")`
#
# Keras's int8 is linear, symmetric and **per output channel**: column $j$ of
# the kernel has its own scale, and
#
# $$q_{ij} = \mathrm{round}(127\, K_{ij} / \max_i |K_{ij}|).$$
#
# A layer also rounds its *input* to int8, by the largest value of each
# example, so that integers are multiplied with integers.

# %%
model.quantize("int8")
for layer in model.layers:
    codes = numpy(layer._kernel)  # int8, (n_in, n_out)
    assert codes.dtype == np.int8
    scaled = 127 * kernels[layer.name] / np.abs(kernels[layer.name]).max(0)
    assert np.abs(codes - scaled).max() < 0.51  # half a step, and rounding


def stored_bytes(model):
    return sum(numpy(weight).nbytes for weight in model.weights)


int8_accuracy = accuracy(model)
int8_bytes = stored_bytes(model)
print(f"float32: {base_bytes:,} bytes, {base_accuracy:.1%} right")
print(f"int8:    {int8_bytes:,} bytes, {int8_accuracy:.1%} right")
assert int8_bytes < base_bytes / 3
assert int8_accuracy > base_accuracy - 0.03

# %% [markdown]
# ## An adapter on integers
#
# Integers have no gradient, so a quantised model cannot be fine-tuned as it
# is. It need not be. LoRA trains a float pair beside the frozen kernel:
#
# $$y = \mathrm{int8}(x, K) + \frac{\alpha}{r}\, x A B$$
#
# The world changes: the camera is mounted askew, and images arrive turned by 45
# degrees. The device keeps its int8 base and gets a small adapter file.


# %%
def turn(images):
    """Turned by 45 degrees, flat."""
    turned = scipy.ndimage.rotate(images, 45, (1, 2), reshape=False, order=1)
    return turned.reshape(len(turned), -1)


new_x, new_test = turn(data.x), turn(data.test_x)
before = course.accuracy(model, new_test, data.test_y)
integers = [numpy(layer._kernel) for layer in model.layers]

ks.wrap_model(model, "lora", target="all", rank=4, seed=7)
trained = course.count(model.trainable_weights)
n = x.shape[1]
assert trained == 4 * ((n + 128) + (128 + 64) + (64 + 10))
history = course.train(model, new_x, data.y, 1e-2, 10 if course.FAST else 20)
after = course.accuracy(model, new_test, data.test_y)
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "turned.safetensors"
    ks.save_adapters(model, file)
    file_bytes = file.stat().st_size
print(f"turned images: {before:.1%} -> {after:.1%} right")
print(f"base {int8_bytes:,} bytes, adapter file {file_bytes:,} bytes")

assert history["loss"][-1] < history["loss"][0] / 2
assert after - before > 0.6 * (base_accuracy - before)
assert file_bytes < base_bytes / 4

# %% [markdown]
# The integers have not moved, and with the adapters off the device answers as
# on the first day. Merging would need a kernel that can hold
# $K + \frac{\alpha}{r} AB$ exactly, and int8 cannot: the library refuses, and
# the adapter keeps running beside the base.

# %%
ks.adapter_summary(model, console)
with ks.adapters_disabled(model):
    assert accuracy(model) == int8_accuracy
try:
    ks.merge_model(model)
except ValueError:
    merged = False
else:
    merged = True
assert not merged
ks.unwrap_model(model)
for layer, codes in zip(model.layers, integers, strict=True):
    assert np.array_equal(numpy(layer._kernel), codes)

# %% [markdown]
# ## Exercises
#
# 1. Prune 95 % of the first two kernels and train on, keeping the zeros. How
#    much of the lost accuracy comes back? (`ks.prune_model` holds zeros by a
#    `keras.constraints.Constraint`, applied after each optimizer step.)
# 2. Codes that occur often could get shorter names (Huffman). The entropy
#    $H = -\sum_c p_c \log_2 p_c$ bounds the mean number of bits. What is it
#    for the 4-bit linear and k-means codes of the layer `first`?

# %% [markdown]
# ### Solution 1


# %% tags=["solution"]
whole = new_model()
whole.set_weights(base_weights)
pruned = ks.prune_model(whole, 0.95, target=["first", "second"])
cut = accuracy(pruned)
course.train(pruned, x, data.y, 2e-3, 5)
recovered = accuracy(pruned)
print(f"{base_accuracy:.1%} -> pruned {cut:.1%} -> trained {recovered:.1%}")
assert np.mean(numpy(pruned.get_layer("first").kernel) == 0) > 0.94
assert recovered - cut > 0.3 * (base_accuracy - cut)

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
kernel, entropy = kernels["first"], {}
for method in (linear, k_means):
    codes = nearest(method(kernel, 4), kernel)
    share = np.bincount(codes.ravel(), minlength=16) / codes.size
    share = share[share > 0]
    entropy[method.__name__] = float(-np.sum(share * np.log2(share)))
print(entropy)
assert entropy["linear"] < entropy["k_means"] < 4  # even use, less to gain

# %% [markdown]
# ## Further reading
#
# - Han, Mao, Dally, *Deep Compression* (arXiv 1510.00149): pruning, k-means
#   codebooks and Huffman codes, one after the other.
# - Hu et al., *LoRA* (arXiv 2106.09685): the adapter of this page.
# - Dettmers et al., *QLoRA* (arXiv 2305.14314): LoRA on a base of 4 bits
#   whose values are spaced for normally distributed weights.
# - Liebenwein et al., *ALDS* (arXiv 2107.11442): low rank instead of zeros;
#   `ks.compress_model(method="alds")`.
