"""Trains every method on one device and on several; prints the losses.

`python on_devices.py ENGINE [METHOD ...]` with one of the engines below, on
virtual devices of the CPU, all methods by default. Lines are JSON: losses of
ten steps by method and by how they were run.
"""

import functools
import json
import os
import pathlib
import sys
import tempfile

DEVICES, STEPS, BATCH = 4, 10, 16
BACKENDS = {"mirrored": "tensorflow", "ddp": "torch"}  # else JAX

if __name__ in ("__main__", "__mp_main__"):
    os.environ["KERAS_BACKEND"] = BACKENDS.get(sys.argv[1], "jax")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={DEVICES}"
    )
    sys.path.append(str(pathlib.Path(__file__).parents[1]))

import block_cases  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_spectral as ks  # noqa: E402
from keras_spectral._backend import without_gradients  # noqa: E402
from keras_spectral.layers.adapter import METHODS  # noqa: E402

OPTIONS = {
    "boft": {"block_size": 4},
    "bottleneck": {"size": 2},
    "decaying_lora": {"rank": 2, "end_step": 6},
    "glora": {"rank": 2},
    "lidb": {"down": 4, "up": 4},
    "oft": {"block_size": 4},
    "prefix": {"length": 2},
    "unipelt": {"lora": 2, "prefix": 2, "bottleneck": 2},
    "vera": {"rank": 4},
}
WITHOUT_TARGET = {"bitfit", "ia3", "ssf", "tuned_norm"}
# They want models of KerasHub.
ELSEWHERE = {"lora_experts", "soft_prompt"}


# Methods with what follows each step beside the optimizer.
EXTRAS = ["adalora+budget", "lora+ivon", "unipelt+gates"]


def method_names():
    """Every method that runs here."""
    return sorted(METHODS.keys() - ELSEWHERE)


def build_base(recurrent=False, seed=0):
    """A small model."""
    keras.utils.set_random_seed(seed)
    shape = block_cases.TOKENS, block_cases.WIDTH
    layers = keras.layers
    inputs = keras.Input(shape)
    x = layers.Conv1D(shape[1], 3, padding="same", name="conv")(inputs)
    if recurrent:
        x = layers.GRU(8, name="recurrent")(x)
    else:
        x = block_cases.Block(name="block")(x)
        x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def build(case, seed=0, **options):
    """It with a method around its layers, compiled."""
    method, _, extra = case.partition("+")
    model = build_base(method == "lora_recurrent", seed)
    cls = METHODS[method]
    options |= OPTIONS.get(method, {})
    names = cls.option_names()
    if "rank" in names and method != "deep_lora":  # whose rank wants gradients
        options.setdefault("rank", 2)
    if "seed" in names:
        options["seed"] = 1
    if cls.default_target in ("attention", "all-linear"):
        options["target"] = "all-linear"
    ks.wrap_model(model, method, trainable=["head"], **options)
    optimizer = keras.optimizers.Adam(0.01)
    if extra == "ivon":
        optimizer = ks.optimizers.IVON(0.1, ess=100, seed=0)
    model.compile(optimizer, "mse")
    return model


def callbacks_of(case):
    extra = case.partition("+")[2]
    if extra == "budget":
        return [ks.callbacks.RankBudget(1, warmup=2, final=2, interval=1)]
    return [ks.callbacks.GateRecorder()] if extra == "gates" else []


def data():
    rng = np.random.default_rng(0)
    shape = BATCH, block_cases.TOKENS, block_cases.WIDTH
    x = rng.normal(size=shape).astype("float32")
    return x, rng.normal(size=(BATCH, 3)).astype("float32")


def fit(model, case):
    """Losses, and what else the logs say, step by step."""
    x, y = data()
    return model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=STEPS,
        verbose=0,
        shuffle=False,
        callbacks=callbacks_of(case),
    ).history


def layouts(model):
    """How the adapters' pairs are split, by their paths."""
    return {
        v.path: [str(axis) for axis in v.value.sharding.spec]
        for v in model.variables
        if v.name in ("lora_a", "lora_b", "kernel")
    }


def model_parallel():
    from keras import distribution

    mesh = distribution.DeviceMesh(
        (2, 2), ("batch", "model"), distribution.list_devices()
    )
    rules = distribution.LayoutMap(mesh)
    rules[".*conv.kernel"] = (None, None, "model")
    rules[".*inner.*kernel"] = (None, "model")
    rules[".*outer.*kernel"] = ("model", None)
    rules[".*(query|key|value)/kernel"] = (None, "model", None)
    rules = ks.adapter_layout(rules)
    return distribution.ModelParallel(layout_map=rules, batch_dim_name="batch")


def on_jax(case):
    distributions = {
        "one": lambda: None,
        "data": keras.distribution.DataParallel,
        "model": model_parallel,
    }
    found = {}
    for name, make in distributions.items():
        keras.distribution.set_distribution(make())
        model = build(case)
        found[name] = fit(model, case)
        if name == "model":
            found["layouts"] = layouts(model)
        keras.distribution.set_distribution(None)
    return found


