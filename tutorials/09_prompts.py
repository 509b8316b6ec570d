# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Soft prompts: a task in eight made-up words
#
# A **soft prompt** is a handful of trained vectors that stand among the words
# of a text. Eight of them are 12 KB, and nothing in the model changes, so one
# plain batch can hold rows of four tasks. What is hard is to get accuracy out
# of them: a prompt can only ask, it cannot change how the model reads. We look
# at both sides on four domains of rated sentences.

# %% [markdown]
# What you see: on the left four rows of one batch, each from another domain,
# each with the eight vectors of its own domain behind [CLS] (the shades are
# the trained numbers). On the right what a task costs and what it gets for it:
# dots are domains, black bars their means.
#
# **You will learn**
#
# - to train a soft prompt and nothing else;
# - what it reaches beside an own head and beside LoRA at the same 12 KB;
# - to put prompts into unused words of the vocabulary, so that a mixed batch
#   is a plain batch, and what other ways of mixing cost in time;
# - where prompts win and where they lose.
#
# 5 minutes on two CPU cores; needs MiniLM and the rated sentences. All figures
# are of one seed and of the backend that the first cell prints; change
# `"jax"` for another.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import time

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
# ## One model for four domains
#
# MiniLM reads a text; its outputs are averaged over the words, and a head says
# whether the text is positive. The head is a logistic regression on sentences
# of all four domains, and it is not changed again. BERT's vocabulary starts
# with words that no text uses ([PAD], [unused0] to [unused98]), so ids above
# 99 are the words to average over.

# %%
LENGTH = 12 if course.FAST else 24  # tokens; longer texts are cut
reader = course.minilm(LENGTH)
backbone = reader.build().backbone
names = "token_ids", "segment_ids", "padding_mask"
inputs = {n: keras.Input((None,), dtype="int32", name=n) for n in names}
read = backbone(inputs)["sequence_output"]  # (batch, tokens, 384)
words = ops.greater(inputs["token_ids"], 99)  # (batch, tokens)
mean = keras.layers.GlobalAveragePooling1D()(read, mask=words)
model = keras.Model(inputs, keras.layers.Dense(2, name="logits")(mean))
averages = keras.Model(inputs, mean)

# %%
DOMAINS = ("films", "tweets", "products", "editorials")
TRAIN, TEST, EPOCHS = (32, 32, 1) if course.FAST else (300, 300, 2)
data = {name: course.sentences(name, TRAIN, TEST) for name in DOMAINS}
x = {name: reader.encode(d.x) for name, d in data.items()}
test_x = {name: reader.encode(d.test_x) for name, d in data.items()}

# %%
seen = {n: averages.predict(x[n], verbose=0) for n in DOMAINS}  # (300, 384)
asked = {n: averages.predict(test_x[n], verbose=0) for n in DOMAINS}
accuracy = {"shared head": [], "own head": []}  # in %, by domain
labels = {name: data[name].y for name in DOMAINS}
together = [np.concatenate([*found.values()]) for found in (seen, labels)]
shared = LogisticRegression(max_iter=500).fit(*together)
for name in DOMAINS:
    own = LogisticRegression(max_iter=500).fit(seen[name], labels[name])
    for way, head in (("shared head", shared), ("own head", own)):
        right = head.score(asked[name], data[name].test_y)
        accuracy[way].append(100 * right)

kernel, bias = shared.coef_.T / 2, shared.intercept_ / 2  # (384, 1), (1,)
logits = [np.hstack([-kernel, kernel]), np.append(-bias, bias)]
model.get_layer("logits").set_weights(logits)
print("shared head:", np.round(accuracy["shared head"], 1).tolist(), "%")

# %% [markdown]
# ## Train eight vectors
#
# With embeddings $e_1, \dots, e_n$ of the tokens and a prompt $P$ of 8 vectors
# the model reads
#
# $$[e_1, P_1, \dots, P_8, e_2, \dots, e_n] .$$
#
# Only $P$ is trained, 8 x 384 numbers, by gradients through the whole model.
# The rival has exactly as many: LoRA of rank 1 on query and value of the last
# two blocks, 2 x 2 x (384 + 384). A LoRA of rank 8 in all six blocks shows
# what 24 times as much buys. All three keep the shared head.

# %%
entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
numbers = {"shared head": 0, "own head": 770}  # of weights a task


