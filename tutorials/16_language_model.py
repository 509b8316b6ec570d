# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A language model at half the size
#
# SmolLM2 has 135 million weights, 538 megabytes of them, and knows the capital
# of France. We take weights away in two ways. A tenth of its ranks costs it
# next to nothing if we ask the model itself which ones, and all it knows if we
# do not; half of its bytes cost it most of what it knows by ranks, and nothing
# that we can measure by bits. What is hard is to see why.

# %% [markdown]
# What you see: perplexity over megabytes, with what each model writes next. The
# further down, the better; the lowest are the whole model and those with fewer
# bits. Of the three models without a tenth of their kernels the red triangle
# was cut without a look at any text, the orange square looked at text, and
# the grey one asked in which layers it matters. The blue line is what 100
# steps of lessons bring back.
#
# **You will learn**
#
# - to measure what a smaller language model has forgotten: perplexity;
# - which of its kernels bear something, and how gradients tell;
# - to teach a smaller model with `ks.distiller`, without labels;
# - what bits cost beside that.
#
# You need SmolLM2 and the sentences that `make demo` fetches, 9 GB of memory,
# and about twenty minutes on two CPU cores.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time
import warnings

import keras
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
from rich.console import Console

import keras_spectral as ks
from keras_spectral import course
from keras_spectral.course.smollm import LanguageModel
from keras_spectral.course.smollm import empty_backbone
from keras_spectral.course.smollm import smollm

course.quiet()
warnings.filterwarnings("ignore", message=".*fewer rows")
warnings.filterwarnings("ignore", message=".*`quantize` method")
warnings.filterwarnings("ignore", message=".*use of `x.T` on tensors")
print("backend:", keras.backend.backend())

# %% [markdown]
# All outputs below are of the backend that is printed here, and of one seed.
#
# ## A language model and what it is measured by
#
# SmolLM2-135M is a Llama of 30 blocks (Allal et al. 2025). It gives each word
# that might come next a probability. Its **perplexity** on a text is
# $\exp(-\frac{1}{n} \sum_i \log p_i)$ with $p_i$ for the word that did come:
# as many words it hesitates between, on average. A model that knows nothing
# hesitates between all 49,152.
#
# Our text are editorials of the New York Times: 2,048 tokens to test on, and
# four times as many others to look at while we compress.

# %%
BLOCKS, TEST, SEEN = (2, 2, 8) if course.FAST else (30, 32, 128)
HALF = 0.63  # of the kernels is half of the model, whose word table stays
writer = smollm(BLOCKS)
whole = writer.backbone
text = course.prose("editorials")
tests = writer.rows(text[-1200:], 64, TEST)  # (32, 65) tokens
seen = writer.rows(text[:-1200], 64, SEEN)[:, :-1]  # (128, 64)
START = "The capital of France is"
found = {}  # name: megabytes, perplexity, what it writes


def megabytes(model):
    bits = [int("".join(filter(str.isdigit, w.dtype))) for w in model.weights]
    sizes = [np.prod(weight.shape) for weight in model.weights]
    return np.dot(sizes, bits) / 8e6


def measure(name, backbone, label, size=None):
    size, model = size or megabytes(backbone), LanguageModel(backbone)
    start = time.process_time()
    perplexity = model.perplexity(tests)
    seconds = time.process_time() - start
    written = " ".join(writer.go_on(START, 8, backbone).split())
    found[name] = size, perplexity, written
    print(f"{label}, {size:.0f} MB: {perplexity:,.0f} after {seconds:.0f} s of")
    print(f"    the processor's time. {START} {written}")


measure("whole", whole, "whole")