def life_on_jax():
    """What follows training, with kernels that are split over devices.

    Returns the largest differences, by what was done, and layouts.
    """
    x, _ = data()
    found = {}

    def put(name, got, wanted):
        got, wanted = (keras.ops.convert_to_numpy(v) for v in (got, wanted))
        found[name] = float(np.abs(got - wanted).max())

    starts = {
        "pissa": ("lora", {"initializer": "pissa"}),
        "svd": ("spectral", {}),
    }
    plain = {}
    for distributed in (False, True):
        set_distribution = keras.distribution.set_distribution
        set_distribution(model_parallel() if distributed else None)
        for name, (method, options) in starts.items():
            model = build(method, **options)
            fit(model, method)
            outputs = model.predict(x, verbose=0)
            if not distributed:
                plain[name] = outputs
                continue
            put(name, outputs, plain[name])
            again = build(method, **options)
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "adapters.safetensors")
                ks.save_adapters(model, path)
                ks.unwrap_model(again)
                ks.load_adapters(again, path)
                put(f"{name} loaded", again.predict(x, verbose=0), outputs)
                model.save(pathlib.Path(folder, "model.keras"))
                whole = keras.saving.load_model(
                    pathlib.Path(folder, "model.keras")
                )
            put(f"{name} saved whole", whole.predict(x, verbose=0), outputs)
            with ks.merged(model) as merged:
                put(f"{name} merged", merged.predict(x, verbose=0), outputs)
            model = ks.merge_model(model)
            put(f"{name} for good", model.predict(x, verbose=0), outputs)
            found["layouts"] = layouts(model)
        small = ks.compress_model(
            build_base(), 0.3, method="uniform", calibration=x
        )
        outputs = small.predict(x, verbose=0)
        if distributed:
            put("compressed", outputs, plain["compressed"])
        plain["compressed"] = outputs
        model = build("lora")
        model.compile(model.optimizer, "mse", steps_per_execution=5)
        history = model.fit(*many(), batch_size=BATCH, shuffle=False, verbose=0)
        plain.setdefault("steps", history.history["loss"])
        put("steps_per_execution", history.history["loss"], plain["steps"])
    return found


def many():
    """Ten batches."""
    return [np.concatenate(10 * [array]) for array in data()]


def on_mirrored(case):
    strategy = mirrored()
    found = {"one": fit(build(case), case)}
    with strategy.scope():
        model = build(case)
    found["mirrored"] = fit(model, case)
    return found


@functools.cache
def mirrored():
    """One for the process: two would mix up what their replicas exchange."""
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    one = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(cpu, [one, one])
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def loop(model, case, parallel=None, rank=0, processes=1):
    """`fit` by hand, on the part of each batch that is of a process."""
    x, y = data()
    x, y = x[rank::processes], y[rank::processes]
    callbacks = keras.callbacks.CallbackList(
        callbacks_of(case), model=model, epochs=STEPS, steps=1
    )
    callbacks.on_train_begin()
    optimizer, losses = model.optimizer, []
    optimizer.build(model.trainable_variables)
    for epoch in range(STEPS):
        callbacks.on_epoch_begin(epoch)
        callbacks.on_train_batch_begin(0)
        model.zero_grad()
        outputs = (parallel or model)(
            keras.ops.convert_to_tensor(x), training=True
        )
        loss = model.compute_loss(x, keras.ops.convert_to_tensor(y), outputs)
        loss.backward()
        variables = model.trainable_variables
        gradients = [v.value.grad for v in variables]
        with without_gradients():
            optimizer.apply(gradients, variables)
        losses.append(loss.detach())
        callbacks.on_train_batch_end(0)
        callbacks.on_epoch_end(epoch)
    callbacks.on_train_end()
    return losses


def on_ddp(case):
    """In one of the processes; the losses are means over all of them."""
    import torch
    from torch import distributed

    rank, processes = distributed.get_rank(), distributed.get_world_size()
    keras.config.disable_traceback_filtering()
    found = {"one": {"loss": [float(x) for x in loop(build(case), case)]}}
    model = build(case)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    losses = torch.stack(loop(model, case, parallel, rank, processes))
    distributed.all_reduce(losses)
    found["ddp"] = {"loss": (losses / processes).tolist()}
    weights = torch.cat([v.value.flatten() for v in model.trainable_variables])
    others = [torch.empty_like(weights) for _ in range(processes)]
    distributed.all_gather(others, weights.detach())
    found["same"] = all(torch.equal(other, weights) for other in others)
    return found


def processes_of_torch(cases):
    """Runs `on_ddp` in two processes."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(in_process, (folder, cases), 2)
        return json.loads(pathlib.Path(folder, "found.json").read_text())


def in_process(rank, folder, cases):
    from torch import distributed

    distributed.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=2
    )
    found = {case: on_ddp(case) for case in cases}
    if rank == 0:
        pathlib.Path(folder, "found.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def main(engine, *cases):
    if engine == "jax-life":
        print(json.dumps(life_on_jax()))
        return
    cases = cases or [*method_names(), *EXTRAS]
    if engine == "ddp":
        print(json.dumps(processes_of_torch(cases)))
        return
    for case in cases:
        found = {"jax": on_jax, "mirrored": on_mirrored}[engine](case)
        print(json.dumps({case: found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
