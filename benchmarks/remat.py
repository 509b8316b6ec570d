"""What `keras.RematScope` saves of a wrapped model's memory.

Usage: KERAS_BACKEND=torch python benchmarks/remat.py
A stack of --layers Dense layers of --width with gelu, built in a scope of each
mode (all layers in `list_of_layers`), then wrapped with LoRA of rank 8 or left
as it is with only its first bias training, takes two training steps of --batch
rows in a process of its own. Printed is by how many MB these raise the peak of
its memory, and the CPU seconds of the second. `failed` says that Keras does.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import time

MODES = ("none", "full", "activations", "larger_than", "list_of_layers")


def peak() -> int:
    """The largest resident set so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(mode: str, method: str, args: argparse.Namespace) -> dict:
    """Megabytes and seconds of one model; the work of a process."""
    import keras
    import numpy as np

    import keras_spectral as ks

    names = [f"hidden_{i}" for i in range(args.layers)]
    scope = contextlib.nullcontext()
    if mode != "none":
        scope = keras.RematScope(
            mode, output_size_threshold=1024, layer_names=names
        )
    with scope:
        outputs = inputs = keras.Input((args.width,))
        for name in names:
            outputs = keras.layers.Dense(args.width, "gelu", name=name)(outputs)
        model = keras.Model(inputs, outputs)
    if method == "lora":
        ks.wrap_model(model, "lora", "hidden.*", rank=8)
    else:
        for variable in model.weights[1:]:
            variable.trainable = False
    model.compile("sgd", "mse", jit_compile=False)
    x = np.ones((args.batch, args.width), "float32")

    def step():
        begin = time.process_time()
        options = {"batch_size": args.batch, "verbose": 0}
        model.fit(x, x, **options)
        return time.process_time() - begin

    model.predict(x[:8], verbose=0)
    before = peak()
    step()
    seconds = step()
    return {"mb": peak() - before, "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(*args.worker, args)))
        return
    sizes = [("--layers", args.layers), ("--width", args.width)]
    sizes.append(("--batch", args.batch))
    command = [sys.executable, __file__]
    command += [str(part) for pair in sizes for part in pair]
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    for mode in args.modes:
        row = {"benchmark": "remat", "backend": backend, "mode": mode}
        for method in ("plain", "lora"):
            done = subprocess.run(
                [*command, "--worker", mode, method],
                capture_output=True,
                text=True,
            )
            last = done.stdout.strip().split("\n")[-1]
            row[method] = "failed" if done.returncode else json.loads(last)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
