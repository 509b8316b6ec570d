# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Three backends: one adapter file, the same answers to six digits
#
# One process trains an adapter for MiniLM and leaves a file of 300 KiB. Three
# others, on JAX, TensorFlow and PyTorch, load it and rate the same sentences.
# It takes two commands and a script in which no backend is named. What is hard
# to get right: Keras has one backend a process, the frameworks draw different
# random numbers from the same seed, and no two of them add up in the same
# order.

# %% [markdown]
# *What you see:* on the left, how strongly the model leans towards "friendly"
# for some test sentences; the marks of three backends lie inside of each
# other. In the middle, how far each backend is from the process that trained,
# beside the rounding of float32 (where a dot is missing, a diamond covers it).
# On the right, the same question for training: all start from one file, and
# after twenty steps their losses still agree to that rounding.
#
# **You will learn**
#
# - to run one script under several backends;
# - to move an adapter, and a start for training, between them as files;
# - how far numbers agree, and why not to the last bit.
#
# It needs MiniLM, the rated sentences and, if you can, all three backends. It
# takes about 3 minutes on two CPU cores. The backend that trains is chosen in
# the first cell, and the outputs name it.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
import safetensors.numpy

running = os.environ["KERAS_BACKEND"]
print("backend:", running)

# %% [markdown]
# ## The script
#
# Keras reads `KERAS_BACKEND` once, when it is first imported. So this page does
# not import Keras at all: it starts processes. What they run is
# `tutorials/three_backends.py`, about a hundred lines: MiniLM with a head of
# two classes, LoRA of rank 8 on queries and values, and the sentences about
# films of [tutorial 01](01_quickstart.ipynb). This is its part for a backend
# that did not train:

# %%
package = pathlib.Path(importlib.util.find_spec("keras_spectral").origin)
script = package.parents[1] / "tutorials" / "three_backends.py"
source = script.read_text()
print(source[source.index("def check") : source.index("if __name__")].strip())

# %% [markdown]
# Two of its choices matter. The start of the training is loaded from a file,
# since the same seed gives *different* numbers on different backends. And there
# is no dropout, which would draw such numbers in each step.
#
# ## Two commands
#
# `teach` trains on one backend. `check` runs on each that is installed.

# %%
holder = tempfile.TemporaryDirectory()
folder = pathlib.Path(holder.name)


