# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Soft prompts and prefixes against fine-tuning
#
# **Soft prompts** train vectors that stand among the embedded tokens, **prefix
# tuning** keys and values in every block. Both leave all weights of the model
# alone. We compare them with LoRA and with training the head or everything.
#
# **You will learn**
#
# - what a soft prompt and a prefix add to a transformer, in formulas;
# - how many weights each method trains, and what it reaches with them;
# - why a prefix adds to what attention finds but does not redistribute it;
# - that prompts are weak on a small model, and that length does not mend it.
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
# ## The model and its new task
#
# `course.reader` is a small BERT classifier from KerasHub. It reads a digit
# as 16 words, each the mean grey of 2 x 2 pixels, with [CLS] in front. In the
# new task the digits are turned by a quarter: the same words, in another
# order.

# %%
LAYERS = 1 if course.FAST else 2
EPOCHS = 4 if course.FAST else 12
model, data, turned = course.reader(LAYERS)
base_weights = model.get_weights()
total = course.count(model.weights)
clean = course.accuracy(model, data.test_x, data.test_y)
before = course.accuracy(model, turned.test_x, turned.test_y)
print(f"{data.name}: upright {clean:.1%} right, turned {before:.1%}")
assert before < clean - 0.1

# %% [markdown]
# ## Two ways to prompt with vectors
#
# A **soft prompt** $P$ of $p$ vectors joins the embeddings $e_1, \dots, e_n$
# of the tokens, here behind the first one, [CLS]:
#
# $$[e_1, P_1, \dots, P_p, e_2, \dots, e_n].$$
#
# It trains $p\,d$ numbers for the whole model, with $d$ the width. A
# **prefix** adds $p$ trained rows to keys and values in every block, $2 p d$
# numbers a block:
#
# $$\mathrm{attention}(Q, [P_k; K], [P_v; V]).$$
#
# Both make attention longer, and so every step. One head of attention shows
# what a prefix can do. With $\lambda$ the share of attention that a query
# gives to the prefix,
#
# $$\mathrm{attention}(Q, [P_k; K], [P_v; V])
#   = (1 - \lambda)\,\mathrm{attention}(Q, K, V)
#   + \lambda\,\mathrm{attention}(Q, P_k, P_v).$$

# %%
rng = np.random.default_rng(7)
q, k, v = rng.normal(size=(3, 17, 16))  # (tokens, head size) each
prefix_k, prefix_v = rng.normal(size=(2, 8, 16))  # (length, head size) each


def attention(q, k, v):
    weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))  # (queries, keys)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ v, weights  # (queries, head size), (queries, keys)


mixed, weights = attention(
    q, np.concatenate([prefix_k, k]), np.concatenate([prefix_v, v])
)  # (17, 16), (17, 25)
share = weights[:, :8].sum(axis=-1, keepdims=True)  # (17, 1)
from_tokens, token_weights = attention(q, k, v)
from_prefix, _ = attention(q, prefix_k, prefix_v)
assert np.allclose(mixed, (1 - share) * from_tokens + share * from_prefix)
assert np.allclose(weights[:, 8:] / (1 - share), token_weights)

# %% [markdown]
# So within one block a prefix adds something to what the tokens give and
# makes that smaller; the attention among the tokens stays as it was. Only a
# later block, which gets other inputs, may look elsewhere. LoRA on query and
# key changes attention itself.
#
# ## Five ways to learn the task
#
# All start from the same weights and train the head besides. The learning
# rates were chosen beforehand from a coarse grid, on 300 training images held
# out for it. The soft prompt asked for the highest.

# %%
WIDTH, RANK, LENGTH = 64, 4, 8
methods = {  # name: (method, options, learning rate)
    "head": (None, {}, 1e-2),
    "soft prompt": ("soft_prompt", {"length": LENGTH}, 3e-2),
    "prefix": ("prefix", {"length": LENGTH}, 1e-2),
    "LoRA": ("lora", {"target": "all-linear", "rank": RANK}, 1e-2),
    "everything": (None, {}, 3e-3),
}


def learn(method, options, rate, frozen=True):
    """Trains from the base; weights trained, losses and accuracy."""
    model.set_weights(base_weights)
    if method:
        ks.wrap_model(model, method, seed=7, **options)
    else:
        model.backbone.trainable = not frozen
    trained = course.count(model.trainable_weights)
    losses = course.train(model, turned.x, turned.y, rate, EPOCHS)["loss"]
    reached = course.accuracy(model, turned.test_x, turned.test_y)
    if method:
        ks.unwrap_model(model)
    return trained, losses, reached


results = {
    name: learn(*settings, frozen=name == "head")
    for name, settings in methods.items()
}
table = rich.table.Table(title=f"Turned digits after {EPOCHS} epochs")
table.add_column("trained")
for heading in ("weights", "share of all", "last loss", "accuracy"):
    table.add_column(heading, justify="right")
for name, (trained, losses, reached) in results.items():
    table.add_row(
        name,
        f"{trained:,}",
        f"{trained / total:.1%}",
        f"{losses[-1]:.2f}",
        f"{reached:.1%}",
    )
console.print(table)

