"""Milliseconds per training step and peak memory, variants side by side.

Usage: KERAS_BACKEND=jax python benchmarks/step_time.py --case all
Prints a table on stderr and one JSON line per backend and case on stdout.
All variants of a case are timed in one process in turn (A B C D A B C D ...),
so that a busy machine slows all of them alike; ratios are medians of the
ratios within a round. Peak memory comes from a process per variant: that of
the card where the backend has one, else the resident set.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

VARIANTS = (
    "frozen",
    "lora",
    "lora_ivon",
    "adalora",
    "adalora_ivon",
    "spectral",
    "gated_spectral",
    "gated_rebuilt",
    "bottleneck",
    "prefix",
    "unipelt",
    "enable_lora",
    "full",
)
RANK = 8
# Every other method on a kernel, for `--variants methods`: its options.
METHODS: dict[str, dict] = {
    "dora": {"rank": RANK},
    "lora_fa": {"rank": RANK},
    "dylora": {"rank": RANK},
    "decaying_lora": {"rank": RANK, "end_step": 10**6},
    "orthogonal_adaptation": {"rank": RANK},
    "vera": {"rank": 256},
    "lidb": {},
    "loha": {"rank": RANK},
    "lokr": {"rank": RANK},
    "oft": {},
    "boft": {},
    "ia3": {},
    "ssf": {},
    "bitfit": {},
    "glora": {},
    "deep_lora": {"rank": RANK, "gradients": True},  # the compressed form
    "spectral_values": {"method": "spectral", "mode": "values"},
    "spectral_rotate": {"method": "spectral", "mode": "rotate", "rank": RANK},
    "conditional_spectral": {},
}
CASES = ("minilm", "dense", "tokens")
EVENTS: list = []


def cuda_clock() -> float:
    """Seconds by events on the card, when all work until now is done."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    EVENTS.append(event)
    return EVENTS[0].elapsed_time(event) / 1e3


# `fit` ends with the loss and `predict` with the outputs on the host, so that
# the wall's time is that of a card as well.
CLOCKS = {
    "wall": time.perf_counter,
    "cpu": time.process_time,
    "cuda": cuda_clock,
}
# Adapters of whole blocks, and their options: for MiniLM only.
BLOCKS: dict[str, dict] = {
    "bottleneck": {},
    "prefix": {},
    "unipelt": {"lora": RANK},
}
BATCH = {"minilm": 16, "dense": 256, "tokens": 16}
STEPS = 12
TOKENS = 128
# Of the models of Dense layers: an input, and the units that it grows to.
DENSE = {"dense": ((1024,), 4096), "tokens": ((TOKENS, 384), 1536)}


@functools.cache
def random_rows(case: str, batch: int, steps: int) -> tuple[Any, Any]:
    """Inputs and targets of one epoch, for all variants of a process."""
    import numpy as np

    rng = np.random.default_rng(0)
    rows = batch * steps
    if case in DENSE:
        shape, _ = DENSE[case]
        inputs, targets = rng.standard_normal((2, rows, *shape), "float32")
        return inputs, targets
    inputs = {
        "token_ids": rng.integers(1000, 20000, (rows, TOKENS)).astype("int32"),
        "segment_ids": np.zeros((rows, TOKENS), "int32"),
        "padding_mask": np.ones((rows, TOKENS), "int32"),
    }
    return inputs, rng.integers(0, 2, rows).astype("int32")


def minilm_case() -> tuple[Any, list]:
    """MiniLM-L6, and its query and value layers."""
    from _minilm import build_classifier

    model = build_classifier()
    layers = []
    for block in model.backbone.transformer_layers:
        attention = block._self_attention_layer
        layers += [attention.query_dense, attention.value_dense]
    return model, layers


def dense_case(case: str) -> tuple[Any, list]:
    """Two Dense layers, wide and back, twice, and its layers."""
    import keras

    shape, wide = DENSE[case]
    layers = [
        keras.layers.Dense(units, activation="relu", name=f"dense_{i}")
        for i, units in enumerate([wide, shape[-1]] * 2)
    ]
    return keras.Sequential([keras.Input(shape), *layers]), layers