def learn(way, method, rate, **options):  # what is trained for each domain
    ks.wrap_model(model, method, trainable=[], seed=7, **options)
    weights = model.trainable_weights
    start = [ops.convert_to_numpy(weight) for weight in weights]
    model.compile(keras.optimizers.Adam(rate), entropy)
    found, accuracy[way], numbers[way] = {}, [], course.count(weights)
    for name in DOMAINS:
        for weight, value in zip(weights, start):
            weight.assign(value)
        for variable in model.optimizer.variables:  # Adam starts afresh
            variable.assign(0 * ops.convert_to_tensor(variable))
        model.optimizer.learning_rate = rate
        model.fit(x[name], labels[name], 10, epochs=EPOCHS, verbose=0)
        right = course.accuracy(model, test_x[name], data[name].test_y)
        accuracy[way].append(100 * right)
        found[name] = [ops.convert_to_numpy(weight) for weight in weights]
    ks.unwrap_model(model)
    return found


# %%
PROMPT = {"target": "bert_backbone", "length": 8}
LORA = {"target": r".*layer_[45].*(query|value)", "rank": 1}
prompts = learn("soft prompt", "soft_prompt", 3e-2, **PROMPT)
pairs = learn("LoRA, rank 1", "lora", 1e-2, **LORA)
if not course.FAST:
    learn("LoRA, rank 8", "lora", 3e-3, target="attention", rank=8)
rows = []
for way, shares in accuracy.items():
    shown = [f"{share:.1f}" for share in (*shares, np.mean(shares))]
    size = numbers[way]  # 4 bytes each
    rows.append((way, f"{size:,}", f"{size / 256:.0f}", *shown))
headings = "way", "weights a task", "KB", *DOMAINS, "mean"
course.table(f"Accuracy in % on {TEST} test sentences each", headings, rows)

# %% [markdown]
# The first four means lie within about a point of each other. The standard
# error of a mean of 1,200 sentences is 1.2 points, so they tie: at 12 KB
# neither the prompt nor LoRA beats the head that all domains share. LoRA of
# rank 8 is the highest, by a little more than the error, with 24 times as many
# weights a task. Here prompts do not win on accuracy.
#
# ## A mixed batch is a plain batch
#
# A prompt is nothing but eight words that nobody wrote. So we write the four
# prompts into 32 unused words of the vocabulary, and from then on a text names
# its task by its ids. Nothing is wrapped, and the model is the plain one.

# %%
embeddings = backbone.token_embedding.embeddings  # (30522, 384)
table = ops.convert_to_numpy(embeddings).copy()
table[1:33] = np.concatenate([prompts[name][0] for name in DOMAINS])
embeddings.assign(table)


def written(x, tasks):  # puts each row's own eight words behind [CLS]
    own = 1 + 8 * np.array(tasks)[:, None] + np.arange(8)  # (n, 8)
    rest = {"segment_ids": 0 * own, "padding_mask": 0 * own + 1}
    return {
        name: np.hstack([ids[:, :1], rest.get(name, own), ids[:, 1:]])
        for name, ids in x.items()
    }


tasks = np.arange(64) % 4  # films, tweets, products, editorials, films, ...
rows = {k: [test_x[n][k][:16] for n in DOMAINS] for k in names}
mixed = {k: np.stack(four, 1).reshape(64, -1) for k, four in rows.items()}
print(written(mixed, tasks)["token_ids"][:4, :14])

# %% [markdown]
# Four rows begin here: [CLS] is 101, then 1 to 8 are the words of the films,
# 9 to 16 those of the tweets, and so on; then comes the text.
#
# Prompts that the library keeps by name give the same outputs inside of a
# `mixed_batch`, without a change of the vocabulary. So does LoRA: there the
# base's kernels run once and each small pair on top. Guess the order of the
# three in time before you look.


# %%
def timed(x):  # outputs (64, 2), and the fastest of three in ms
    times = []
    for _ in range(2 if course.FAST else 4):  # the first one compiles
        start = time.perf_counter()
        outputs = model.predict(x, batch_size=64, verbose=0)
        times.append(time.perf_counter() - start)
    return outputs, 1e3 * min(times)


def by_name(found, method, **options):  # one adapter a domain, each by its name
    for name in DOMAINS:
        ks.wrap_model(model, method, adapter=name, trainable=[], **options)
        for weight, value in zip(model.trainable_weights, found[name]):
            weight.assign(value)
    with ks.mixed_batch(model, [DOMAINS[task] for task in tasks]):
        result = timed(mixed)
    ks.unwrap_model(model)
    return result


