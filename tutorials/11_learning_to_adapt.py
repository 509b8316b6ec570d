# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Learning to adapt
#
# How can a model with more weights than examples learn a task from ten points?
# Of all functions that fit, training picks the one nearest to its start, and
# *near* can be learned: first on paper, for curves, then with LoRA.
#
# **You will learn**
#
# - what min-norm regression picks, aliasing, and the spike of double descent,
# - MAML: training *through* the fit to a task, here with a closed-form fit,
# - LoRA as the inner loop of a network, and where that is fragile.
#
# About a minute on a laptop. The backend is changed in one line.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # or "tensorflow", "torch"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import ops

import keras_spectral as ks
from keras_spectral import course

keras.utils.set_random_seed(7)
rng = np.random.default_rng(7)
print("backend:", keras.backend.backend(), "- data: curves made here")

# %% [markdown]
# ## More features than points
#
# A curve $f(x) = \sum_j w_j\, \phi_j(x)\, \beta_j$ has $d = 2K + 1$ features
# $1, \cos kx, \sin kx$ for $k \le K$, each with a **feature weight** $w_j$. Of
# the many $\beta$ that fit $n < d$ points, gradient descent from $\beta = 0$
# finds the one of least norm. With the $n \times d$ weighted features $\Phi_w$,
#
# $$\beta = \Phi_w^\top (\Phi_w \Phi_w^\top + \lambda I)^{-1} y,
# \qquad \lambda \to 0 .$$


# %%
def phi(x, top, lib=np):
    angles = x[..., None] * lib.arange(1.0, top + 1)  # (..., n, top)
    parts = [lib.ones_like(x)[..., None], lib.cos(angles), lib.sin(angles)]
    return lib.concatenate(parts, axis=-1)  # (..., n, 2 top + 1)


def decay(top, power):
    return np.r_[1, 1 : top + 1, 1 : top + 1] ** -float(power)


class MinNormFit(keras.layers.Layer):
    def __init__(self, top):
        super().__init__()
        self.top = top
        self.w = self.add_weight((2 * top + 1,), "ones", name="w")

    def call(self, x, y, query):
        at_x = phi(x, self.top, ops) * self.w  # (tasks, n, d)
        at_query = phi(query, self.top, ops) * self.w  # (tasks, m, d)
        back = ops.swapaxes(at_x, -1, -2)  # (tasks, d, n)
        gram = at_x @ back + 1e-3 * ops.eye(x.shape[-1])  # (tasks, n, n)
        beta = back @ ops.solve(gram, y[..., None])  # (tasks, d, 1)
        return (at_query @ beta)[..., 0]  # (tasks, m)


# %% [markdown]
# ## Aliasing
#
# At 16 points at equal distances $\sin x$, $-\sin 15x$, $\sin 17x$ and others
# are the *same numbers*: **aliases**. With equal feature weights the least norm
# spreads the curve evenly over them. A small weight makes a feature dear.

# %%
grid = np.linspace(-np.pi, np.pi, 401, dtype="float32")
regular = grid[:-1:25]  # (16,)


def read(power, values):
    fit = MinNormFit(40)
    fit.w.assign(decay(40, power))
    curve = fit(regular[None], values[None], grid[None])  # (1, 401)
    return ops.convert_to_numpy(curve)[0]


aliased, recovered = (read(power, np.sin(regular)) for power in (0, 2))
for j in (1, -15, 17, -31, 33):  # sin x and its aliases: a fifth for each
    assert abs(2 * np.mean((aliased * np.sin(j * grid))[:-1]) - 0.2) < 1e-3
assert np.abs(recovered - np.sin(grid)).max() < 0.01

# %% [markdown]
# With weights $1/k^2$ the same points give $\sin x$ back.
#
# ## The spike where features meet points
#
# Now 20 noisy points at random places, and more and more features.


# %%
def spike(top, power):  # the median test error of 2 top + 1 features
    errors, w = [], decay(top, power)
    for trial in range(30 if course.FAST else 100):
        source = np.random.default_rng(trial)
        x = source.uniform(-np.pi, np.pi, 20)
        y = np.sin(x) + source.normal(0, 0.1, 20)
        beta = np.linalg.lstsq(phi(x, top) * w, y, rcond=1e-12)[0]
        curve = (phi(grid, top) * w) @ beta
        errors.append(np.mean((curve - np.sin(grid)) ** 2))
    return np.median(errors)