def train_only(model: Any, variables: list) -> None:
    """Freezes every other variable of the model."""
    chosen = {id(variable) for variable in variables}
    for variable in model.weights:
        variable.trainable = id(variable) in chosen


def build(
    case: str, variant: str, batch: int, steps: int
) -> tuple[Any, Any, Any]:
    """A compiled model, ready to fit, with its inputs and targets.

    What trains: `frozen`, the bias of the first wrapped layer, so that the
    backward pass still runs through the whole model; `lora` and
    `enable_lora`, the two factors of every wrapped layer; `lora_ivon`, the
    same by IVON; `adalora`, its triplets, under a `RankBudget` by sensitivity
    that never ends, and `adalora_ivon`, by SNR and IVON; `spectral` and
    `gated_spectral`, those adapters' weights; `gated_rebuilt`, the same gates
    in a prototype that rebuilds every kernel in every call; those of
    `BLOCKS` and `METHODS`, the adapters' weights; `full`, everything. A task
    head trains in `full` only.
    """
    import keras

    import keras_spectral as ks

    model, layers = minilm_case() if case == "minilm" else dense_case(case)
    inputs, targets = random_rows(case, batch, steps)
    loss = (
        keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if case == "minilm"
        else keras.losses.MeanSquaredError()
    )
    if variant == "frozen":
        train_only(model, [layers[0].bias])
    elif variant == "enable_lora":
        for layer in layers:
            layer.enable_lora(RANK)
        factors = [(x.lora_kernel_a, x.lora_kernel_b) for x in layers]
        train_only(model, [factor for pair in factors for factor in pair])
    elif variant == "gated_rebuilt":
        model = rebuilt_model(model)
    elif variant in BLOCKS:
        ks.wrap_model(model, variant, trainable=[], **BLOCKS[variant])
    elif variant != "full":
        target = "attention" if case == "minilm" else keras.layers.Dense
        options = {"method": variant.removesuffix("_ivon"), "rank": RANK}
        options = {"method": variant, **METHODS.get(variant, options)}
        method = options.pop("method")
        if options.get("gradients"):
            model.compile("sgd", loss)
            options["gradients"] = ks.kernel_gradients(
                model, (inputs, targets), target, batch_size=batch
            )
        ks.wrap_model(model, method, target=target, trainable=[], **options)
    model.compile(make_optimizer(variant), loss)
    if variant.startswith("adalora"):
        # By hand, once: within `fit` it would compile the step each time.
        budget = ks.callbacks.RankBudget(
            RANK / 2,
            "snr" if variant.endswith("_ivon") else "sensitivity",
            warmup=0,
            total_steps=10**6,
        )
        budget.set_model(model)
        budget.on_train_begin()
    return model, inputs, targets


def make_optimizer(variant: str) -> Any:
    """IVON for the variants that end so, else AdamW."""
    import keras

    import keras_spectral as ks

    if variant.endswith("_ivon"):
        return ks.optimizers.IVON(1e-3, ess=1e6)
    return keras.optimizers.AdamW(1e-3)


def rebuilt_model(model: Any) -> Any:
    """Gates on all singular values by rebuilding the kernel in each call."""
    import keras
    import numpy as np

    class RebuiltGates(keras.layers.Layer):
        def __init__(self, dense):
            super().__init__()
            kernel = keras.ops.convert_to_numpy(dense.kernel)
            u, s, vt = np.linalg.svd(kernel, full_matrices=False)
            self.parts = [
                self.add_weight(
                    shape=part.shape,
                    initializer=lambda shape, dtype, part=part: part,
                    trainable=False,
                )
                for part in (u, s, vt)
            ]
            self.dense = dense
            dense.trainable = False
            self.gates = self.add_weight(shape=s.shape, initializer="zeros")

        def call(self, inputs):
            u, s, vt = self.parts
            kernel = keras.ops.matmul(u * (s * (1 + self.gates)), vt)
            outputs = keras.ops.matmul(inputs, kernel) + self.dense.bias
            return self.dense.activation(outputs)

    inputs = keras.Input(model.input_shape[1:])
    layers = [x for x in model.layers if isinstance(x, keras.layers.Dense)]
    return keras.Sequential([inputs, *map(RebuiltGates, layers)])


