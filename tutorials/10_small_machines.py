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
# A trained network of 69 KB still reads digits as well when it is stored in
# 10 KB: four bits a weight instead of 32, without any training. The hard part
# is below that. With two bits a weight has four values to choose from, and
# which four they are decides over more than 10 points of accuracy.

# %% [markdown]
# **What you see:** above, the weights of one layer with 32, 8, 4 and 2 bits
# each, and the size of the whole model. Fewer bits mean fewer values. Below,
# test accuracy over size for four ways to save bytes; the dashed line is
# the model as it was trained, the dotted one is chance. The further up and
# to the left, the better.
#
# **You will learn**
#
# - how linear quantisation works, by hand in three lines;
# - how k-means, zeros and low rank compare with it **at equal bytes**;
# - how LoRA adapts a model whose weights are integers, and what the integers
#   cost it;
# - how many bits a real network, EfficientNet-Lite0, bears.
#
# You need scikit-learn's digits and the Lite0 archive that `make demo`
# fetches; about a minute on two CPU cores. All outputs are of the backend
# that the next cell prints.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import warnings

import keras
import keras_hub
import matplotlib.pyplot as plt
import numpy as np
from keras.ops import convert_to_numpy as numpy

import keras_spectral as ks
from keras_spectral import course

# `quantize` names the layer that it cannot quantise, the input.
warnings.filterwarnings("ignore", message=".*does not have a `quantize`")
course.quiet()
keras.utils.set_random_seed(7)
data = course.digits()
print(f"{data.name}, on {keras.backend.backend()}")

# %% [markdown]
# ## A model to make smaller
#
# Three Dense layers on flat images. Nearly all of its weights are in the
# kernels, so the kernels are what we shrink; the 202 biases stay as they are.

# %%
x, test_x = (a.reshape(len(a), -1) for a in (data.x, data.test_x))  # (n, 64)
model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(128, activation="relu", name="first"),
        keras.layers.Dense(64, activation="relu", name="second"),
        keras.layers.Dense(10, name="head"),
    ]
)
course.train(model, x, data.y, 2e-3, 10 if course.FAST else 20)
trained = model.get_weights()  # three kernels, three biases
kernels = trained[::2]  # (64, 128), (128, 64), (64, 10)
base_kb = 4 * model.count_params() / 1000
base_accuracy = course.accuracy(model, test_x, data.test_y)
print(f"{base_kb:.1f} KB, {base_accuracy:.1%} right")

# %% [markdown]
# One test image is 0.2 points here, and the standard error of an accuracy
# near 95 % is 1 point (497 images). Differences below 2 points are ties.
#
# ## Linear quantisation, by hand
#
# With $n$ bits a weight becomes a whole number $q_{ij}$ from
# $-(2^{n-1} - 1)$ to $2^{n-1} - 1$. Each column $j$ of the kernel has its own
# step $s_j$, so that its largest weight is the largest number:
#
# $$s_j = \frac{\max_i |K_{ij}|}{2^{n-1} - 1}, \qquad
# q_{ij} = \mathrm{round}(K_{ij} / s_j), \qquad \hat K_{ij} = s_j\, q_{ij}$$


# %%
def linear(kernel, bits):
    """The kernel as it comes back from whole numbers of so many bits."""
    largest = np.abs(kernel).max(tuple(range(kernel.ndim - 1)))  # (columns,)
    step = np.maximum(largest, 1e-12) / (2 ** (bits - 1) - 1)
    return step * np.round(kernel / step)


for bits in (8, 4, 2):
    print(bits, "bits:", linear(kernels[1], bits)[:6, 0].round(3) + 0)
print("before:", kernels[1][:6, 0].round(3))

# %% [markdown]
# These are six weights of one column. At 8 bits you hardly see a change. At 2
# bits a weight is $-s_j$, 0 or $s_j$, and $s_j$ is the column's largest weight:
# all that is smaller than half of it becomes 0. **Guess** before you read on:
# how accurate is a network whose weights are all of that kind?
#
# ## Four ways at equal bytes
#
# - **linear**, as above: $n$ bits a weight, and a float a column;
# - **k-means** (`ks.cluster_weights`): $2^n$ free values a kernel, placed where
#   the weights are. A codebook holds them, and $n$ bits say which is meant;
# - **zeros** (`ks.prune_model`): the smallest weights are dropped. We count
#   four bytes for each that stays, and one bit a place to say where they are;
# - **low rank** (`ks.compress_model`): thinner float kernels.
#
# None of them is trained yet.

