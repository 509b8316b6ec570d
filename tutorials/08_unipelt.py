# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # UniPELT: three parts in a block, each behind a gate
#
# LoRA, a prefix and a bottleneck adapter change three different places of a
# transformer block, and nobody knows beforehand which suits a task. UniPELT
# puts all three into every block, each behind a **gate**, a number from 0 to 1
# that is computed for each example; the gates are 4 % more weights. On tweets
# it gets about 88 % right, where the head alone gets 82. What is hard is to
# read the gates: is a part with a low gate of no use?

# %% [markdown]
# What you see: on the left a block with its three parts (frozen in grey) and
# where the gates sit. In the middle the mean gates of three blocks of MiniLM
# after training on sentences about films and on tweets: all started at 0.5,
# orange ones have opened and violet ones have shut. On the right the accuracy
# beside that of each part alone.
#
# **You will learn**
#
# - what the gates multiply, how they are computed and how many weights they
#   cost;
# - to read gates: by block, by task and by example;
# - to compare with each part alone, at its own number of weights;
# - to remove the parts with the lowest gates, and to check what that costs.
#
# 4 minutes on two CPU cores; needs MiniLM and the rated sentences. All figures
# are of one seed and of the backend that the first cell prints; change
# `"jax"` for another.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import ops
from sklearn.linear_model import LogisticRegression

import keras_spectral as ks
from keras_spectral import course

course.quiet()
keras.utils.set_random_seed(7)
print("backend:", keras.backend.backend())

# %% [markdown]
# ## Two tasks for the upper half of MiniLM
#
# Is a sentence about a film positive? Is a tweet? MiniLM has six blocks. We
# leave the lower three as they are, so we can run them once and keep what they
# give, and adapt the upper three. This halves the time of every training.

# %%
LENGTH, WIDTH = 24, 384  # tokens of a text, longer ones are cut
reader = course.minilm(LENGTH)
backbone, read = reader.cut(3)  # `read` runs the lower three blocks
blocks = backbone.transformer_layers  # six
x = states = keras.Input((LENGTH, WIDTH), name="states")
mask = keras.Input((LENGTH,), dtype="int32", name="mask")
for block in blocks[3:]:
    x = block(x, padding_mask=mask)
mean = keras.layers.GlobalAveragePooling1D()(x, mask=mask)  # over tokens
logits = keras.layers.Dense(2, name="logits")(mean)
model = keras.Model({"states": states, "mask": mask}, logits)
print(f"upper half: {course.count(model.weights):,} weights")

# %%
TRAIN, TEST = (48, 48) if course.FAST else (300, 300)


def halfway(texts):  # what the lower blocks make of them
    return dict(zip(("states", "mask"), read(texts)))


tasks = {}  # name: (x, y, test x, test y)
for name in ("films", "tweets"):
    data = course.sentences(name, TRAIN, TEST)
    tasks[name] = halfway(data.x), data.y, halfway(data.test_x), data.test_y
    states = tasks[name][0]["states"]  # (300, 24, 384)
    print(name, states.shape, "-", data.test_x[2])

# %% [markdown]
# ## What the gates multiply
#
# With $z$ for the part's own input and $g$ for its gate:
#
# - **LoRA** on query and value: $y = x K + g\, x A B$, with a gate each;
# - **prefix**: trained keys and values that every token's attention sees
#   besides those of the tokens, $\mathrm{attention}(Q, [g P_k; K], [g P_v;
#   V])$;
# - **adapter**: $g\, W_2\, \mathrm{relu}(W_1 z)$ joins the output of the
#   feed-forward net.
#
# A gate is a mean over the $n$ tokens that are no padding,
#
# $$g = \frac{1}{n} \sum_{t=1}^{n} \sigma(z_t w + c),$$
#
# so it costs one vector $w$ and one number $c$. The four gates of a block have
# 4 (384 + 1) = 1,540 weights; the three parts have 38,808.
#
# The baselines are each part alone, at its own number of weights and with the
# learning rate that its docstring recommends, and a logistic regression on
# the frozen model, the head alone. Every other way trains a head besides.

