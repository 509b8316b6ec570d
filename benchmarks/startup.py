"""What `import keras_spectral` adds to `import keras`, and a small wrap.

Usage: KERAS_BACKEND=torch python benchmarks/startup.py

CPU milliseconds, the median of several processes. Modules are compiled first,
as pip leaves them: without that the import would mostly be a compilation.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile

REPEATS = 7
MEASURE = """
import json, time
import keras
start = time.process_time()
import keras_spectral as ks
imported = time.process_time()
wraps = []
for _ in range(6):
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    before = time.process_time()
    ks.wrap_model(model, "lora", target="dense.*")
    wraps.append(time.process_time() - before)
print(json.dumps([1e3 * (imported - start), 1e3 * wraps[0],
                  1e3 * sorted(wraps[1:])[2]]))
"""


def measure(compiled: str) -> list[float]:
    """Import, the first wrap and a later one in a fresh process."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


with tempfile.TemporaryDirectory() as folder:
    measure(folder)  # compiles
    runs = [measure(folder) for _ in range(REPEATS)]
names = ("import_ms", "first_wrap_ms", "wrap_ms")
medians = [round(statistics.median(column), 1) for column in zip(*runs)]
backend = os.environ.get("KERAS_BACKEND", "tensorflow")
print(json.dumps({"backend": backend, **dict(zip(names, medians))}))