# %%
SIZE = sum(kernel.size for kernel in kernels)  # 17,024 weights
ways = {"linear": [], "k-means": [], "zeros": [], "low rank": []}
codebooks = {}  # bits: the kernel of `second`, of few values


def note(way, setting, kernel_bytes, weights):
    """Notes the size and the accuracy of the model with other weights."""
    model.set_weights(weights)
    right = course.accuracy(model, test_x, data.test_y)
    ways[way].append((setting, kernel_bytes + 4 * 202, right))
    model.set_weights(trained)


for bits in (2, 3, 4, 8):
    rounded = list(trained)
    rounded[::2] = [linear(kernel, bits) for kernel in kernels]
    note("linear", f"{bits} bits", SIZE * bits / 8 + 4 * 202, rounded)
    few = ks.finalize_quantized(ks.cluster_weights(model, bits)).get_weights()
    codebooks[bits] = few[2]
    note("k-means", f"{bits} bits", SIZE * bits / 8 + 12 * 2**bits, few)
for share in (0.97, 0.9, 0.8, 0.5):
    sparse = ks.prune_model(model, share).get_weights()
    kept = sum(np.count_nonzero(kernel) for kernel in sparse[::2])
    note("zeros", f"{share:.0%} zero", 4 * kept + SIZE / 8, sparse)
for ratio in (0.93, 0.8, 0.5):
    thin = ks.compress_model(model, ratio, method="global")
    right = course.accuracy(thin, test_x, data.test_y)
    setting, size = f"{ratio:.0%} fewer", 4 * thin.count_params()
    ways["low rank"].append((setting, size, right))
rows = [
    (way, setting, f"{size / 1000:.1f}", f"{right:.1%}")
    for way, points in ways.items()
    for setting, size, right in points
]
course.table("Without training", ("way", "setting", "KB", "accuracy"), rows)

# %% tags=["plot"]
COLORS = {
    "linear": "#dc2626",
    "k-means": "#2563eb",
    "zeros": "#059669",
    "low rank": "#9333ea",
}


