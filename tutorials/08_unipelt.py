# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # UniPELT: gates as a team of experts
#
# LoRA, prefix tuning and bottleneck adapters change different places of a
# transformer block, and which suits a task is not known beforehand. UniPELT
# puts all three into every block, each behind a **gate**: a trained number
# from 0 to 1, for each example, that says how much the part takes part.
#
# **You will learn**
#
# - what the gates multiply, and how many weights they cost;
# - to record gates and to read their pictures;
# - to close gates by a penalty and to remove the parts that are nearly shut;
# - to search for the parts that fit into a budget.
#
# About a minute on a laptop. Change `"jax"` below for another backend.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

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
print("backend:", keras.backend.backend())

# %% [markdown]
# ## A reader, and a page turned by a quarter
#
# `course.reader` is a small BERT classifier that reads a digit as a sentence
# of 16 words, each the mean grey of 2 x 2 pixels. The `shifted` sentences are
# the same digits, turned by a quarter: the same words in another order.

# %%
LAYERS = 1 if course.FAST else 3
EPOCHS = 4 if course.FAST else 12
model, data, shifted = course.reader(LAYERS)
x, y = shifted.x, shifted.y  # {"token_ids": (1300, 17), ...}, (1300,)
test_x, test_y = shifted.test_x, shifted.test_y
base_weights = model.get_weights()
before = course.accuracy(model, test_x, test_y)
clean = course.accuracy(model, data.test_x, data.test_y)
print(f"{data.name}: upright {clean:.1%}, turned {before:.1%}")
assert before < clean - 0.1

# %% [markdown]
# ## Three parts, four gates
#
# In each block, with $z$ for the part's own input:
#
# - **LoRA** on query and value: $y = x K + g\, x A B$, with a gate each;
# - **prefix**: keys and values that every token's attention sees besides its
#   own, $\mathrm{attention}(Q, [g P_k; K], [g P_v; V])$;
# - **adapter**: after the feed-forward net, $z + g\, W_2\, \mathrm{relu}(W_1
#   z)$.
#
# A gate is a mean over the $n$ tokens that are no padding,
#
# $$g = \frac{1}{n} \sum_{t=1}^{n} \sigma(z_t w + c),$$
#
# one number for each example. It costs one vector $w$ and one number $c$.

# %%
WIDTH, RANK, LENGTH, SIZE = 64, 4, 8, 8
options = {"lora": RANK, "prefix": LENGTH, "bottleneck": SIZE, "seed": 7}
ks.wrap_model(model, "unipelt", **options)
summary = ks.adapter_summary(model, console)

lora = 2 * RANK * (WIDTH + WIDTH)
prefix = LENGTH * 2 * WIDTH
adapter = (WIDTH * SIZE + SIZE) + (SIZE * WIDTH + WIDTH)
gates_of_block = 4 * (WIDTH + 1)
head = WIDTH * 10 + 10  # trains along by default
block = lora + prefix + adapter + gates_of_block
assert course.count(model.trainable_weights) == LAYERS * block + head
at_start = ks.collect_gates(model, test_x)  # for later

# %% [markdown]
# Now train. `GateRecorder` notes the mean of every gate over each epoch.

# %%
recorder = ks.callbacks.GateRecorder()
history = course.train(model, x, y, 1e-2, EPOCHS, callbacks=[recorder])
after = course.accuracy(model, test_x, test_y)
loss = history["loss"]
print(f"loss {loss[0]:.2f} -> {loss[-1]:.2f}, accuracy {after:.1%}")
assert loss[-1] < 0.9 * loss[0]
assert after > before + 0.05
assert len(recorder.records) == len(history["gate/prefix"]) == EPOCHS

# %% [markdown]
# ## Reading gates
#
# `collect_gates` runs one batch and returns each gate of each example.

# %%
gates = ks.collect_gates(model, test_x)
first = next(iter(gates.values()))  # {gate: (497,)}
assert len(gates) == LAYERS
assert sorted(first) == ["adapter", "lora_query", "lora_value", "prefix"]
assert all(gate.shape == test_y.shape for gate in first.values())

spread_at_start, spread = (
    np.mean([gate.std() for parts in g.values() for gate in parts.values()])
    for g in (at_start, gates)
)
print(f"deviation: {spread_at_start:.3f} at the start, now {spread:.3f}")
assert spread > 1.5 * spread_at_start

figure = plt.figure(figsize=(11, 6.5), layout="constrained")
top, bottom = figure.subfigures(2, 1)
axes = top.subplots(1, 2, width_ratios=[1.5, 1])
ks.plots.plot_gate_bars(gates, ax=axes[0])
axes[0].set_title("Mean gate, and deviation over examples")
axes[0].set(ylim=(0, 1.35), yticks=np.linspace(0, 1, 5))
ks.plots.plot_gate_map(gates, ax=axes[1])
axes[1].set_title("Mean gate, blocks x parts")
axis = bottom.subplots()
ks.plots.plot_gate_history(recorder.records, ax=axis)
axis.set(title="While it trains (thin: single blocks)", ylim=(0, 1))
axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
course.show(figure, "08_unipelt")

# %% [markdown]
# Top left, the bars show how far each part takes part in each block, the thin
# lines how much that differs between examples. Top right, the same means as
# numbers. Below, how they came about: all gates start near one half, because
# $w$ is small and $c$ is zero.
#
# A part can be open for some digits and half shut for others. How much of
# that has to do with the digit? Below is the share of a gate's variance that
# lies between the classes ($\eta^2$: 0 is nothing, 1 is all of it).