# %%
METHODS = {  # name: method, learning rate, options
    "LoRA": ("lora", 3e-3, {"target": "attention", "rank": 8}),
    "prefix": ("prefix", 1e-1, {"length": 10}),
    "adapter": ("bottleneck", 3e-3, {"size": 24}),
    "UniPELT": ("unipelt", 3e-3, {"lora": 8, "prefix": 10, "bottleneck": 24}),
}
if course.FAST:
    METHODS = {name: METHODS[name] for name in ("LoRA", "UniPELT")}
entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
accuracy, learned, sizes = {}, {}, {"head": 770}  # by name, and task


def values(weights):
    return [ops.convert_to_numpy(weight) for weight in weights]


def assign(weights, arrays):
    for weight, array in zip(weights, arrays, strict=True):
        weight.assign(array)


def restart(weights, arrays, rate):  # Adam starts afresh as well
    assign(weights, arrays)
    for variable in model.optimizer.variables:
        variable.assign(0 * ops.convert_to_tensor(variable))
    model.optimizer.learning_rate = rate


def learn(name):  # one method on both tasks, from the same start
    method, rate, options = METHODS[name]
    ks.wrap_model(model, method, trainable="logits", seed=7, **options)
    weights = model.trainable_weights
    start, sizes[name] = values(weights), course.count(weights)
    model.compile(keras.optimizers.Adam(rate), entropy)
    for task, (x, y, test_x, test_y) in tasks.items():
        restart(weights, start, rate)
        epochs = 1 if course.FAST else 3
        model.fit(x, y, batch_size=10, epochs=epochs, verbose=0)
        accuracy[name, task] = 100 * course.accuracy(model, test_x, test_y)
        learned[name, task] = values(weights)


# %%
averages = keras.Model(model.inputs, mean)  # what the head sees
for task, (x, y, test_x, test_y) in tasks.items():
    known = averages.predict(x, batch_size=100, verbose=0)  # (300, 384)
    asked = averages.predict(test_x, batch_size=100, verbose=0)
    probe = LogisticRegression(max_iter=500).fit(known, y)
    accuracy["head", task] = 100 * probe.score(asked, test_y)
for name in METHODS:
    learn(name)
    if name != "UniPELT":  # the last one stays in place
        ks.unwrap_model(model)

rows = [
    (name, f"{size:,}", *(f"{accuracy[name, task]:.1f}" for task in tasks))
    for name, size in sizes.items()
]
headings = "way", "trained weights", "films, %", "tweets, %"
course.table(f"Accuracy on {TEST} test sentences", headings, rows)

# %% [markdown]
# On films everything lies within three points, the head alone included. The
# standard error of a share of 300 sentences is 2.6 points there, so this is a
# tie, and no part helps. On tweets UniPELT is clearly ahead of the head. Its
# lead over the adapter alone is again within the error (1.9 points), and it
# trains twice as many weights. So its use is not a higher accuracy for its
# weights. It is that you need not know beforehand which part to take.
#
# ## Reading gates
#
# `collect_gates` runs a batch and returns every gate of every example. We put
# the weights of each task back and ask for the gates of its test sentences.

# %%
gates = {}  # task: {block: {gate: (300,)}}
for task, (_, _, test_x, _) in tasks.items():
    assign(model.trainable_weights, learned["UniPELT", task])
    gates[task] = ks.collect_gates(model, test_x)
block, parts = next(iter(gates["tweets"].items()))
print(block, {name: gate.shape for name, gate in parts.items()})

# %% tags=["plot"]
from matplotlib.patches import FancyBboxPatch

BLUE, YELLOW, GREEN, GREY = "#30638e", "#edae49", "#66a182", "#d6d9de"
COLORS = {"LoRA": BLUE, "prefix": YELLOW, "adapter": GREEN, "head": GREY}