def draw():
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    sizes = {32: base_kb}
    for setting, size, _ in ways["k-means"]:
        sizes[int(setting.split()[0])] = size / 1000
    axes = top.subplots(1, 4, sharex=True)
    for axis, bits in zip(axes, (32, 8, 4, 2)):
        if bits == 32:
            axis.hist(kernels[1].ravel(), 80, color="#374151")
        else:
            values, numbers = np.unique(codebooks[bits], return_counts=True)
            axis.vlines(values, 0, numbers, lw=2 if bits > 4 else 4)
            axis.set_ylim(0)
        axis.set_title(f"{bits} bits: {sizes[bits]:.1f} KB", fontsize=12)
        axis.set(xlabel="weight", yticks=[])
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_ylabel("how many")
    axis = bottom.subplots()
    for way, points in ways.items():
        sizes, rights = zip(*[(s / 1000, 100 * r) for _, s, r in points])
        axis.plot(sizes, rights, "o-", color=COLORS[way], lw=2, label=way)
    best = 100 * base_accuracy
    axis.axhline(best, color="#6b7280", ls="--", lw=1)
    axis.text(68, best - 2, "float32, 68.9 KB", ha="right", va="top")
    axis.axhline(10, color="#6b7280", ls=":", lw=1)
    axis.text(68, 11, "chance", ha="right")
    ticks = [5, 10, 20, 40, 68]
    axis.set_xscale("log")
    axis.set_xlim(4.5, 70)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="size of the model in KB", ylabel="test accuracy in %")
    axis.set_ylim(0, 104)
    axis.legend(frameon=False, loc="center right", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


# %% tags=["picture"] alt="Above, histograms of a layer's weights with 32, 8, 4 and 2 bits a weight: a bell, then 256, 16 and 4 separate values, while the model shrinks from 68.9 to about 5 KB. Below, test accuracy over kilobytes on a log scale: k-means stays near the float accuracy down to about 7 KB, linear falls at 2 bits, zeros and low rank need about 35 KB to come close."
course.show(draw(), "10_small_machines")

# %% [markdown]
# Down to 4 bits linear and k-means tie with float32. At 2 bits the linear
# values fall behind: steps that reach the largest weight are too wide for the
# many small ones. Zeros and low rank keep floats, and pay four bytes for each.
# That is their price in *bytes*. What you save besides differs: thin kernels
# need fewer multiplications on any machine, zeros only where the hardware
# skips them, and a codebook's products still run in floats.
#
# ## Training wins much of it back
#
# A codebook can train: which value a weight has stays, and a value's gradient
# is the sum of its weights' gradients. Zeros stay zeros (a constraint holds
# them), and thin kernels train as any others. Here are three models of 5.0 to
# 5.5 KB. **Guess** which of them gains most.

# %%
small = {
    "k-means, 2 bits": ks.cluster_weights(model, 2),
    "zeros, 97 %": ks.prune_model(model, 0.97),
    "low rank, 93 %": ks.compress_model(model, 0.93, method="global"),
}
recovered = {}
for name, each in small.items():
    before = course.accuracy(each, test_x, data.test_y)
    course.train(each, x, data.y, 2e-3, 5)
    recovered[name] = before, course.accuracy(each, test_x, data.test_y)
rows = [(n, f"{a:.1%}", f"{b:.1%}") for n, (a, b) in recovered.items()]
course.table("5 epochs", ("way", "before", "after"), rows)

# %% [markdown]
# The two float models gain most, but five epochs do not change the order of
# the three: at this size, many coarse weights beat few exact ones.
#
# ## An adapter on integers
#
# Keras stores the integers of our `linear` at 8 bits with one call,
# `model.quantize("int8")`. Each layer then rounds its input to 8 bits as well,
# so that integers are multiplied with integers. Integers have no gradient.
# LoRA needs none: it trains a float pair beside the frozen kernel,
#
# $$y = \mathrm{int8}(x, K) + \frac{\alpha}{r}\, x A B.$$
#
# Now the camera is mounted on its side, and images arrive turned by a quarter.
# The baseline is the same adapter on the float model.


# %%
new_x, new_test = (
    np.rot90(images, axes=(1, 2)).reshape(len(images), -1)
    for images in (data.x, data.test_x)
)
adapted, rows = {}, []
for kind in ("float32", "int8"):
    each = adapted[kind] = keras.models.clone_model(model)
    each.set_weights(trained)
    if kind == "int8":
        each.quantize("int8")
    size = sum(numpy(weight).nbytes for weight in each.weights) / 1000
    before = course.accuracy(each, new_test, data.test_y)
    ks.wrap_model(each, "lora", target="all", rank=4, seed=7)
    course.train(each, new_x, data.y, 1e-2, 5 if course.FAST else 20)
    after = course.accuracy(each, new_test, data.test_y)
    extra = 4 * course.count(each.trainable_weights) / 1000
    row = f"{size:.1f}", f"{extra:.1f}", f"{before:.1%}", f"{after:.1%}"
    rows.append((kind, *row))
course.table("Turned", ("base", "KB", "adapter KB", "before", "after"), rows)

# %% [markdown]
# The adapter works on integers about as well as on floats; near 93 % the
# standard error is 1.1 points, and this is one seed. The integers have not
# moved: with the adapter off, the device answers as on the first day. A merge
# would need a kernel that can hold $K + \frac{\alpha}{r} AB$ exactly, and int8
# cannot. The library refuses it, so the adapter keeps running beside the
# base, which costs time at every call.
#
# ## A real network
#
# EfficientNet-Lite0 (4.7 million weights, ImageNet) was made for phones. Keras
# quantises Dense layers only, so we use our `linear` on every kernel. A
# depthwise kernel (k, k, channels, 1) keeps a step a channel. Does it still
# recognise the two photographs that come with scikit-learn?

# %%
lite0 = course.lite0()
photos = np.stack([course.photo(name) for name in ("flower", "china")])
layers = [layer for layer in lite0.layers if hasattr(layer, "kernel")]
floats = [numpy(layer.kernel) for layer in layers]
SIZE_LITE = sum(kernel.size for kernel in floats)
shares, rows = {}, []  # shares[bits]: (2, 1000)
for bits in (32, 8, 6, 4):
    for layer, kernel in zip(layers, floats):
        flat = kernel[..., 0] if kernel.shape[-1] == 1 else kernel
        if bits < 32:
            layer.kernel.assign(linear(flat, bits).reshape(kernel.shape))
    shares[bits] = numpy(keras.ops.softmax(lite0.predict(photos, verbose=0)))
    named = keras_hub.utils.decode_imagenet_predictions(shares[bits], top=1)
    size = (SIZE_LITE * bits / 8 + 4 * (lite0.count_params() - SIZE_LITE)) / 1e6
    labels = [f"{n.replace('_', ' ')} {p:.0%}" for [(n, p)] in named]
    rows.append((str(bits), f"{size:.1f}", *labels))
course.table("Lite0", ("bits", "MB", "flower", "china"), rows)

# %% [markdown]
# With 8 bits the network takes about a quarter of the bytes and names both
# photographs as before (the flower is a dahlia, and a daisy is the nearest of
# the 1,000 names). With 6 bits it already errs on one, and with 4 on both:
# this network has few weights to spare, and an error passes through up to 49
# convolutions. The digits model was easy. Two photographs are an
# illustration, not a measurement.
#
# ## Checks

# %% tags=["checks"]
assert model.count_params() == SIZE + 202 == 17_226
for bits in (4, 8):  # what we did by hand is what the library does
    same = ks.finalize_quantized(ks.fake_quantize(model, bits)).get_weights()
    for ours, theirs in zip(kernels, same[::2], strict=True):
        np.testing.assert_allclose(linear(ours, bits), theirs, atol=1e-5)
found = {(way, s): right for way in ways for s, _, right in ways[way]}
assert base_accuracy > 0.85
for way in ("linear", "k-means"):
    assert found[way, "4 bits"] > base_accuracy - 0.06
    assert found[way, "8 bits"] > base_accuracy - 0.02
assert found["k-means", "2 bits"] > found["linear", "2 bits"] - 0.02
assert {len(np.unique(codebooks[bits])) for bits in (2, 4)} == {4, 16}
assert recovered["k-means, 2 bits"][1] > base_accuracy - 0.1
for before, after in recovered.values():
    assert after > before - 0.02
# The adapter: equal sizes, a gain on both, and integers that stay.
with ks.adapters_disabled(adapted["int8"]):
    right = course.accuracy(adapted["int8"], test_x, data.test_y)
assert abs(right - base_accuracy) < 0.03
for each in adapted.values():
    assert course.accuracy(each, new_test, data.test_y) > 0.5
try:
    ks.merge_model(adapted["int8"])
except ValueError:
    merged = False
else:
    merged = True
assert not merged
ks.unwrap_model(adapted["int8"])
for layer, kernel in zip(adapted["int8"].layers, kernels, strict=True):
    scaled = 127 * kernel / np.abs(kernel).max(0)
    assert numpy(layer._kernel).dtype == np.int8
    assert np.abs(numpy(layer._kernel) - scaled).max() < 0.51
assert shares[8][0].argmax() == shares[32][0].argmax() == 985  # daisy
assert np.abs(shares[8] - shares[32]).max() < 0.1
assert np.abs(shares[4] - shares[32]).max() > 0.1

# %% [markdown]
# ## Exercises
#
# 1. One share for every layer is crude. Which of the three layers bears zeros
#    best? (`ks.sensitivity_scan` prunes one layer at a time.)
# 2. Codes that occur often could get shorter names (Huffman). The entropy
#    $H = -\sum_c p_c \log_2 p_c$ bounds the mean number of bits. What is it
#    for the 4-bit codes of the layer `second`, linear and k-means?

# %% [markdown]
# ### Solution 1
#
# The layer in the middle, `second`, bears it best.

# %% tags=["solution"]
scan = ks.sensitivity_scan(model, (test_x, data.test_y), [0.5, 0.8, 0.9, 0.95])
rows = [
    (name, *(f"{right:.0%}" for right in curve.values()))
    for name, curve in scan.items()
]
course.table(
    "One layer pruned", ("layer", "50 %", "80 %", "90 %", "95 %"), rows
)

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
kernel = kernels[1]
step = np.abs(kernel).max(0) / 7
coded = {"linear": np.round(kernel / step), "k-means": codebooks[4]}
entropy = {}
for name, codes in coded.items():
    share = np.unique(codes, return_counts=True)[1] / codes.size
    entropy[name] = float(-np.sum(share * np.log2(share)))
    print(f"{name}: {entropy[name]:.2f} bits")
assert max(entropy.values()) < 4.001  # k-means uses its values more evenly

# %% [markdown]
# ## Further reading
#
# - Han, Mao, Dally, *Deep Compression* (arXiv 1510.00149): pruning, k-means
#   codebooks and Huffman codes, one after the other.
# - Jacob et al., *Quantization and training* (arXiv 1712.05877): integers in
#   memory and in products.
# - Hu et al., *LoRA* (arXiv 2106.09685): the adapter of this page.
# - Dettmers et al., *QLoRA* (arXiv 2305.14314): LoRA on a base of 4 bits
#   whose values are spaced for normally distributed weights.
# - Tan and Le, *EfficientNet* (arXiv 1905.11946), from which Lite0 comes.
