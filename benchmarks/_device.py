"""The card that Keras computes on, and the memory that it has taken."""

import resource

import keras


def card() -> str | None:
    """The name of the backend's GPU; None where there is only a CPU."""
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        found = torch.cuda.is_available()
        return torch.cuda.get_device_name() if found else None
    if backend == "jax":
        import jax

        device = jax.local_devices()[0]
        return device.device_kind if device.platform == "gpu" else None
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return None
    details = tf.config.experimental.get_device_details(gpus[0])
    return details.get("device_name", gpus[0].name)


def peak_mb() -> int:
    """The most that this process has taken of the card, else of the host."""
    backend = keras.backend.backend()
    if not card():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    if backend == "torch":
        import torch

        peak = torch.cuda.max_memory_allocated()
    elif backend == "jax":
        import jax

        peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    else:
        import tensorflow as tf

        peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return peak // 2**20