def draw_block(axis):
    """A transformer block with three parts, each behind a gate."""

    def box(x, y, width, height, color, text, size=9):
        style = "round,pad=0.02,rounding_size=0.12"
        dark = color == BLUE
        axis.add_patch(
            FancyBboxPatch(
                (x, y), width, height, style, fc=color, ec="k", lw=0.8
            )
        )
        axis.text(
            x + width / 2,
            y + height / 2,
            text,
            ha="center",
            va="center",
            fontsize=size,
            color="white" if dark else "black",
        )

    def arrow(start, end, color="k"):
        axis.annotate(
            "",
            end,
            start,
            arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.3},
        )

    def gate(x, y, color):
        circle = plt.Circle((x, y), 0.36, fc="white", ec=color, lw=2, zorder=5)
        axis.add_patch(circle)
        style = {"ha": "center", "va": "center", "style": "italic"}
        axis.text(x, y, "g", c=color, zorder=6, **style)

    for x, text in ((2.9, "Q"), (4.5, "K"), (6.1, "V")):
        box(x, 1.9, 1.1, 0.9, GREY, text)
        arrow((x + 0.55, 0.9), (x + 0.55, 1.85))
        arrow((x + 0.55, 2.85), (x + 0.55, 3.85))
    box(0, 1.9, 1.3, 0.9, BLUE, "LoRA")
    box(8.8, 1.9, 1.3, 0.9, BLUE, "LoRA")
    arrow((1.35, 2.35), (2.85, 2.35), BLUE)
    arrow((8.75, 2.35), (7.25, 2.35), BLUE)
    box(2.9, 3.9, 4.3, 0.9, GREY, "attention")
    box(8.8, 3.9, 1.3, 0.9, YELLOW, "prefix")
    arrow((8.75, 4.35), (7.25, 4.35), YELLOW)
    box(2.9, 5.4, 4.3, 0.6, GREY, "add & norm")
    box(2.9, 6.7, 4.3, 0.9, GREY, "feed-forward net")
    box(2.9, 8.3, 4.3, 0.6, GREY, "add & norm")
    box(8.6, 6.7, 1.7, 0.9, GREEN, "adapter")
    arrow((9.45, 7.65), (7.25, 8.55), GREEN)
    for low, high in ((4.85, 5.35), (6.05, 6.65), (7.65, 8.25), (8.95, 9.7)):
        arrow((5.05, low), (5.05, high))
    arrow((7.25, 7.15), (8.55, 7.15), GREEN)
    axis.plot((3.45, 6.65), (0.9, 0.9), "k", lw=1.3)
    axis.plot((5.05, 5.05), (0.3, 0.9), "k", lw=1.3)
    for x, y, color in (
        (2.1, 2.35, BLUE),
        (8.0, 2.35, BLUE),
        (8.0, 4.35, YELLOW),
        (8.4, 8.07, GREEN),
    ):
        gate(x, y, color)
    axis.set(xlim=(-0.2, 10.5), ylim=(0.1, 9.9))
    axis.set_title("A block and its gated parts")
    axis.axis("off")