def start(task, backend):
    print(f"$ KERAS_BACKEND={backend} python three_backends.py {task} FOLDER")
    done = subprocess.run(
        [sys.executable, script, task, folder],
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    print(done.stdout if done.returncode == 0 else done.stderr[-2000:])


start("teach", running)

# %%
backends = [
    name
    for name in ("jax", "tensorflow", "torch")
    if importlib.util.find_spec(name)
]
for name in backends:
    start("check", name)
results = {name: np.load(folder / f"checked-{name}.npz") for name in backends}

# %% [markdown]
# ## The same answers
#
# Guess before you look: in which digit do the logits differ? Each backend's
# logits $z$ are compared with those $z_0$ of the process that trained, as
# $\max |z - z_0| / \max |z_0|$, once with the adapters running and once merged
# into the kernels.

# %% tags=["plot"]
COLORS = {"jax": "#2563eb", "tensorflow": "#ea580c", "torch": "#059669"}
GREY = "#6b7280"
ROUNDING = 2.0**-24  # of float32, relative


def draw_logits(axis):
    """The two logits' difference for some sentences, a mark a backend."""
    for size, (name, result) in zip((150, 60, 12), results.items()):
        lean = result["adapted"][:24] @ [-1, 1]
        axis.scatter(range(24), lean, s=size, c=COLORS[name], label=name)
    axis.axhline(0, color=GREY, lw=0.8)
    axis.set(xlabel="test sentence", ylabel="logit friendly - logit unfriendly")
    axis.margins(y=0.3)
    axis.legend(frameon=False, ncols=3, loc="upper center", columnspacing=1)


def draw_differences(axis):
    """A dot for each backend, with the adapters running and merged."""
    for row, name in enumerate(backends):
        for way, shape in (("adapted", "o"), ("merged", "D")):
            value = max(difference(results[name][way]), 1e-9)
            filled = COLORS[name] if way == "adapted" else "white"
            axis.plot(value, row, shape, ms=10, mec=COLORS[name], mfc=filled)
    for shape, fill, text in (("o", GREY, "adapters on"), ("D", "w", "merged")):
        axis.plot([], [], shape, mec=GREY, mfc=fill, ms=8, label=text)
    axis.axvline(ROUNDING, color=GREY, ls="--", lw=1, label="float32 rounding")
    axis.set(xscale="log", xlim=(5e-10, 1e-4), ylim=(len(backends) + 0.6, -0.6))
    axis.set_xticks([1e-9, 1e-7, 1e-5], ["0", "1e-7", "1e-5"])
    axis.minorticks_off()
    axis.set_yticks(range(len(backends)), backends)
    axis.set_xlabel("largest relative difference of a logit")
    axis.legend(frameon=False, loc="lower right")


def draw_training(axis):
    """How far each backend's loss is from the one that trained, by step."""
    own = results[running]["losses"]
    steps = np.arange(1, len(own) + 1)
    axis.plot(steps, own, color=GREY, lw=2, label="the loss itself")
    for name, result in results.items():
        if name != running:
            gap = np.maximum(np.abs(result["losses"] - own), 1e-9)
            label = f"{name} - {running}"
            axis.plot(steps, gap, "o-", ms=3, color=COLORS[name], label=label)
    axis.axhline(ROUNDING, color=GREY, ls="--", lw=1)
    axis.set(yscale="log", ylim=(5e-10, 1e3), xlabel="step of the training")
    axis.set_ylabel("loss, and distance of two losses")
    axis.set_xticks(steps[:: max(1, len(steps) // 4)])
    axis.set_yticks([1e-9, 1e-6, 1e-3, 1], ["0", "1e-6", "1e-3", "1"])
    axis.minorticks_off()
    axis.legend(frameon=False, loc="upper right", ncols=2, fontsize=9)


# %%
taught = np.load(folder / "taught.npz")


def difference(logits):
    return (
        np.abs(logits - taught["after"]).max() / np.abs(taught["after"]).max()
    )


def right(logits):
    return f"{np.mean(logits.argmax(axis=-1) == taught['y']):.1%}"


rows = [(f"{running}, before training", right(taught["before"]), "", "", "")]
rows += [
    (
        name,
        right(result["adapted"]),
        f"{difference(result['adapted']):.1e}",
        f"{difference(result['merged']):.1e}",
        f"{result['losses'][-1]:.6f}",
    )
    for name, result in results.items()
]
table = rich.table.Table(
    *("backend", "right", "adapters on", "merged", "last loss"),
    title=f"The file of {running}, loaded (chance: 50 %)",
)
for row in rows:
    table.add_row(*row)
rich.console.Console(width=96).print(table)

# %% tags=["picture"] alt="Three panels. Left: for 24 test sentences the difference of the two logits, with marks of three backends inside of each other. Middle: for each backend the largest relative difference to the process that trained, with the adapters on and merged, on a logarithmic axis; all are at or near the rounding of float32, about 1e-7 to 1e-6. Right: over twenty steps of training from the same file the loss falls, and the distance between the backends' losses stays at the rounding of float32."
figure, axes = plt.subplots(
    1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1.2, 1, 1.1]
)
draw_logits(axes[0])
axes[0].set_title("Three backends, the same answers")
draw_differences(axes[1])
axes[1].set_title(f"Distance to the {running} that trained")
draw_training(axes[2])
axes[2].set_title("Training from the same file")
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
out = pathlib.Path(os.environ.get("KERAS_SPECTRAL_OUT", "out"))
out.mkdir(parents=True, exist_ok=True)
figure.savefig(out / "13_three_backends.png", dpi=150)

# %% [markdown]
# The differences are about 1e-6. They come from float32, which keeps seven
# digits: on the way through six blocks of MiniLM there are many sums, and the
# same sum in another order rounds differently. Merging changes the order on the
# same backend, too. An answer can only change where its two logits agree to
# six digits.
#
# Twenty steps at a low rate do not drive the backends apart. Do not count on
# that for long training: it is a feedback loop, in which each step starts from
# the rounding of the last, and dropout and shuffling differ for sure. Expect
# equal outputs from equal weights, and equal *quality* from equal training, not
# equal bits.
#
# ## Exercises
#
# 1. Each backend saved the adapter again after loading it. Do the files hold
#    the same numbers to the last bit?
# 2. Add up 100,000 float32 numbers in two orders. How large is the relative
#    difference of the sums?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
original = safetensors.numpy.load_file(folder / "adapter.safetensors")
for name in backends:
    again = safetensors.numpy.load_file(folder / f"again-{name}.safetensors")
    assert again.keys() == original.keys()
    assert all(np.array_equal(again[key], original[key]) for key in original)
print(f"{len(original)} tensors, equal to the last bit on", *backends)

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
numbers = np.random.default_rng(7).random(100_000, dtype="float32")
forward = np.cumsum(numbers)[-1]  # one after the other
tree = numbers.sum()  # NumPy adds in blocks
gap = abs(forward - tree) / tree
print(f"{forward:.3f} and {tree:.3f}, relative difference {gap:.1e}")
assert 0 < gap < 1e-3

# %% [markdown]
# ## Checks

# %% tags=["checks"]
assert running in backends
learned = np.abs(taught["after"] - taught["before"]).max()
own = results[running]["losses"]
for result in results.values():
    assert difference(result["adapted"]) < 1e-4
    assert difference(result["merged"]) < 1e-4
    assert learned > 100 * np.abs(result["adapted"] - taught["after"]).max()
    assert result["losses"][-1] < result["losses"][0]
    assert abs(result["losses"][0] - own[0]) < 1e-4
holder.cleanup()

# %% [markdown]
# ## Further reading
#
# - Hu et al. 2021, *LoRA*, arXiv 2106.09685: the adapter in the file.
# - Dettmers et al. 2023, *QLoRA*, arXiv 2305.14314: small adapters for a base
#   that stays as it is, the habit that makes adapter files worth moving.