batches = {
    "no adapters at all": timed(mixed),
    "prompts as words": timed(written(mixed, tasks)),
    "prompts by name": by_name(prompts, "soft_prompt", **PROMPT),
    "LoRA by name": by_name(pairs, "lora", **LORA),
}
rows = [(way, f"{ms:.0f}") for way, (_, ms) in batches.items()]
course.table("A mixed batch of 64 texts", ("way", "ms"), rows)
apart = batches["prompts as words"][0] - batches["prompts by name"][0]
print(f"words and names differ by at most {np.abs(apart).max():.0e}")

# %% [markdown]
# Words and names give the same outputs, in much the same time: by name the
# library puts each text's own vectors behind its [CLS], and the backbone runs
# once for all tasks. So it does with LoRA. The order of the three changes from
# run to run on a busy machine: prompts are eight more tokens beside 24, at most
# a third more work, and LoRA is more small products in each layer. (In a batch
# with examples that have no prompt, or prompts of unlike lengths, the backbone
# runs once for each kind.)

# %% tags=["plot"]
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle

COLORS = dict(zip(DOMAINS, ("#30638e", "#d1495b", "#d9902f", "#3c8d5a")))
GREY = "#e5e7eb"
SHOWN = {"films": 2, "tweets": 2, "products": 3, "editorials": 4}  # texts


def draw_batch(axis):
    """A row a domain: [CLS], eight trained vectors, the words."""
    for row, name in enumerate(DOMAINS):
        y, color = 3 - row, COLORS[name]
        axis.text(-0.2, y + 0.35, name, ha="right", va="center", c=color)
        axis.add_patch(Rectangle((0, y), 1.1, 0.7, fc=GREY, ec="k", lw=0.6))
        axis.text(0.55, y + 0.35, "[CLS]", ha="center", va="center", size=8)
        white = LinearSegmentedColormap.from_list("", ("white", color))
        some = prompts[name][0][:, :16].T  # (16, 8), of 384 numbers each
        axis.imshow(some, cmap=white, extent=(1.2, 4.4, y, y + 0.7))
        for edge in np.linspace(1.2, 4.4, 9):
            axis.plot([edge] * 2, (y, y + 0.7), c=color, lw=1)
        for edge in (y, y + 0.7):
            axis.plot((1.2, 4.4), [edge] * 2, c=color, lw=1)
        start = 4.5
        for word in data[name].test_x[SHOWN[name]].split():
            width = 0.17 * len(word) + 0.25
            if start + width > 11.2:
                break
            patch = Rectangle((start, y), width, 0.7, fc=GREY, ec="k", lw=0.6)
            axis.add_patch(patch)
            middle = start + width / 2
            axis.text(middle, y + 0.35, word, ha="center", va="center", size=8)
            start += width + 0.08
        axis.text(start + 0.1, y + 0.3, "...", va="center")
    axis.text(2.8, 3.85, "eight trained vectors", ha="center", size=9)
    axis.text(7.5, 3.85, "the text", ha="center", size=9)
    axis.set(xlim=(-2.1, 11.9), ylim=(-0.15, 4.3), aspect="auto")
    axis.set_title("One batch, four tasks, one model")
    axis.axis("off")


def draw_costs(axis):
    """Accuracy of each way in each domain, the mean, and chance."""
    table = np.array([*accuracy.values()])  # (ways, domains)
    places = np.arange(len(table))
    for name, shares in zip(DOMAINS, table.T):
        axis.plot(places, shares, "o-", c=COLORS[name], lw=0.8, label=name)
    means = table.mean(axis=1)
    axis.plot(places, means, "k_", ms=34, mew=3)
    positive = np.array([data[name].test_y.mean() for name in DOMAINS])
    chance = 100 * np.maximum(positive, 1 - positive).mean()
    label = "chance, mean of the larger classes"
    axis.axhline(chance, c="#6b7280", ls="--", lw=1, label=label)
    for place, share in zip(places, means):
        text = f"mean {share:.1f}"
        axis.text(place, chance - 1, text, ha="center", va="top", size=9)
    labels = [f"{way}\n{numbers[way] / 256:.0f} KB" for way in accuracy]
    axis.set_xticks(places, labels)
    axis.set(xlim=(-0.5, len(labels) - 0.3), ylabel="accuracy in %")
    axis.set(ylim=(min(table.min(), chance) - 4, table.max() + 12))
    axis.set_title("What a task costs, and what it gets (bars: means)")
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="upper center")
    axis.spines[["top", "right"]].set_visible(False)