# %% [markdown]
# ## Fewer ranks
#
# Seven kernels a block, 210 in all. We remove a tenth of their weights in three
# ways: the directions that count least in the *kernels*; those that count least
# in the *outputs* on our text, of which `calibrate` keeps the second moments
# ([compression](04_compression.ipynb) explains both); and of these those that
# count least for what the *model* gives. The first two take the same share of
# every kernel. For the third, `method="sensitivity"`, a pass backwards tells how
# far a small change of a layer's output $z$ moves the model's output $y$: with
# $J = \partial y / \partial z$ and a random direction $u$ the mean of
# $|J^T u|^2$ is the sum of the squares of $J$, and that is the price of a square
# that the layer drops. **Guess** before you look: what does each write without a
# tenth?

# %%
inputs = {"token_ids": seen, "padding_mask": np.ones_like(seen)}
calibration = ks.calibrate(whole, inputs, batch_size=16)
squares = [np.diag(moments.matrix()) for moments in calibration.values()]
peaks = [np.sqrt(x.max() / np.median(x)) for x in squares]
print(
    f"the largest input of a layer is {np.median(peaks):.0f} times its median"
)
print(f"(half of the layers have more), and {max(peaks):.0f} times in one")
options = {"method": "uniform", "target": "all-linear"}
asked = options | {"method": "sensitivity", "calibration": inputs}
asked["batch_size"] = 16
ways = {
    "kernels": options,
    "outputs": options | {"calibration": calibration},
    "asked": asked,
}
RATIOS = (0.1, HALF) if course.FAST else (0.1, 0.3, HALF)
small = {}
for way, own in ways.items():
    for ratio in RATIOS if way == "asked" else RATIOS[:1]:
        small[way, ratio] = ks.compress_model(whole, ratio, **own)
        label = f"{ratio:.0%} less, {way}"
        measure((way, ratio), small[way, ratio], label)
quiet = Console(quiet=True)
rows = ks.compression_report(small["asked", RATIOS[0]], quiet).layers
kinds = list(dict.fromkeys(row.path.split("/")[-1] for row in rows))
for kind in kinds:
    mine = [row for row in rows if row.path.endswith(kind)]
    kept = sum(r.weights[1] for r in mine) / sum(r.weights[0] for r in mine)
    untouched = sum(row.rank is None for row in mine)
    print(f"{kind}: {kept:.0%} kept, {untouched} of {len(mine)} untouched")

# %% [markdown]
# A tenth is nothing, and yet the model is destroyed if the kernels alone decide:
# it hesitates between more words than there are, since it is sure of wrong
# ones. The directions that count least in a kernel are not those that count
# least for text: in a typical layer the largest input is 17 times as large as
# the median, in one 2,410 times, and what a kernel loses there counts as much
# more. Looking at the outputs on 8,192 tokens saves it: 187 in the place of five
# million.
#
# But kernels are not alike. By its gradients the model asks to leave three of
# four as they are, and has some to spare in the others: of the queries 44 %, of
# the values nothing. Perplexity is 93 where it was 87, and it still knows Paris.
# With 30 % less it knows that and little more, and with half of the bytes, 63 %
# less, the sense is gone. Its kernels were trained on trillions of words, and
# there is not much in them that no text uses. What MiniLM bore in
# [compression](04_compression.ipynb) was for one easy question; this model has
# to know a bit of everything.
#
# ## Teach it
#
# What it forgot, the whole model still knows. `ks.distiller` trains the small
# one on the whole one's probabilities: at each place of the text all 49,152 of
# them, which say far more than the one word that came. No labels are needed.
# We let a LoRA on the thin kernels learn (`recover="lora"`) and put it into
# them when it has learned (`ks.finalize_transfer`), so that the model stays as
# small. Training all of the thin kernels instead takes a much lower rate.

# %%
STEPS, BATCH = (2, 2) if course.FAST else (100, 4)
lessons = writer.rows(text[:-1200], 64, STEPS * BATCH)[:, :-1]
pupil = ks.compress_model(whole, HALF, recover="lora", **asked)
student, teacher = LanguageModel(pupil), LanguageModel(whole)
student(lessons[:1]), teacher(lessons[:1])  # builds them
lesson = ks.distiller(student, teacher, label_weight=0)
lesson.compile(keras.optimizers.Adam(1e-3, clipnorm=1.0))
lesson.fit(lessons, batch_size=BATCH, verbose=0)
ks.finalize_transfer(pupil)
measure(("taught", HALF), pupil, f"{HALF:.0%} less, {STEPS} steps")