tops = np.array([1, 2, 4, 6, 8, 9, 10, 11, 12, 14, 17, 22, 30, 40, 60, 80])
sizes = 2 * tops + 1
equal, decaying = ([spike(t, power) for t in tops] for power in (0, 1))
assert 15 <= sizes[np.argmax(equal)] <= 25 and max(equal) > 10 * equal[-1]
assert decaying[-1] < equal[-1] / 5

# %% [markdown]
# At $d = n$ one curve alone fits the noisy points, and it must bend wildly: the
# error has a spike. Beyond it there is a choice again: **double descent**. With
# equal weights the error settles at what aliasing leaves.
#
# ## Learning the feature weights
#
# **MAML** learns weights from many tasks. The *inner* loop fits points, the
# *outer* loop makes the fit right at *other* points $x', y'$ of each task:
#
# $$\min_w \sum_{\text{tasks}} \| f_{w,\beta(w; x, y)}(x') - y' \|^2 .$$
#
# The inner loop is the formula, and `fit` is the outer loop: gradients pass
# `ops.solve`. A task mixes frequencies 2, 5, 9 and shows 10 points.

# %%
hidden = np.isin(np.r_[0, 1:21, 1:21], (2, 5, 9))  # (41,)


def curves(tasks):
    beta = rng.normal(size=(tasks, 41, 1)) * hidden[:, None]
    x = rng.uniform(-np.pi, np.pi, (tasks, 40)).astype("float32")
    y = (phi(x, 20) @ beta)[..., 0].astype("float32")  # (tasks, 40)
    return [x[:, :10], y[:, :10], x[:, 10:]], y[:, 10:]


fit, inputs = MinNormFit(20), [keras.Input((n,)) for n in (10, 10, 30)]
model = keras.Model(inputs, fit(*inputs))
assert course.count(model.trainable_weights) == 41
model.compile(keras.optimizers.Adam(0.02), "mse")
test = curves(300)
before = model.evaluate(*test, verbose=0)
model.fit(*curves(1000), batch_size=50, epochs=10, verbose=0)
after = model.evaluate(*test, verbose=0)
print(f"error on new tasks: {before:.3f} -> {after:.4f}")
power = ops.convert_to_numpy(fit.w) ** 2  # (41,)
assert power[hidden].sum() > 0.8 * power.sum() and after < before / 10

# %% [markdown]
# No task named its frequencies: the weights found them.
#
# ## An adapter as the inner loop
#
# A network has no closed form, but the idea works: learn what tasks have in
# common, then change little. Tasks are now $y = a \sin(x + p)$. A network of a
# hundred outputs learns a hundred at once; a rival learns one. Each meets new
# sines at 10 points. Rates come from eight separate validation tasks.


# %%
def network(outputs):
    hidden = [keras.layers.Dense(64, activation="tanh") for _ in range(2)]
    head = keras.layers.Dense(outputs)
    return keras.Sequential([keras.Input((1,)), *hidden, head])


amplitudes, phases = rng.uniform(0.5, 2, 120), rng.uniform(0, 6.28, 120)
wave_x = np.linspace(-4, 4, 200, dtype="float32")[:, None]  # (200, 1)
waves = (amplitudes * np.sin(wave_x + phases)).astype("float32")  # (200, 120)


def pretrained(tasks):  # a body, with the head of the first task
    bank = network(tasks)
    bank.compile(keras.optimizers.Adam(3e-3), "mse")
    bank.fit(wave_x, waves[:, :tasks], batch_size=20, epochs=60, verbose=0)
    *body, kernel, bias = bank.get_weights()
    model = network(1)
    model.set_weights([*body, kernel[:, :1], bias[:1]])
    return model


CHECKS = (0, 5, 10, 20, 30)  # after so many steps we look
VALIDATION, TEST = range(100, 108), range(108, 120)  # tasks


