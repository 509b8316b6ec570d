"""How the thin pair of a LoRA can start, by the value of `initializer`."""

import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import derived_seed

# Each makes the arguments of LowRankPair that say how it starts.
STARTS: dict[str, Callable] = {}
_LORA_GA_GAMMA = 16


def start(function):
    """Makes a function known by its name."""
    STARTS[function.__name__] = function
    return function


@start
def kaiming(adapter):
    """A uniform in +-sqrt(1/n_in), B zero."""
    return {}


@start
def pissa(adapter):
    """The first singular triplets: `s A B` is the kernel's best part."""
    scale = adapter.initial_scale()

    def root(s):
        return ops.sqrt(s / abs(scale))

    a_start, b_start = adapter.from_triplets(
        adapter.rank,
        lambda u, s, v: u * root(s),
        lambda u, s, v: math.copysign(1, scale) * ops.transpose(v * root(s)),
    )
    return {"a_start": a_start, "b_start": b_start, "keeps_start": True}


@start
def olora(adapter):
    """The first columns and rows of `K^T = Q R`: B is orthonormal."""
    rank, view = adapter.rank, adapter.view

    def factors():
        blocks = ops.swapaxes(view.blocks(view.finite_matrix()), -1, -2)
        q, r = ops.linalg.qr(blocks)
        a = ops.swapaxes(r[..., :rank, :], -1, -2)
        return view.joined(a, ops.swapaxes(q[..., :rank], -1, -2))

    a_start, b_start = adapter.made_late(
        factors, lambda a, b: a, lambda a, b: b
    )
    return {"a_start": a_start, "b_start": b_start, "keeps_start": True}


@start
def orthogonal(adapter):
    """Both random and `A B = 0`, from odd and even rows of one rotation."""
    rank, view = adapter.rank, adapter.view
    if rank % 2:
        raise ValueError(
            f"Received rank={rank} for layer '{adapter.name}' with "
            "initializer='orthogonal'. Expected an even rank: half of a "
            "rotation's rows go to A, half to B."
        )

    def factors():
        def seed(name):
            return derived_seed(adapter.seed, f"lora_{name}")

        turn = keras.initializers.Orthogonal(seed=seed("rotation"))
        turn = turn((rank, rank), "float32")
        normal = [
            keras.random.normal((size, rank // 2), seed=seed(name))
            for size, name in ((view.n_in, "a"), (view.n_out, "b"))
        ]
        a = ops.matmul(normal[0], turn[1::2]) / 10
        return a, ops.transpose(ops.matmul(normal[1], turn[::2])) / 10

    a_start, b_start = adapter.made_late(
        factors, lambda a, b: a, lambda a, b: b
    )
    return {"a_start": a_start, "b_start": b_start}


@start
def mica(adapter):
    """B frozen at the last right singular vectors, A zero and trained."""
    count = min(adapter.view.n_in, adapter.view.n_out)
    (b_start,) = adapter.from_triplets(
        count, lambda u, s, v: ops.transpose(v[:, -adapter.rank :])
    )
    return {"a_start": "zeros", "b_start": b_start, "trains": "a"}


@start
def eva(adapter):
    """A's columns are the inputs' first principal components, B is zero."""
    rank = adapter.rank

    def factors():
        _, directions = adapter.start_data.components()
        return (directions[:, :rank],)

    (a_start,) = adapter.made_late(factors, lambda a: a)
    return {"a_start": a_start}


@start
def corda(adapter):
    """The first triplets of `C K`, C being the inputs' second moments."""
    return _corda(adapter, first=True)


@start
def corda_kpm(adapter):
    """The last triplets of `C K`: what the inputs use least."""
    return _corda(adapter, first=False)


def _corda(adapter, first):
    rank, scale = adapter.rank, adapter.initial_scale()

    def factors():
        kernel = ops.convert_to_numpy(adapter.view.finite_matrix())
        moments = _invertible(adapter.start_data.matrix())
        u, s, vt = np.linalg.svd(moments @ kernel, full_matrices=False)
        chosen = slice(0, rank) if first else slice(len(s) - rank, len(s))
        root = np.sqrt(s[chosen] / abs(scale))
        a = np.linalg.solve(moments, u[:, chosen]) * root
        return a, math.copysign(1, scale) * root[:, None] * vt[chosen]

    a_start, b_start = adapter.made_late(
        factors, lambda a, b: a, lambda a, b: b
    )
    return {"a_start": a_start, "b_start": b_start, "keeps_start": True}


@start
def lora_ga(adapter):
    """Singular vectors of the gradient: A takes 1 to r, B r + 1 to 2 r."""
    rank, view = adapter.rank, adapter.view
    if 2 * rank > view.max_rank:
        raise ValueError(
            f"Received rank={rank} for layer '{adapter.name}' with "
            "initializer='lora_ga'. Expected at most half of the kernel's "
            f"rank, {view.max_rank // 2}: the pair starts at 2 rank directions."
        )

    def factors():
        blocks = view.blocks(ops.convert_to_tensor(adapter.start_data))
        u, _, vt = ops.svd(blocks, full_matrices=False)
        size = view.n_out**0.25 / math.sqrt(_LORA_GA_GAMMA)
        return view.joined(
            size * u[..., :rank], size * vt[..., rank : 2 * rank, :]
        )

    a_start, b_start = adapter.made_late(
        factors, lambda a, b: a, lambda a, b: b
    )
    return {"a_start": a_start, "b_start": b_start, "keeps_start": True}


def _invertible(moments):
    """Second moments with as much on the diagonal as their inverse needs."""
    size, damp = len(moments), 0.01
    while True:
        mean = max(float(np.mean(np.diag(moments))), 1e-30)
        damped = moments + damp * mean * np.eye(size)
        error = damped @ np.linalg.inv(damped) - np.eye(size)
        if np.linalg.norm(error) <= 0.05:
            return damped
        damp *= 2


@start
def loftq(adapter):
    """The best pair for what quantisation took from the float kernel."""
    rank, view, scale = adapter.rank, adapter.view, adapter.initial_scale()

    def factors():
        original = adapter.start_data
        lost = original - ops.convert_to_numpy(view.matrix())
        a, b = view.factor(ops.convert_to_tensor(lost, "float32"), rank)
        left = lost - ops.convert_to_numpy(ops.matmul(a, b))
        size = max(float(np.linalg.norm(original)), 1e-30)
        adapter.start_errors = tuple(
            float(np.linalg.norm(x)) / size for x in (lost, left)
        )
        root = math.sqrt(abs(scale))
        return a / root, math.copysign(1, scale) * b / root

    a_start, b_start = adapter.made_late(
        factors, lambda a, b: a, lambda a, b: b
    )
    return {"a_start": a_start, "b_start": b_start}


# What each start has to be given beside the layer.
NEEDS = {
    "eva": "calibration",
    "corda": "calibration",
    "corda_kpm": "calibration",
    "loftq": "original",
    "lora_ga": "gradients",
}
# In the place of that in configurations: the weights come from a file.
LOADED = "loaded"


def triplets_of_start(adapter, view) -> int:
    """How many singular triplets a start takes."""
    if adapter.initializer == "mica":
        return min(view.n_in, view.n_out)
    return adapter.rank if adapter.initializer == "pissa" else 0
