# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One script, three backends: same adapter file, same numbers
#
# Keras reads `KERAS_BACKEND` once, when it is first imported. So a process has
# one backend, and to compare three we need three processes. This page holds a
# small program as text and starts it under each backend that is installed. One
# of them trains a model and an adapter; all of them load the two files, answer
# the same questions, and train on from the same start.
#
# **You will learn**
#
# - how to run one script under several backends,
# - that base weights and adapters move between them as files,
# - how far the numbers agree, and why not to the last bit.
#
# It takes about a minute on a laptop, most of it for importing frameworks. The
# backend that trains is changed in one line.

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

import keras
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table
import safetensors.numpy

from keras_spectral import course

console = rich.console.Console(width=90)
keras.utils.set_random_seed(7)
running = keras.backend.backend()
data = course.images(train=1000, test=400)
print("backend:", running)
print("data:", data.name)

# %% [markdown]
# ## The program
#
# It is called with a task and a folder. `teach` trains a small convolutional
# net on upright images and saves its weights. Then it wraps every layer with
# LoRA, saves the untrained adapters as a start for later, trains them on
# images turned by a quarter, and saves them again. `check` only loads.
#
# The start must come from a file: the same seed gives *different* random
# numbers on different backends. Nothing in the program names a backend.

# %%
PROGRAM = """
import pathlib
import sys
import time

import keras
import numpy as np

import keras_spectral as ks

task, folder, epochs = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
name = keras.backend.backend()
data = np.load(folder / "data.npz")
x, y, test_x = data["x"], data["y"], data["test_x"]
turned, turned_test = (np.rot90(a, axes=(1, 2)).copy() for a in (x, test_x))
keras.utils.set_random_seed(7)


def new_model():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.Conv2D(8, 3, 2, "same", activation="relu", name="conv1"),
            layers.Conv2D(16, 3, 2, "same", activation="relu", name="conv2"),
            layers.Flatten(),
            layers.Dense(64, activation="relu", name="hidden"),
            layers.Dense(10, name="head"),
        ]
    )


def fit(model, x, learning_rate, epochs):
    model.compile(
        keras.optimizers.Adam(learning_rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    clock = []
    tick = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: clock.append(time.perf_counter())
    )
    history = model.fit(
        x, y, batch_size=50, epochs=epochs, shuffle=False, verbose=0,
        callbacks=[tick],
    )
    # The first epoch compiles, so the clock starts where it ends.
    return history.history["loss"], np.median(np.diff(clock)) / (len(x) / 50)


def logits(model):
    return model.predict(turned_test, batch_size=400, verbose=0)


model = new_model()
if task == "teach":
    fit(model, x, 3e-3, epochs)
    model.save_weights(folder / "base.weights.h5")
    ks.wrap_model(model, "lora", target="all", rank=4, seed=7)
    ks.save_adapters(model, folder / "start.safetensors")
    base = logits(model)
    fit(model, turned, 5e-3, epochs)
    ks.save_adapters(model, folder / "adapter.safetensors")
    np.savez(folder / "teach.npz", base=base, adapted=logits(model))
else:
    model.load_weights(folder / "base.weights.h5")
    ks.load_adapters(model, folder / "adapter.safetensors")
    adapted = logits(model)
    ks.save_adapters(model, folder / f"again-{name}.safetensors")
    ks.merge_model(model)
    merged = logits(model)
    model = new_model()
    model.load_weights(folder / "base.weights.h5")
    ks.load_adapters(model, folder / "start.safetensors")
    losses, seconds = fit(model, turned, 5e-3, epochs)
    np.savez(
        folder / f"check-{name}.npz", adapted=adapted, merged=merged,
        losses=losses, seconds=seconds, version=keras.version(),
    )
"""

# %% [markdown]
# ## Run it everywhere
#
# A backend that is not installed is left out.

# %%
EPOCHS = 6 if course.FAST else 15
packages = ("jax", "tensorflow", "torch")
backends = [name for name in packages if importlib.util.find_spec(name)]
for name in packages:
    if name not in backends:
        print(f"{name} is not installed and left out")
assert running in backends

holder = tempfile.TemporaryDirectory()
folder = pathlib.Path(holder.name)
(folder / "program.py").write_text(PROGRAM)
np.savez(folder / "data.npz", x=data.x, y=data.y, test_x=data.test_x)