# %%
def explained(gate):
    means = np.array([gate[test_y == c].mean() for c in range(10)])  # (10,)
    return np.var(means[test_y]) / np.var(gate)


shares = []
for path, parts in gates.items():
    row = {name: explained(gate) for name, gate in parts.items()}
    print(path, *(f"{name} {share:.2f}" for name, share in row.items()))
    shares += row.values()
mixed = np.random.default_rng(7).permutation(len(test_y))
chance = max(explained(gate[mixed]) for gate in first.values())
print(f"shuffled: at most {chance:.2f}")
assert chance < 0.1 < max(shares)

# %% [markdown]
# Shuffled gates show what chance gives. Where a gate is far above it, the
# team is put together differently for different digits.
#
# ## Close gates, remove parts
#
# Nothing in the loss asks a gate to shut. `penalty="l1"` adds `sparsity`
# times the sum of the gates to it; we tried until the gates visibly shut.
# Then `prune_parts` takes away the parts whose gates are on average below a
# threshold, here set so that the lowest third goes. (By default a part has to
# stay below 0.05 for the last 1000 steps.)

# %%
ks.unwrap_model(model)
model.set_weights(base_weights)
ks.wrap_model(model, "unipelt", penalty="l1", sparsity=0.03, **options)
course.train(model, x, y, 1e-2, EPOCHS, callbacks=[ks.callbacks.GateRecorder()])
sparse = course.accuracy(model, test_x, test_y)
weights = course.count(model.trainable_weights)


def part_means(gates):
    """The (larger) mean gate of each part of each block, lowest first."""
    means = {}
    for path, parts in gates.items():
        for name, gate in parts.items():
            key = path, name.split("_")[0]  # query and value are one part
            means[key] = max(means.get(key, 0), gate.mean())
    return sorted(means.values())


usual = np.mean(part_means(gates))
means = part_means(ks.collect_gates(model, test_x))
print(f"mean gate {usual:.2f}, with the penalty {np.mean(means):.2f}")
assert np.mean(means) < usual - 0.05

threshold = (means[LAYERS - 1] + means[LAYERS]) / 2
removed = ks.prune_parts(model, steps=0, threshold=threshold)
pruned_weights = course.count(model.trainable_weights)
for path, parts in removed.items():
    print("removed from", path.split("/")[-1] + ":", ", ".join(parts))
assert removed and pruned_weights < weights

pruned = course.accuracy(model, test_x, test_y)
course.train(model, x, y, 3e-3, 3)
healed = course.accuracy(model, test_x, test_y)
assert healed > before + 0.05
assert healed > sparse - 0.15

table = rich.table.Table(title="Turned digits")
for heading in ("UniPELT", "trained weights", "accuracy"):
    table.add_column(heading, justify="right")
for name, number, share in (
    ("all parts", weights, after),
    ("all parts, l1", weights, sparse),
    ("pruned", pruned_weights, pruned),
    ("pruned, 3 more epochs", pruned_weights, healed),
):
    table.add_row(name, f"{number:,}", f"{share:.1%}")
console.print(table)

# %% [markdown]
# The penalty presses all gates down, and those that the loss holds open stay
# highest. A low gate need not mean an unimportant part, because the weights
# behind it may have grown: look at the accuracy, and train on for a little.
# What is certain is that a removed part has no weights and takes no time.
#
# ## Search for parts
#
# `search_parts` makes the choice itself trainable. With `gate="gumbel"` a part
# is on or off for all examples,
#
# $$g = \left[\sigma\!\left((\ell + \epsilon) / \tau\right) > \tfrac12
# \right],$$
#
# where $\ell$ is trained, $\epsilon$ is logistic noise drawn anew in each
# step, and the gradient is that of the sigmoid. The work that a part adds is
# a price in the loss. Afterwards the most probable parts that fit within a
# budget stay, with sigmoid gates, for you to train on. Exercise 2 does it.
#
# ## Exercises
#
# 1. `gate="softmax"` gives shares of the three parts instead. Check that they
#    sum to one, and that they are equal during the first `warmup_steps`.
# 2. Let `search_parts` choose parts within half of the added work. Count the
#    work of what it chose.

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
ks.unwrap_model(model)
model.set_weights(base_weights)
ks.wrap_model(model, "unipelt", gate="softmax", warmup_steps=500, **options)
for parts in ks.collect_gates(model, test_x).values():
    assert sorted(parts) == ["adapter", "lora", "prefix"]
    assert np.allclose(sum(parts.values()), 1, atol=1e-5)
    assert np.allclose(parts["lora"], 1 / 3)

# %% [markdown]
# ### Solution 2
#
# The work is the numbers that each token is multiplied by, without biases.

# %% tags=["solution"]
ks.unwrap_model(model)
model.compile(
    keras.optimizers.Adam(1e-2),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
chosen = ks.search_parts(
    model, (x, y), epochs=1 if course.FAST else 6, keep=0.5, **options
)
work = {"lora": lora, "prefix": prefix, "adapter": 2 * WIDTH * SIZE}
used = sum(work[part] for parts in chosen.values() for part in parts)
print(chosen, f"{used} of {LAYERS * sum(work.values())}")
assert 0 < used <= 0.5 * LAYERS * sum(work.values())

# %% [markdown]
# ## Further reading
#
# - Mao et al. 2022, UniPELT, arXiv 2110.07577: the parts and their gates.
# - Li and Liang 2021, prefix tuning, arXiv 2101.00190.