def fit(batch: int, model: Any, inputs: Any, targets: Any) -> None:
    """One epoch, past KerasHub's `tf.data`, which may wait forever."""
    import keras

    options = {"batch_size": batch, "shuffle": False, "verbose": 0}
    keras.Model.fit(model, inputs, targets, **options)


def predict(batch: int, model: Any, inputs: Any, targets: Any) -> None:
    """The same batches without training."""
    import keras

    keras.Model.predict(model, inputs, batch_size=batch, verbose=0)


def time_variants(args: argparse.Namespace) -> dict:
    """Times every variant in every round; the work of the timing process."""
    from _device import card
    from _minilm import count

    sizes = args.batch, args.steps
    run_epoch = predict if args.predict else fit
    clock = CLOCKS[args.clock]
    built = {name: build(args.case, name, *sizes) for name in args.variants}
    for parts in built.values():
        run_epoch(args.batch, *parts)
    milliseconds: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(args.repeats):
        for name, parts in built.items():
            start = clock()
            run_epoch(args.batch, *parts)
            seconds = clock() - start
            milliseconds[name].append(seconds / args.steps * 1e3)
    trainable = {
        name: count(model.trainable_variables)
        for name, (model, _, _) in built.items()
    }
    return {
        "milliseconds": milliseconds,
        "trainable": trainable,
        "card": card(),
    }


def peak_memory(args: argparse.Namespace) -> dict:
    """Trains one variant alone; the work of a memory process."""
    from _device import peak_mb

    (variant,) = args.variants
    fit(args.batch, *build(args.case, variant, args.batch, args.steps))
    return {"peak_mb": peak_mb()}


def run(command: list[str], backend: str | None = None) -> dict:
    """Runs a command and reads the JSON on the last line of its output."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    if backend:
        environment["KERAS_BACKEND"] = backend
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed with exit status {done.returncode}:\n"
            f"{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.strip().split("\n")[-1])


def run_peer(args: argparse.Namespace) -> dict:
    """HF PEFT on the same model and batch, in its own environment."""
    sizes = {
        "--batch": args.batch,
        "--length": TOKENS,
        "--steps": args.steps,
        "--repeats": args.repeats,
    }
    if args.dtype != "float32":
        sizes["--dtype"] = args.dtype
    options = [str(part) for pair in sizes.items() for part in pair]
    command = [args.peer_python, args.peer_script, args.peer_method]
    return run([*command, *options])


def measure(
    case: str, backend: str, args: argparse.Namespace
) -> tuple[dict, str | None]:
    """All figures of one case on one backend, and the card's name."""
    worker = [sys.executable, os.path.abspath(__file__), "--case", case]
    worker += ["--batch", str(args.batch), "--steps", str(args.steps)]
    worker += ["--dtype", args.dtype]
    peers = []
    with_peer = case == "minilm" and args.peer_script and not args.predict
    if with_peer:
        peers.append(run_peer(args))
    timed = run(
        [*worker, "--repeats", str(args.repeats), "--variants", *args.variants]
        + ["--worker", "time", "--clock", args.clock]
        + ["--predict"] * args.predict,
        backend,
    )
    if with_peer:
        peers.append(run_peer(args))

    def memory(name):
        return run([*worker, "--variants", name, "--worker", "memory"], backend)

    peaks = {}
    if not args.predict and not args.time_only:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            peaks = dict(zip(args.variants, pool.map(memory, args.variants)))
    rows = {}
    for name in args.variants:
        times = timed["milliseconds"][name]
        rows[name] = {
            "ms": statistics.median(times),
            "ms_min": min(times),
            "rounds": [round(t, 2) for t in times],
            "trainable": timed["trainable"][name],
            **peaks.get(name, {}),
        }
    if peers:
        rows["hf_peft"] = {
            "ms": statistics.mean(peer["ms_median"] for peer in peers),
            "ms_min": min(peer["ms_min"] for peer in peers),
            "trainable": peers[0]["trainable"],
            "peak_mb": max(peer["peak_mb"] for peer in peers),
        }
    for reference in ("frozen", "lora", "enable_lora", "hf_peft"):
        add_ratios(rows, timed["milliseconds"], reference)
    return rows, timed["card"]


