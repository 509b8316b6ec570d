"""Time and memory of wrapping, merging and compressing a model of billions.

Usage: KERAS_BACKEND=torch python benchmarks/big_model.py [--layers 22]

A Llama in the shape of TinyLlama (22 blocks of width 2048, 1.1 billion
weights) in bfloat16, with random numbers. Every step runs once: seconds of
wall and of CPU, how far the process grew at its largest, and what of it was
left afterwards. On PyTorch with a GPU the memory is the card's.
`--steps` chooses some; each brings the ones that it needs.
"""

import argparse
import gc
import json
import os
import pathlib
import sys
import tempfile
import threading
import time

import keras
import keras_hub
from _device import card
from rich.console import Console
from rich.table import Table

import keras_spectral as ks

STEPS = ("lora", "save", "merged", "merge", "spectral", "compress")
PAGE = os.sysconf("SC_PAGE_SIZE")
CUDA = None
if keras.backend.backend() == "torch" and card():
    from torch import cuda as CUDA


def resident() -> float:
    """MB of the process that lie in memory, of the card if there is one."""
    if CUDA:
        return CUDA.memory_allocated() / 2**20
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * PAGE / 2**20


class Meter:
    """Measures a block; a thread looks at the memory 50 times a second."""

    def __enter__(self):
        gc.collect()
        if CUDA:
            CUDA.synchronize()
            CUDA.reset_peak_memory_stats()
        self.before = self.peak = resident()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        self.start = time.perf_counter(), time.process_time()
        return self

    def watch(self):
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, resident())

    def __exit__(self, *error):
        if CUDA:
            CUDA.synchronize()
            self.peak = CUDA.max_memory_allocated() / 2**20
        self.wall = time.perf_counter() - self.start[0]
        self.cpu = time.process_time() - self.start[1]
        self.stopped.set()
        self.thread.join()
        gc.collect()
        self.kept = resident() - self.before
        self.peak -= self.before


def build(layers: int) -> keras.Model:
    return keras_hub.models.Llama3Backbone(
        vocabulary_size=32000,
        num_layers=layers,
        num_query_heads=32,
        num_key_value_heads=4,
        hidden_dim=2048,
        intermediate_dim=5632,
        dtype="bfloat16",
    )


def measure(steps, layers: int, show: Console):
    """Yields a dictionary for each step."""
    model = build(layers)
    show.print(f"{model.count_params():,} weights, {resident():,.0f} MB")

    def step(name, work):
        with Meter() as meter:
            result = work()  # it counts as kept
        row = {
            "step": name,
            "seconds": round(meter.wall, 1),
            "cpu_seconds": round(meter.cpu, 1),
            "more_mb": round(meter.peak),
            "kept_mb": round(meter.kept),
        }
        show.print(row)
        del result
        return row

    def lora():
        ks.wrap_model(model, "lora", "all-linear", rank=8, trainable=())
        # At the start B is zero, and nothing would be lost by rounding.
        for variable in model.trainable_variables:
            if variable.name == "lora_b":
                variable.assign(variable + 0.01)

    def inside():
        with ks.merged(model):
            pass

    def save():
        with tempfile.TemporaryDirectory() as folder:
            ks.save_adapters(model, pathlib.Path(folder, "a.safetensors"))

    if {"lora", "save", "merged", "merge"} & set(steps):
        yield step("LoRA on all linear layers", lora)
        if "save" in steps:
            yield step("save_adapters", save)
        if "merged" in steps:
            yield step("merged", inside)
        if "merge" in steps:
            yield step("merge_model", lambda: ks.merge_model(model))
        else:
            ks.unwrap_model(model)
    if "spectral" in steps:
        options = {"target": "all-linear", "rank": 8, "trainable": ()}
        yield step(
            "spectral on all linear layers",
            lambda: ks.wrap_model(model, "spectral", **options),
        )
        ks.unwrap_model(model)
    if "compress" in steps:
        yield step("compress a tenth", lambda: ks.compress_model(model, 0.1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    args = parser.parse_args()
    show = Console(stderr=True)
    keras.utils.set_random_seed(0)
    table = Table("step", "seconds", "of CPU", "MB more", "MB kept")
    for row in measure(args.steps, args.layers, show):
        known = {"benchmark": "big_model", "layers": args.layers}
        known |= {"backend": keras.backend.backend(), "card": card()}
        print(json.dumps({**known, **row}), flush=True)
        table.add_row(*(str(value) for value in row.values()))
    show.print(table)


if __name__ == "__main__":
    sys.exit(main())
