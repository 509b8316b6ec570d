"""Fine-tunes a model on one device, on several, or on several machines.

    python examples/distributed.py                                # one process
    python examples/distributed.py --virtual 4 --split 2          # 4 devices
    python examples/distributed.py --hosts 10.0.0.1:1234,10.0.0.2:1234 \
        --process 0                          # and --process 1 on the other one

With `--split k` each kernel is split over k devices, and the batch over what
is left of them; without it the batch alone is split. Several devices need
`KERAS_BACKEND=jax`. The data are made up.
"""

import argparse
import os

parser = argparse.ArgumentParser()
parser.add_argument("--virtual", type=int, help="devices of this CPU")
parser.add_argument("--split", type=int, default=1, help="parts of a kernel")
parser.add_argument("--hosts", help="addresses of all processes, by commas")
parser.add_argument("--process", type=int, default=0, help="which one it is")
parser.add_argument("--out", default="adapters.safetensors")
args = parser.parse_args()
if args.virtual:  # before JAX looks for devices
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={args.virtual}"
    )

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_spectral as ks  # noqa: E402


def distribution():
    """How weights and batches are spread; the first half of `--split`."""
    devices = keras.distribution.list_devices()
    if args.split == 1:
        return keras.distribution.DataParallel(
            devices=devices, auto_shard_dataset=False
        )
    shape = len(devices) // args.split, args.split
    mesh = keras.distribution.DeviceMesh(shape, ("batch", "model"), devices)
    rules = keras.distribution.LayoutMap(mesh)
    rules[".*wide/kernel"] = (None, "model")
    rules[".*narrow/kernel"] = ("model", None)
    return keras.distribution.ModelParallel(
        layout_map=ks.adapter_layout(rules),
        batch_dim_name="batch",
        auto_shard_dataset=False,
    )


def build():
    layers = [
        keras.layers.Dense(256, "relu", name="wide"),
        keras.layers.Dense(64, "relu", name="narrow"),
        keras.layers.Dense(4, name="head"),
    ]
    return keras.Sequential([keras.Input((64,)), *layers])


processes = len(args.hosts.split(",")) if args.hosts else 1
if args.hosts:
    keras.distribution.initialize(args.hosts, processes, args.process)
keras.utils.set_random_seed(0)
replicas = 1
if args.virtual or args.hosts:
    spread = distribution()
    replicas = spread.num_model_replicas
    keras.distribution.set_distribution(spread)

rng = np.random.default_rng(0)
x = rng.normal(size=(512, 64)).astype("float32")
y = (x @ rng.normal(size=(64, 4))).argmax(axis=1)
# Every process gives its own rows of each batch, unless processes share a copy.
parts = min(processes, replicas)
mine = slice(args.process * parts // processes, None, parts)
x, y = x[mine], y[mine]

model = ks.wrap_model(
    build(), "lora", "wide|narrow", rank=8, seed=0, trainable=["head"]
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
options = {"batch_size": 64 // parts, "epochs": 5, "shuffle": False}
history = model.fit(x, y, verbose=0, **options)
print("accuracy by epoch:", np.round(history.history["accuracy"], 4).tolist())
for weight in model.get_layer("wide").weights:
    spread = getattr(weight.value, "sharding", "one device")
    print(weight.path, tuple(weight.shape), getattr(spread, "spec", spread))
ks.save_adapters(model, args.out)  # in all processes; the first one writes
