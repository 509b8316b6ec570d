"""The training step of two versions of the library, in turn.

Usage: KERAS_BACKEND=torch python benchmarks/versions.py --other DIR
DIR is another checkout, such as `git worktree add DIR COMMIT` makes. A
process for each version stays alive; they take turns (A B A B ...), so that a
busy machine slows both alike. Printed are CPU milliseconds a step, and the
median and range of the ratios this / other.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 4


class Worker:
    """A process with one version of the library, and a compiled model."""

    def __init__(self, checkout: pathlib.Path, case: str, variant: str):
        command = [sys.executable, __file__, "--worker", case, variant]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.receive()

    def receive(self) -> float:
        for line in self.process.stdout:
            if line.startswith("time "):
                return float(line.split()[1])
        raise RuntimeError("A worker has ended; its errors stand above.")

    def step(self) -> float:
        """CPU milliseconds of a step."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.receive()


def work(case: str, variant: str) -> None:
    import time

    sys.path.insert(0, str(HERE))
    import step_time

    batch = step_time.BATCH[case]
    parts = step_time.build(case, variant, batch, STEPS)
    while True:
        start = time.process_time()
        step_time.fit(batch, *parts)
        taken = 1000 * (time.process_time() - start) / STEPS
        print("time", taken, flush=True)
        if not sys.stdin.readline():
            return


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=pathlib.Path, required=True)
    parser.add_argument("--case", choices=("dense", "minilm"), default="dense")
    parser.add_argument("--variant", default="lora")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    folders = HERE.parent, args.other.resolve()
    workers = [Worker(folder, args.case, args.variant) for folder in folders]
    rounds = []
    for number in range(args.rounds + 1):
        times = [worker.step() for worker in workers]
        if number:  # the first one warms up
            rounds.append(times)
    for name, times in zip(("this", "other"), zip(*rounds)):
        print(f"{name}: {statistics.median(times):.1f} ms")
    ratios = [this / other for this, other in rounds]
    middle = statistics.median(ratios)
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    print(
        f"{backend} {args.case} {args.variant}: {middle:.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )
    for worker in workers:
        worker.process.kill()


if __name__ == "__main__":
    main()