def draw_gates(axis, task, last):
    """Mean gates, blocks x gates; orange is open, violet is shut."""
    table = [
        [g.mean() for g in parts.values()] for parts in gates[task].values()
    ]
    table = np.array(table)[::-1]  # the last block on top, as it runs
    axis.imshow(table, cmap="PuOr_r", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        color = "white" if abs(value - 0.5) > 0.3 else "black"
        where = {"ha": "center", "va": "center"}
        axis.text(column, row, f"{value:.2f}", c=color, **where)
    names = ("LoRA\nquery", "LoRA\nvalue", "prefix", "adapter")
    axis.set_xticks(range(4), names if last else [""] * 4)
    axis.set_yticks(range(3), [f"block {number}" for number in (6, 5, 4)])
    axis.set_title(f"Mean gates, {task}")


def draw_bars(axis):
    """Accuracy of each way on each task."""
    ways = list(sizes)
    for place, task in enumerate(tasks):
        y = tasks[task][3]
        largest = 100 * max(y.mean(), 1 - y.mean())
        for i, way in enumerate(ways):
            height = -place * (len(ways) + 1.5) - i
            value = accuracy[way, task]
            axis.barh(height, value, 0.8, color=COLORS.get(way, "#6b7280"))
            axis.text(value + 0.7, height, f"{value:.0f}", va="center", size=9)
            light = "white" if way in ("LoRA", "UniPELT") else "black"
            axis.text(41, height, way, va="center", c=light, size=9)
        top = -place * (len(ways) + 1.5) + 0.6
        axis.plot([largest] * 2, (top, top - len(ways) - 0.2), "k--", lw=1)
        axis.text(40, top + 0.15, task, va="bottom", weight="bold")
    axis.set(xlim=(40, 100), yticks=[], xlabel="accuracy in %")
    axis.set_title("Each part alone and all (dashed: larger class)", size=11)
    axis.spines[["top", "right", "left"]].set_visible(False)


def draw():
    figure = plt.figure(figsize=(14, 5.4), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.2, 1, 1.1])
    draw_block(left.subplots())
    for task, axis in zip(tasks, middle.subplots(2, 1)):
        draw_gates(axis, task, task == "tweets")
    draw_bars(right.subplots())
    course.show(figure, "08_unipelt")


# %% tags=["picture"] alt="Left: a transformer block in grey with LoRA at query and value, a prefix at the attention and an adapter behind the feed-forward net, each behind a circle marked g. Middle: two heat maps of mean gates, three blocks by four gates, for films and for tweets. Right: bars of accuracy of the head alone, LoRA, prefix, adapter and UniPELT on both tasks."
draw()

# %% [markdown]
# (Blocks 4 to 6 are the layers `transformer_layer_3` to `_5`.) The gates
# differ between the parts, and between the two tasks. LoRA's gate at
# the query opens everywhere. On films most others shut, above all the prefix
# of the upper blocks, in line with the tie there. On tweets the adapter and
# the prefix of block 4 stay half open or more.
#
# The map shows means. A gate is computed for each example, so it may be open
# for some sentences and half shut for others. `plot_gate_bars` draws that
# spread as thin lines.

# %% tags=["plot"] alt="Bars of the mean gate of four gates in three blocks after training on tweets, with thin lines for the deviation over sentences."
figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
ks.plots.plot_gate_bars(gates["tweets"], ax=axis)
axis.set(title="Gates of tweets, mean and deviation over sentences")
axis.set(ylim=(0, 1.3), yticks=np.linspace(0, 1, 5))
course.show(figure, "08_unipelt_bars")

# %% [markdown]
# ## Does a low gate mean a useless part?
#
# Not by itself: the weights behind a low gate may have grown. So we look. In
# the model of the tweets we remove the third of the parts with the lowest
# gates (`prune_parts`) and measure the accuracy at once, without any training.
# Guess: how much is lost?


# %%
def measure():  # the accuracy on tweets; notes the gates anew
    for layer in model.layers:
        if isinstance(layer, ks.UniPELTBlock):
            layer.reset_gates()
    return 100 * course.accuracy(model, *tasks["tweets"][2:])


def part_gates():  # of each part; LoRA counts by its larger gate
    return sorted(
        max(
            mean
            for n, (mean, _) in layer.gate_statistics().items()
            if part in n
        )
        for layer in model.layers
        if isinstance(layer, ks.UniPELTBlock)
        for part in layer.parts
    )


kept = [(9, course.count(model.trainable_weights), measure())]
for left in (6, 3):
    lowest = part_gates()
    between = np.mean(lowest[2:4])  # above three of the parts
    removed = ks.prune_parts(model, steps=0, threshold=between)
    print({path.split("_")[-1]: parts for path, parts in removed.items()})
    kept.append((left, course.count(model.trainable_weights), measure()))