def adapt(model, learning_rate, tasks):  # median errors at CHECKS
    start, errors = model.get_weights(), []
    for task in tasks:
        model.set_weights(start)
        for variable in model.optimizer.variables:
            variable.assign(0 * ops.convert_to_tensor(variable))
        model.optimizer.learning_rate = learning_rate
        chosen = np.random.default_rng(task).permutation(200)[:10]
        x, y = wave_x[chosen], waves[chosen, task : task + 1]  # (10, 1)
        errors.append([])
        for step in range(CHECKS[-1] + 1):
            if step in CHECKS:
                curve = ops.convert_to_numpy(model(wave_x))[:, 0]  # (200,)
                errors[-1].append(np.mean((curve - waves[:, task]) ** 2))
            model.train_on_batch(x, y)
    model.set_weights(start)
    return np.median(errors, axis=0)


runs = {}  # name: (trained weights, test errors at CHECKS)
many = pretrained(100)
for name, model in (
    ("from scratch, all weights", network(1)),
    ("one sine, then LoRA", pretrained(1)),
    ("many sines, then all weights", many),
    ("many sines, then LoRA", many),
):
    if "LoRA" in name:
        ks.wrap_model(model, "lora", target="all", rank=1, seed=7)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    rate = min(1e-2, 4e-2, key=lambda r: adapt(model, r, VALIDATION)[-1])
    errors = adapt(model, rate, TEST)
    runs[name] = (course.count(model.trainable_weights), errors)
    print(f"{name:28}  {runs[name][0]:5,}  {rate:g}", errors.round(3))

scratch, _, full, lora = runs.values()
assert lora[0] == (1 + 64) + (64 + 64) + (64 + 1) and full[0] == 4353
assert full[1][-1] < 0.7 * scratch[1][-1] and lora[1][-1] < lora[1][0] / 3

# %% [markdown]
# A row: weights, rate, median test errors after 0, 5, 10, 20 and 30 steps.
# With all weights, the start with many sines beats the one from scratch. LoRA
# removes most of its error with 258 weights, 6 % of the network, but its place
# among the rivals changed with the draw of tasks and the rate when we tried.

# %%
BLUE, RED, GREY, GREEN = "#2563eb", "#dc2626", "#6b7280", "#059669"
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
alias, spikes, adapting = axes
alias.plot(grid, aliased, c=RED, lw=1, label="equal weights")
alias.plot(grid, recovered, c=BLUE, lw=2, label="weights 1/k²")
alias.plot(regular, np.sin(regular), "ko", ms=5, label="16 points")
alias.set(title="Aliasing", xlabel="x", ylabel="f(x)", ylim=(-1.1, 1.9))
spikes.loglog(sizes, equal, "o-", ms=4, c=RED, label="equal weights")
spikes.loglog(sizes, decaying, "o-", ms=4, c=BLUE, label="weights 1/k")
spikes.axvline(20, c=GREY, ls="--", label="number of points")
spikes.set(title="Double descent", xlabel="features d", ylabel="test error")
for (name, run), color in zip(runs.items(), (GREY, RED, GREEN, BLUE)):
    adapting.semilogy(CHECKS, run[1], "o-", ms=4, c=color, label=name)
adapting.set(title="New sines", xlabel="steps", ylabel="squared error")
for axis in axes:
    axis.legend(frameon=False, fontsize=9)
course.show(figure, "11_learning_to_adapt")

# %% [markdown]
# ## Exercises
#
# 1. Show that gradient descent from $\beta = 0$ ends at the min-norm solution.
# 2. What do 16 regular points make of $\sin 13x$, if the weights fall?

# %% [markdown]
# ### Solution 1

# %% tags=["solution"]
A, target = phi(np.linspace(-2.9, 2.5, 8), 20), np.arange(8)
beta = np.zeros(41)
for _ in range(2000):
    beta -= 0.02 * A.T @ (A @ beta - target)
assert np.allclose(beta, np.linalg.pinv(A) @ target, atol=1e-6)

# %% [markdown]
# ### Solution 2

# %% tags=["solution"]
curve = read(2, np.sin(13 * regular))
assert np.abs(curve + np.sin(3 * grid)).max() < 0.15  # -sin 3x: 13 = 16 - 3

# %% [markdown]
# ## Further reading
#
# - Finn et al., *MAML*, arXiv 1703.03400: sines are its first example.
# - Muthukumar et al., *Harmless interpolation*, arXiv 1903.09139.
# - Hu et al., *LoRA*, arXiv 2106.09685: the second half's inner loop.
