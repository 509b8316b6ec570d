"""Where a training step on PyTorch goes, and where `torch.compile` breaks.

Usage: KERAS_BACKEND=torch python benchmarks/operations.py profile
       KERAS_BACKEND=torch python benchmarks/operations.py breaks
`profile` needs `transformers` and `peft` beside what `step_time.py` needs: its
MiniLM, frozen and with LoRA, and HF PEFT's, take training steps in turn, and
the CPU time of each operation is added up, with OMP_NUM_THREADS=1 that of one
thread. (PyTorch's own profiler looks at the wall's clock, which other jobs
disturb.) What is between the operations is called Python; those below 1 % of
all in every variant are left out. `breaks` counts the graphs and breaks in
which `torch.compile` takes a training step, a prediction and, of the language
model, writing: small models, plain and with adapters.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np
import step_time
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import keras_spectral as ks

METHODS = ("plain", "lora", "dora", "spectral", "oft")
STEPS = 2


def our_steps(variant: str) -> Callable[[], None]:
    """Training steps of `step_time.py`, as a function."""
    batch = step_time.BATCH["minilm"]
    parts = step_time.build("minilm", variant, batch, STEPS)
    return lambda: step_time.fit(batch, *parts)


def peer_steps() -> Callable[[], None]:
    """The same of HF PEFT."""
    import peft
    import transformers
    from _minilm import preset_folder

    model = transformers.BertForSequenceClassification.from_pretrained(
        preset_folder(), num_labels=2
    )
    config = peft.LoraConfig(
        r=step_time.RANK, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    rng = np.random.default_rng(0)
    shape = (step_time.BATCH["minilm"], step_time.TOKENS)
    ids = torch.tensor(rng.integers(1000, 20000, shape))
    labels = torch.tensor(rng.integers(0, 2, shape[0]))

    def run():
        for _ in range(STEPS):
            mask = torch.ones_like(ids)
            model(ids, mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


class Clock(TorchDispatchMode):
    """Inside, adds up the CPU seconds of each of PyTorch's operations."""

    def __init__(self):
        super().__init__()
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        begin = time.thread_time()
        result = function(*args, **(kwargs or {}))
        taken = time.thread_time() - begin
        name = function.overloadpacket.__name__
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
        return result


def operations(run: Callable[[], None]) -> dict[str, float]:
    """CPU milliseconds of each operation of a step, and of the rest."""
    begin = time.thread_time()
    with Clock() as clock:
        run()
    total = time.thread_time() - begin
    seconds = {**clock.seconds, "all": total}
    seconds["Python"] = total - sum(clock.seconds.values())
    return {name: x * 1e3 / STEPS for name, x in seconds.items()}


def profile(rounds: int) -> dict[str, dict[str, float]]:
    """Prints and returns a table of operations: medians of rounds."""
    runs = {"frozen": our_steps("frozen"), "lora": our_steps("lora")}
    runs["hf_peft"] = peer_steps()
    for run in runs.values():
        run()  # the first one makes things
    seen: dict[str, list[dict]] = {variant: [] for variant in runs}
    for _ in range(rounds):
        for variant, run in runs.items():
            seen[variant].append(operations(run))
    found = {
        variant: {
            name: statistics.median(times.get(name, 0.0) for times in all_times)
            for name in all_times[0]
        }
        for variant, all_times in seen.items()
    }
    table = Table(title="CPU ms of a step")
    for column in ("operation", *found):
        table.add_column(column, justify="right")
    most = {
        name: max(times.get(name, 0) / times["all"] for times in found.values())
        for name in set().union(*found.values())
    }
    for name in sorted(most, key=most.get, reverse=True):
        if most[name] > 0.01:
            cells = [f"{times.get(name, 0):.1f}" for times in found.values()]
            table.add_row(name, *cells)
    Console(stderr=True).print(table)
    return found


def dense_model() -> tuple[keras.Model, Any, Any]:
    """Two Dense layers, and a batch."""
    layers = [keras.layers.Dense(32, "relu"), keras.layers.Dense(16)]
    model = keras.Sequential([keras.Input((16,)), *layers])
    return model, np.ones((4, 16), "float32"), np.ones((4, 16), "float32")


def bert_model() -> tuple[keras.Model, Any, Any]:
    """A BERT of one small block with a head, and a batch."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=64,
        num_layers=1,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=16,
    )
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2)
    ids = np.ones((4, 8), "int32")
    names = ("token_ids", "segment_ids", "padding_mask")
    return model, dict.fromkeys(names, ids), np.ones((4,), "int32")


def llama_model() -> tuple[keras.Model, Any, Any]:
    """A language model of one small block, and a batch."""
    import keras_hub

    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=64,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
    )
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    ids = np.ones((4, 8), "int32")
    mask = np.arange(8)[None] < np.full((4, 1), 6)
    return model, {"token_ids": ids, "padding_mask": mask}, ids


MODELS = {"dense": dense_model, "bert": bert_model, "llama": llama_model}


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Inside, `torch.compile` compiles to nothing and counts."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 256  # at which it gives up
    counters, result = torch._dynamo.utils.counters, {}
    counters.clear()
    original = torch.compile
    torch.compile = lambda f, **_: original(f, backend="eager")
    try:
        yield result
    finally:
        torch.compile = original
    result["graphs"] = counters["stats"]["unique_graphs"]
    result["breaks"] = sum(counters["graph_break"].values())
    result["reasons"] = dict(counters["graph_break"])


def breaks(kind: str, method: str) -> dict[str, dict[str, Any]]:
    """Graphs and breaks of what one model does."""
    keras.utils.set_random_seed(0)
    model, inputs, targets = MODELS[kind]()
    if method != "plain":
        options = {"oft": {"block_size": 4}}.get(method, {"rank": 2})
        # Heads as well: Keras's graphs of layers are compiled, and break,
        # once for each class of layer in them.
        target = [keras.layers.Dense, keras.layers.EinsumDense]
        ks.wrap_model(model, method, target, trainable=(), **options)
    crossed = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss = "mse" if kind == "dense" else crossed
    model.compile("adam", loss, jit_compile=True)
    found = {}
    with counted() as found["fit"]:
        keras.Model.fit(model, inputs, targets, batch_size=4, verbose=0)
    with counted() as found["predict"]:
        keras.Model.predict(model, inputs, batch_size=4, verbose=0)
    if kind == "llama":
        with counted() as found["generate"]:
            # KerasHub never compiles it on PyTorch.
            step = torch.compile(model.make_generate_function())
            step(keras.tree.map_structure(torch.tensor, inputs))
    return found


def all_breaks(models: list[str], methods: list[str]) -> list[dict]:
    """Prints a table of breaks, and returns its rows."""
    table = Table(title="graph breaks (graphs)")
    for column in ("model", "method", "fit", "predict", "generate"):
        table.add_column(column, justify="right")
    rows = []
    for kind in models:
        for method in methods:
            found = breaks(kind, method)
            rows.append({"model": kind, "method": method, **found})
            cells = [f"{x['breaks']} ({x['graphs']})" for x in found.values()]
            table.add_row(kind, method, *cells)
    Console(stderr=True).print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["profile", "breaks"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    args = parser.parse_args()
    if keras.backend.backend() != "torch":
        sys.exit("Expected KERAS_BACKEND=torch: this is about PyTorch.")
    if args.what == "profile":
        print(json.dumps(profile(args.rounds)))
    else:
        print(json.dumps(all_breaks(args.models, args.methods)))


if __name__ == "__main__":
    main()