rows = [(str(n), f"{size:,}", f"{share:.1f}") for n, size, share in kept]
headings = "parts left", "trained weights", "accuracy in %"
course.table("Tweets, parts of the lowest gates removed", headings, rows)

# %% [markdown]
# A third of the parts costs hardly anything. At three parts it hurts, and what
# is left is LoRA in each block: the accuracy is then about that of LoRA alone.
# By their gates these were the most important parts, and yet the adapter alone
# is better than LoRA alone. So take a gate as a hint about what to try, and
# measure. What is certain is that a removed part has no weights and takes no
# time.
#
# ## Checks

# %% tags=["checks"]
lora = 2 * 8 * (WIDTH + WIDTH)
prefix = 10 * 2 * WIDTH
adapter = (WIDTH * 24 + 24) + (24 * WIDTH + WIDTH)
of_gates = 4 * (WIDTH + 1)
head = WIDTH * 2 + 2
assert sizes["head"] == head
assert sizes["LoRA"] == 3 * lora + head
assert sizes["UniPELT"] == 3 * (lora + prefix + adapter + of_gates) + head
assert of_gates / (lora + prefix + adapter) < 0.05
for found in gates.values():
    assert len(found) == 3
    for parts in found.values():
        assert [*parts] == ["lora_query", "lora_value", "prefix", "adapter"]
        for gate in parts.values():
            assert gate.shape == (TEST,) and 0 < gate.min() <= gate.max() < 1
assert [size for _, size, _ in kept] == sorted(
    [size for _, size, _ in kept], reverse=True
)
if not course.FAST:
    assert sizes["prefix"] == 3 * prefix + head
    assert sizes["adapter"] == 3 * adapter + head
    assert accuracy["UniPELT", "films"] > 55  # chance is about 50
    for task in tasks:
        best = max(accuracy[name, task] for name in sizes)
        assert accuracy["UniPELT", task] > best - 15

# %% [markdown]
# ## Exercises
#
# 1. `gate="softmax"` gives shares of the three parts instead. Wrap the model
#    anew and check that the shares sum to one, and that they are equal during
#    the first `warmup_steps`.
# 2. Does a gate follow the length of a tweet? Correlate each gate with the
#    number of tokens. Why could that happen?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
ks.unwrap_model(model)
options = {"lora": 8, "prefix": 10, "bottleneck": 24, "seed": 7}
ks.wrap_model(model, "unipelt", gate="softmax", warmup_steps=500, **options)
for parts in ks.collect_gates(model, tasks["tweets"][2]).values():
    print(*(f"{name} {share[0]:.3f}" for name, share in parts.items()))
    assert sorted(parts) == ["adapter", "lora", "prefix"]
    assert np.allclose(sum(parts.values()), 1, atol=1e-5)
    assert np.allclose(parts["lora"], 1 / 3)

# %% [markdown]
# ### Solution 2
#
# Yes, some do, in either direction. A gate is a mean over tokens, and [CLS]
# and [SEP], which are in every sentence, weigh more in the mean of a short
# one.

# %% tags=["solution"]
length = tasks["tweets"][2]["mask"].sum(axis=1)  # (300,)
for block, parts in gates["tweets"].items():
    found = {n: np.corrcoef(gate, length)[0, 1] for n, gate in parts.items()}
    print(block, *(f"{name} {share:+.2f}" for name, share in found.items()))

# %% [markdown]
# ## Further reading
#
# - Mao et al. 2022, UniPELT, arXiv 2110.07577: the parts and their gates.
# - Li and Liang 2021, prefix tuning, arXiv 2101.00190.
# - Houlsby et al. 2019, adapters, arXiv 1902.00751.
# - To let the training itself choose parts within a budget, see
#   `search_parts` in the documentation.