def start(task, backend):
    done = subprocess.run(
        [sys.executable, folder / "program.py", task, folder, str(EPOCHS)],
        env=os.environ | {"KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


start("teach", running)
taught = np.load(folder / "teach.npz")
results = {}
for name in backends:
    start("check", name)
    results[name] = np.load(folder / f"check-{name}.npz")


def accuracy(logits):
    return float(np.mean(logits.argmax(-1) == data.test_y))


before, after = accuracy(taught["base"]), accuracy(taught["adapted"])
size = (folder / "adapter.safetensors").stat().st_size
print(f"turned images: {before:.1%} -> {after:.1%} right on {running}")
print(f"adapter file: {size:,} bytes")
assert after > before + 0.2

# %% [markdown]
# ## Same answers
#
# Each backend's logits $z$ are compared with those of the process that
# trained, $\max |z - z_0| / \max |z_0|$, once with the adapters running and
# once merged into the kernels.

# %%
reference = taught["adapted"]  # (400, 10)


def difference(logits):
    return np.abs(logits - reference).max() / np.abs(reference).max()


table = rich.table.Table(title=f"The files of {running}, loaded")
table.add_column("backend")
for heading in (
    "accuracy",
    "difference,\nadapters on",
    "difference,\nmerged",
    "last loss of\ntraining on",
    "ms a step",
):
    table.add_column(heading, justify="right")
for name, result in results.items():
    table.add_row(
        name,
        f"{accuracy(result['adapted']):.2%}",
        f"{difference(result['adapted']):.1e}",
        f"{difference(result['merged']):.1e}",
        f"{result['losses'][-1]:.6f}",
        f"{1e3 * result['seconds']:.1f}",
    )
console.print(table)

for result in results.values():
    assert difference(result["adapted"]) < 1e-5
    assert difference(result["merged"]) < 1e-5
    assert str(result["version"]) == keras.version()
assert np.abs(taught["base"] - reference).max() > 1  # it did learn

# %% [markdown]
# The differences are float32 rounding, which keeps about seven digits. The
# same sum in another order rounds differently, and each framework orders its
# sums in its own way. Speed on a net this small says little: a step is mostly
# overhead, which a larger model hides.
#
# ## Same training
#
# All started from the same adapters and saw the same batches in the same order
# (`shuffle=False`).

# %%
COLORS = {"jax": "#2563eb", "tensorflow": "#ea580c", "torch": "#059669"}
figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 3.9), layout="constrained"
)
own = results[running]["losses"]  # (EPOCHS,)
steps = np.arange(1, EPOCHS + 1)
for width, (name, result) in zip((9, 5, 1.5), results.items()):
    left.plot(steps, result["losses"], c=COLORS[name], lw=width, label=name)
    gap = np.abs(result["losses"] / own - 1)
    if name != running:
        right.plot(steps, gap, "o-", ms=4, c=COLORS[name], label=name)
left.legend(frameon=False)
left.set(title="Training loss, same start and batches", xlabel="epoch")
left.set(ylabel="mean loss of the epoch", ylim=(0, None))
right.legend(frameon=False)
right.axhline(2**-24, c="#6b7280", ls="--", lw=1)
right.text(EPOCHS, 2**-24 / 1.3, "float32 rounding", ha="right", va="top")
right.set_yscale("symlog", linthresh=1e-8)  # shows 0 as well
right.set(title=f"Distance to {running}", xlabel="epoch", ylim=(0, None))
right.set(ylabel="relative difference of the loss")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
course.show(figure, "13_three_backends")

for result in results.values():
    assert result["losses"][-1] < result["losses"][0] / 1.5
    assert abs(result["losses"][0] / own[0] - 1) < 1e-3
    assert np.allclose(result["losses"], own, rtol=2e-2)

# %% [markdown]
# On the left the curves cover each other. On the right one sees that training
# is a feedback loop: each step starts from the rounding of the last. Expect
# equal outputs from equal weights, and equal *quality* from equal training,
# not equal bits.
#
# ## Exercises
#
# 1. Each backend saved the adapters again after loading them. Do the files
#    hold the same numbers to the last bit?
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
holder.cleanup()

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
# ## Further reading
#
# - Hu et al., *LoRA* (arXiv 2106.09685): the adapter in the file.
# - Dettmers et al., *QLoRA* (arXiv 2305.14314): small adapters for a base that
#   stays as it is, the habit that makes adapter files worth moving around.