def draw():
    figure, axes = plt.subplots(
        1, 2, figsize=(14, 4.2), layout="constrained", width_ratios=[1.35, 1]
    )
    draw_batch(axes[0])
    draw_costs(axes[1])
    course.show(figure, "09_prompts")


# %% tags=["picture"] alt="Left: four rows of one batch, of films, tweets, products and editorials. Each row starts with [CLS], then eight coloured columns, the trained vectors of its domain, then the words of a text in grey. Right: dots of accuracy in four domains for a shared head at 0 KB, an own head at 3 KB, a soft prompt and LoRA of rank 1 at 12 KB and LoRA of rank 8 at 288 KB, with their means."
draw()

# %% [markdown]
# **Where prompts win.** 12 KB a task is a 24th of the larger LoRA. And no layer
# changes: a model that takes ids and nothing else, exported or behind a
# server, answers all tasks in one batch.
#
# **Where they lose.** They lengthen every text. On a small model they add
# little accuracy: Lester et al. found that prompts reach full fine-tuning only
# as models grow to billions of weights. And a head is smaller still: if your
# tasks ask the same question, as here, one shared head does it at 0 KB.
#
# ## Checks

# %% tags=["checks"]
for found in (prompts, pairs):
    for arrays in found.values():
        assert sum(array.size for array in arrays) == 3072 == 8 * 384
assert numbers["own head"] == 384 * 2 + 2
for way, (outputs, ms) in batches.items():
    assert outputs.shape == (64, 2) and ms > 0, way
assert np.abs(apart).max() < 1e-2
plain = batches["no adapters at all"][0]
assert np.abs(batches["prompts as words"][0] - plain).max() > 1e-3
if not course.FAST:
    assert numbers["LoRA, rank 8"] == 6 * 2 * 8 * (384 + 384)
    for shares in accuracy.values():
        assert np.mean(shares) > 68  # chance is about 62

# %% [markdown]
# ## Exercises
#
# 1. Give every row of the mixed batch the prompt of the *next* domain. How
#    many of the 64 answers change, and how many are right then?
# 2. A **prefix** is a prompt inside of attention: trained keys and values in
#    every block. Show for one head that it only mixes in something and cannot
#    change how the tokens attend to each other:
#    $\mathrm{attention}(Q, [P_k; K], [P_v; V]) = (1 - \lambda)\,
#    \mathrm{attention}(Q, K, V) + \lambda\, \mathrm{attention}(Q, P_k, P_v)$
#    with $\lambda$ the share of attention that a query gives to the prefix.

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
truth = np.stack([data[n].test_y[:16] for n in DOMAINS], 1).ravel()  # (64,)
own = batches["prompts as words"][0].argmax(axis=-1)
other = model.predict(written(mixed, (tasks + 1) % 4), verbose=0).argmax(-1)
print(f"{np.sum(own != other)} of 64 answers change;", end=" ")
print(f"right: {np.sum(own == truth)} with the own prompts,", end=" ")
print(f"{np.sum(other == truth)} with those of the next domain")
assert own.shape == other.shape == truth.shape

# %% [markdown]
# ### Solution 2
#
# So within a block a prefix adds to what the tokens give and makes that
# smaller. Only a later block, which gets other inputs, may look elsewhere.
# LoRA on query and key changes attention itself.

# %% tags=["solution"]
rng = np.random.default_rng(7)
q, k, v = rng.normal(size=(3, 17, 16))  # (tokens, head size) each
prefix_k, prefix_v = rng.normal(size=(2, 8, 16))  # (length, head size) each


def attention(q, k, v):
    weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))  # (queries, keys)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights @ v, weights


both, weights = attention(q, np.vstack([prefix_k, k]), np.vstack([prefix_v, v]))
share = weights[:, :8].sum(axis=-1, keepdims=True)  # (17, 1)
from_tokens, of_tokens = attention(q, k, v)
from_prefix, _ = attention(q, prefix_k, prefix_v)
assert np.allclose(both, (1 - share) * from_tokens + share * from_prefix)
assert np.allclose(weights[:, 8:] / (1 - share), of_tokens)

# %% [markdown]
# ## Further reading
#
# - Lester et al. 2021, arXiv 2104.08691: soft prompts reach full fine-tuning
#   only on models of billions of weights.
# - Li and Liang 2021, arXiv 2101.00190: prefix tuning.
# - Sheng et al. 2023, S-LoRA, arXiv 2311.03285: mixed batches of LoRA.