head = WIDTH * 10 + 10
pooler = WIDTH + WIDTH  # a Dense on [CLS]
block = 4 * (WIDTH + WIDTH) + 2 * (WIDTH + 2 * WIDTH)  # n_in + n_out, summed
trained = {name: result[0] for name, result in results.items()}
reached = {name: result[2] for name, result in results.items()}
assert trained["head"] == head
assert trained["soft prompt"] == LENGTH * WIDTH + head
assert trained["prefix"] == LAYERS * LENGTH * 2 * WIDTH + head
assert trained["LoRA"] == RANK * (LAYERS * block + pooler) + head
assert trained["everything"] == total
for _, losses, _ in results.values():
    assert losses[-1] < losses[0]
for strong in ("LoRA", "everything"):
    assert reached[strong] > before + 0.1
    for weak in ("head", "soft prompt", "prefix"):
        assert reached[strong] > reached[weak] + 0.05

# %% [markdown]
# LoRA learns the task with a tenth of the weights. Soft prompt and prefix stay
# far behind it.
#
# Lester et al. found that soft prompts catch up with fine-tuning as models
# grow, and are behind it on small ones; this page has a very small one. A
# prompt steers what a model can do already, and ours can do one thing, read
# upright digits. A quarter turn asks for new work inside its layers.
#
# ## Would a longer prompt do?

# %%
lengths = {LENGTH: reached["soft prompt"]}
for length in () if course.FAST else (1, 4, 32):
    number, _, lengths[length] = learn("soft_prompt", {"length": length}, 3e-2)
    print(f"length {length:2d}: {number:5,} weights, {lengths[length]:.1%}")
    assert number == length * WIDTH + head
    assert lengths[length] < reached["LoRA"] - 0.1

BLUE, RED, GREY = "#30638e", "#d1495b", "#6b7280"
styles = {  # name: color, line, offset of the name in points
    "head": (GREY, "-", (-22, -4)),
    "soft prompt": (RED, "-", (0, 8)),
    "prefix": (RED, "--", (14, -15)),
    "LoRA": (BLUE, "-", (0, 8)),
    "everything": (BLUE, "--", (0, 8)),
}
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(13, 4), layout="constrained", width_ratios=[1.2, 1, 1]
)
steps = np.arange(1, EPOCHS + 1)
for name, (number, losses, after) in results.items():
    color, line, offset = styles[name]
    point = number, 100 * after
    left.scatter(*point, color=color)
    style = {"ha": "center", "color": color}
    left.annotate(name, point, offset, textcoords="offset points", **style)
    middle.plot(steps, losses, line, color=color, label=name)
    if name in ("head", "LoRA"):
        right.axhline(100 * after, color=color, ls="--", label=name)
places = sorted(lengths)
heights = [100 * lengths[place] for place in places]
right.plot(places, heights, "o-", color=RED, label="soft prompt")
left.set(
    title="What is trained, and what it reaches",
    xlabel="trained weights",
    ylabel="accuracy in %",
    xscale="log",
    xlim=(150, 500_000),
    ylim=(0, 100),
)
middle.set(title="Training", xlabel="epoch", ylabel="loss", ylim=(0, None))
middle.xaxis.get_major_locator().set_params(integer=True)
right.set_xscale("log", base=2)
right.set_xticks(places, places)
right.set(
    title="Longer prompts",
    xlabel="vectors in the prompt",
    ylabel="accuracy in %",
    ylim=(0, 100),
)
middle.legend(frameon=False, fontsize=8)
right.legend(frameon=False, fontsize=8, loc="upper left")
course.show(figure, "09_prompts")

# %% [markdown]
# On the left, methods further up reach more, those further right train more.
# On the right, no length comes near LoRA. Each vector also lengthens every
# sequence: 32 of them nearly triple our 17 tokens.
#
# Then why use them? Where one large model serves many tasks, a prompt is a
# tiny file, and a batch can mix tasks, each example with its own prompt. With
# a small model, or a task far from what it knows, take LoRA or an adapter.
#
# ## Exercises
#
# 1. A prefix of eight zero keys and zero values: which share of attention
#    does it take in the example above? Is the model still the base?
# 2. With `hidden=16`, a net computes the prefix from a prompt of as many
#    rows. How many weights does it train in a block? Count, then check.

# %% [markdown]
# ### Solution 1
#
# A zero key scores 0, a weight of 1 before the normalization. Zero values add
# nothing, but the tokens' part shrinks by $1 - \lambda$: not the base.

# %% tags=["solution"]
mixed, weights = attention(
    q, np.pad(k, [(8, 0), (0, 0)]), np.pad(v, [(8, 0), (0, 0)])
)
share = weights[:, :8].sum(axis=-1, keepdims=True)  # (17, 1)
tokens = np.exp(q @ k.T / 4).sum(axis=-1, keepdims=True)  # (17, 1)
assert np.allclose(share, 8 / (8 + tokens))
assert np.allclose(mixed, (1 - share) * from_tokens)

# %% [markdown]
# ### Solution 2
#
# The prompt, a Dense layer down to 16 and one up to keys and values.

# %% tags=["solution"]
ks.wrap_model(model, "prefix", length=LENGTH, hidden=16, trainable=())
net = (WIDTH + 1) * 16 + (16 + 1) * 2 * WIDTH
number = course.count(model.trainable_weights)
print(f"{number // LAYERS:,} weights a block, flat {LENGTH * 2 * WIDTH:,}")
assert number == LAYERS * (LENGTH * WIDTH + net)

# %% [markdown]
# ## Further reading
#
# - Lester et al. 2021, arXiv 2104.08691: soft prompts, and the model's size.
# - Li and Liang 2021, arXiv 2101.00190: prefix tuning.
