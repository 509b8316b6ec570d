"""Time to factorise the kernels of BERT-base, and what a 7B model would take.

Usage: KERAS_BACKEND=torch python benchmarks/factorize.py
Compares `wrap_model(model, "spectral", rank=8)` on all 72 linear layers with
a full SVD of the same kernels, and prints the largest angle between the
subspaces found and the true ones. JSON on stdout.
"""

import argparse
import json
import os
import time

import keras
import keras_hub
import numpy as np
from keras import ops
from rich.console import Console
from rich.progress import track

import keras_spectral as ks
from keras_spectral._internal.linalg import truncated_svd
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import factorize
from keras_spectral.model.hosts import adapter_places

# Llama-7B: how many kernels of each shape.
SEVEN_B = {(4096, 4096): 128, (4096, 11008): 64, (11008, 4096): 32}


def build_bert(decay: float) -> tuple[keras.Model, dict]:
    """BERT-base whose linear kernels have singular values i^-decay.

    Returns the model and the left singular vectors of each kernel.
    """
    model = keras_hub.models.BertBackbone(
        vocabulary_size=1000,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        intermediate_dim=3072,
    )
    probe = ks.wrap_model(model, "gated_spectral", directions=1)
    views = {p.path: p.layer.view for p in adapter_places(probe)}
    rng = np.random.default_rng(0)
    bases = {n: np.linalg.qr(rng.normal(size=(n, 768)))[0] for n in (768, 3072)}
    values = np.arange(1, 769) ** -decay
    true = {}
    for path, view in views.items():
        # Random rows and signs of fixed orthonormal columns: cheap to make.
        u = bases[view.n_in][rng.permutation(view.n_in)]
        v = bases[view.n_out][rng.permutation(view.n_out)]
        view.assign(((u * values) @ v.T).astype("float32"))
        true[path] = u
    ks.unwrap_model(model)
    return model, true


def seconds_of(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bert(args) -> dict:
    model, true = build_bert(args.decay)
    options = {"target": "all-linear", "rank": args.rank}
    wrapped = seconds_of(lambda: ks.wrap_model(model, "spectral", **options))
    adapters = {p.path: p.layer for p in adapter_places(model)}
    sines = [
        np.linalg.norm(
            a.u.numpy()
            - (u := true[path][:, : args.rank]) @ (u.T @ a.u.numpy()),
            2,
        )
        for path, a in adapters.items()
    ]
    kernels = [a.view.matrix() for a in adapters.values()]

    def full():
        for kernel in track(kernels, "full SVD", console=Console(stderr=True)):
            ops.convert_to_numpy(truncated_svd(kernel, args.rank)[0])

    whole = seconds_of(full)
    return {
        "kernels": len(kernels),
        "wrap_seconds": round(wrapped, 3),
        "full_svd_seconds": round(whole, 3),
        "ratio": round(wrapped / whole, 4),
        "largest_sine": float(max(sines)),
    }


def seven_b(args) -> dict:
    """From one bfloat16 layer of each shape, as `wrap_model` takes it."""
    rng = np.random.default_rng(0)
    total, each = 0.0, {}
    for (n_in, n_out), count in SEVEN_B.items():
        low = rng.normal(size=(n_in, 256)) * np.arange(1, 257) ** -args.decay
        layer = keras.layers.Dense(n_out, use_bias=False, dtype="bfloat16")
        layer.build((None, n_in))
        layer.kernel.assign(low @ rng.normal(size=(256, n_out)))
        view = kernel_view(layer)
        times = [
            seconds_of(
                lambda view=view: ops.convert_to_numpy(
                    factorize([(view, args.rank)])[0].u
                )
            )
            for _ in range(3)
        ]
        each[f"{n_in}x{n_out}"] = round(float(np.median(times)), 3)
        total += count * float(np.median(times))
    return {"seconds_each": each, "projected_seconds": round(total, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--rank", type=int, default=8)
    add("--decay", type=float, default=0.5, help="singular values i^-decay")
    args = parser.parse_args()
    result = {
        "benchmark": "factorize",
        "backend": keras.backend.backend(),
        "rank": args.rank,
        "decay": args.decay,
        "cpus": os.cpu_count(),
        "bert_base": bert(args),
        "seven_b": seven_b(args),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