# %% [markdown]
# A hundred steps take perplexity from 849 to 330, with a few minutes of one
# core and 25,600 tokens. More steps and more text help further; those who
# prune language models train them again on billions of tokens. It still does
# not know Paris: what the ranks held is gone, and editorials do not say it.
#
# ## Fewer bits
#
# The same bytes can go another way: keep all weights, and give each fewer
# bits. To store 16 of 32 bits is a cast. Keras rounds kernels and the word
# table to 8 or 4 bits in one call ([small machines](10_small_machines.ipynb)
# shows how that works).


# %%
def rounded(bits):
    backbone = empty_backbone(BLOCKS)
    weights = whole.get_weights()
    if bits == 16:  # kept as bfloat16, computed in float32
        weights = [np.float32(w.astype(ml_dtypes.bfloat16)) for w in weights]
    backbone.set_weights(weights)
    if bits < 16:
        backbone.quantize(f"int{bits}")
    return backbone


for bits in (16, 8, 4):
    size = found["whole"][0] / 2 if bits == 16 else None
    measure(("bits", bits), rounded(bits), f"{bits} bits", size)

# %% [markdown]
# Half of the bytes, and the perplexity is the same: a weight of 16 bits has
# more digits than training gave it. A quarter costs 3 %, and even in a seventh
# of the bytes it knows Paris. (Our SmolLM2 comes out of a file of 4 bits, though
# of another grid, so it is used to rounding.)
#
# Rounding moves every weight a little, at random, and the errors of hundreds of
# weights nearly cancel in an output. A rank that is cut is missing altogether.
# So: **bits first**. What ranks are good for is what bits cannot do: fewer
# operations. Look at the seconds above: with 8 and 4 bits the model takes twice
# as long as whole, as a CPU unpacks numbers before it can multiply them; half of
# the bytes by ranks takes two thirds of the time. And both stack, with a LoRA on
# top ([adapters on integers](10_small_machines.ipynb)).