def add_ratios(
    rows: dict[str, dict], milliseconds: dict[str, list], reference: str
) -> None:
    """Adds each variant's time relative to the reference's."""
    if reference not in rows:
        return
    for name, row in rows.items():
        if name in milliseconds and reference in milliseconds:
            pairs = zip(
                milliseconds[name], milliseconds[reference], strict=True
            )
            ratio = statistics.median(own / other for own, other in pairs)
        else:  # the peer runs before and after, so there are no rounds
            ratio = row["ms"] / rows[reference]["ms"]
        row[f"to_{reference}"] = ratio


def show_table(case: str, backend: str, rows: dict[str, dict]) -> None:
    """Prints the figures of one case on one backend."""
    table = Table(title=f"{case} on {backend}")
    table.add_column("variant")
    columns = {
        "ms": "ms",
        "ms_min": "min ms",
        "to_frozen": "x frozen",
        "to_lora": "x lora",
        "to_enable_lora": "x enable_lora",
        "to_hf_peft": "x HF PEFT",
        "trainable": "trainable",
        "peak_mb": "peak MB",
    }
    known = [key for key in columns if any(key in r for r in rows.values())]
    for key in known:
        table.add_column(columns[key], justify="right")
    for name, row in rows.items():
        cells = [form(key, row[key]) if key in row else "" for key in known]
        table.add_row(name, *cells)
    Console(stderr=True).print(table)


def form(key: str, value: float) -> str:
    """Writes a figure for the table."""
    if key.startswith("to_"):
        return f"{value:.2f}"
    if key.startswith("ms"):
        return f"{value:,.1f}" if value >= 100 else f"{value:.2f}"
    return f"{value:,}"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--case", choices=[*CASES, "all"], default="all")
    add("--backends", help="comma separated; default: KERAS_BACKEND")
    add(
        "--variants",
        nargs="+",
        choices=[*VARIANTS, *METHODS, "methods"],
        default=list(VARIANTS),
        help="methods: LoRA and every other method on a kernel",
    )
    add("--repeats", type=int, default=7)
    add("--batch", type=int, help="rows of a step; default: 16, dense 256")
    add("--steps", type=int, default=STEPS, help="steps of an epoch")
    add("--dtype", default="float32", help="dtype policy: mixed_bfloat16")
    add("--predict", action="store_true", help="time inference, not training")
    add("--time-only", action="store_true", help="do not measure memory")
    add("--jobs", type=int, default=1, help="memory processes at a time")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall, CPU time, or events on the card (torch)",
    )
    add("--peer-python", default=sys.executable)
    add("--peer-script", help="script that times HF PEFT; none: no peer")
    add("--peer-method", default="lora", help="lora, dora or full")
    add("--worker", choices=["time", "memory"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.worker:
        import keras

        keras.config.set_dtype_policy(args.dtype)
        work = time_variants if args.worker == "time" else peak_memory
        print(json.dumps(work(args)))
        return
    cases = CASES if args.case == "all" else [args.case]
    asked = args.variants
    if "methods" in asked:
        mine = ("frozen", "lora", "adalora", "spectral", "gated_spectral")
        asked = [*mine, *METHODS]
    batch = args.batch
    backends = args.backends or os.environ.get("KERAS_BACKEND", "tensorflow")
    for backend in backends.split(","):
        for case in cases:
            # The prototype is for a stack of Dense only, which has no blocks.
            left_out = BLOCKS if case in DENSE else ("gated_rebuilt",)
            args.variants = [v for v in asked if v not in left_out]
            args.batch = batch or BATCH[case]
            rows, card = measure(case, backend, args)
            result = {
                "benchmark": "step_time",
                "backend": backend,
                "case": case,
                "batch": args.batch,
                "steps": args.steps,
                "dtype": args.dtype,
                "repeats": args.repeats,
                "rank": RANK,
                "predict": args.predict,
                "clock": args.clock,
                "cpus": os.cpu_count(),
                "card": card,
                "variants": {
                    name: {
                        k: v if k == "rounds" else round(v, 3)
                        for k, v in row.items()
                    }
                    for name, row in rows.items()
                },
            }
            print(json.dumps(result), flush=True)
            show_table(case, backend, rows)


if __name__ == "__main__":
    main()