# %% tags=["plot"]
def draw():
    figure, axis = plt.subplots(figsize=(9.5, 5.6), layout="constrained")
    top = 4e3
    ways = {
        "asked": ("#9ca3af", "s", "fewer ranks, where the model spares them"),
        "taught": ("#2563eb", "o", "then taught by the whole model"),
        "bits": ("#059669", "D", "fewer bits"),
    }
    for way, (color, marker, label) in ways.items():
        start = ("asked", HALF) if way == "taught" else "whole"
        keys = [start, *(key for key in found if key[0] == way)]
        x, y = zip(*((found[key][0], min(found[key][1], top)) for key in keys))
        line = {"c": color, "marker": marker, "ms": 8, "lw": 1.5}
        axis.plot(x, y, label=label, **line)
    x = found["kernels", 0.1][0]
    axis.plot(x, top, "^", c="#dc2626", ms=9, label="by kernels, off the axis")
    x, y, _ = found["outputs", 0.1]
    axis.plot(x, y, "s", c="#f97316", ms=8, label="by outputs, equal shares")
    for key, (x, perplexity, written) in found.items():
        text = f'{perplexity:,.0f}: "...{written.split(".")[0][:22]}"'
        offset, side = (0, -16), "center"
        if key == ("bits", 4):
            offset = (0, 10)
        elif key[0] in ("asked", "outputs"):
            offset, side = (9, 4), "left"
        elif key[0] == "taught":
            offset, side = (-9, -3), "right"
        axis.annotate(
            text,
            (x, min(perplexity, top)),
            offset,
            textcoords="offset points",
            ha=side,
            fontsize=9,
        )
    half = found["whole"][0] / 2
    axis.axvline(half, c="k", lw=0.8, ls=":")
    axis.text(half - 4, 55, "half", ha="right")
    axis.set(yscale="log", ylim=(50, 1.4 * top), xlim=(0, 1.2 * 2 * half))
    axis.set_yticks([100, 300, 1000, 3000], ["100", "300", "1,000", "3,000"])
    axis.set(xlabel="megabytes", ylabel="perplexity on editorials")
    axis.set_title(f'"{START} ..."')
    axis.legend(frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    course.show(figure, "16_language_model")


# %% tags=["picture"] alt="Perplexity over megabytes. Fewer bits are a flat green line: 87 whole at 538 MB, 87 at half, 89 at a quarter, 132 at a seventh, and all of them write Paris. Fewer ranks, where the model spares them, are a grey line that rises from 87 to 93 without a tenth of the kernels, which still writes Paris, to 249 and to 849 at half of the bytes. An orange square at 495 MB, equal shares by outputs, is at 187 and writes Athens. A blue line leads from 849 down to 330, after lessons. A red triangle at 495 MB, cut by kernels, is off the axis at five million."
draw()

# %% [markdown]
# ## Checks

# %% tags=["checks"]
sizes = {key: size for key, (size, *_) in found.items()}
lost = {key: perplexity for key, (_, perplexity, _) in found.items()}
assert sizes["bits", 8] < 0.27 * sizes["whole"]
assert sizes["bits", 4] < 0.15 * sizes["whole"]
assert sizes["outputs", 0.1] == sizes["kernels", 0.1] < sizes["whole"]
assert np.isclose(sizes["asked", 0.1], sizes["outputs", 0.1], 1e-2)
assert np.isclose(sizes["taught", HALF], sizes["asked", HALF], 1e-2)
if not course.FAST:
    assert "Paris" in found["whole"][2] and "Paris" in found["bits", 8][2]
    assert lost["bits", 8] < 1.1 * lost["whole"]
    assert 100 * lost["outputs", 0.1] < lost["kernels", 0.1]
    assert lost["asked", 0.1] < 1.15 * lost["whole"]
    assert lost["taught", HALF] < lost["asked", HALF] / 2

# %% [markdown]
# ## Exercises
#
# 1. Where are the bytes? Count the share of the word table in the whole model
#    and in the one with half of the bytes. What ratio would `compress_model`
#    need for a quarter of the whole?
# 2. Later layers of a small model get other inputs than those that they were
#    fitted to. Compress by a tenth with `sequential=True`, which fits each
#    layer to what the layers before it really give now. What does it gain, and
#    what does it cost?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
table = 4e-6 * np.prod(whole.token_embedding.embeddings.shape)
for name in ("whole", ("asked", HALF)):
    print(f"{name}: {table / sizes[name]:.0%} of the bytes are the table")
kernels = sizes["whole"] - table  # and norms, of next to nothing
print(f"a quarter needs {1 - (sizes['whole'] / 4 - table) / kernels:.0%}")

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
start = time.process_time()
one_batch = asked | {"batch_size": SEEN}  # each layer is run once
row = ks.compress_model(whole, RATIOS[0], sequential=True, **one_batch)
print(f"{time.process_time() - start:.0f} s of the processor's time:")
measure("sequential", row, f"{RATIOS[0]:.0%} less, layer after layer")

# %% [markdown]
# ## Further reading
#
# - Allal et al. 2025, *SmolLM2*, arXiv 2502.02737.
# - Wang et al. 2024, *SVD-LLM*, arXiv 2403.07378: truncation by outputs, and
#   layer after layer.
# - Hinton et al. 2015, arXiv 1503.02531: what a teacher's probabilities say.
# - Frantar et al. 2022, *GPTQ*, arXiv 2210.17323: rounding to 4 bits by
#   outputs, which loses less than rounding alone.
