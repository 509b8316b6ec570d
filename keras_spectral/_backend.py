"""What Keras offers no way to do: the one file that imports a backend."""

import contextlib
import functools
from collections.abc import Callable

import keras


def eagerly() -> contextlib.AbstractContextManager:
    """Runs what is inside now, even while a TensorFlow graph is traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def concretely() -> contextlib.AbstractContextManager:
    """Runs what is inside on numbers that are there, whatever is traced."""
    if keras.backend.backend() != "jax":
        return eagerly()
    import jax

    return jax.ensure_compile_time_eval()


def without_gradients() -> contextlib.AbstractContextManager:
    """Inside, PyTorch keeps nothing for a backward pass."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def is_in_graph(x) -> bool:
    """Whether a tensor is a part of a TensorFlow graph, without numbers."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.is_symbolic_tensor(x)


def scope_of(model: keras.layers.Layer) -> contextlib.AbstractContextManager:
    """The scope of the TensorFlow strategy that a model was built under."""
    strategy = getattr(model, "distribute_strategy", None)
    if keras.backend.backend() != "tensorflow" or strategy is None:
        return contextlib.nullcontext()
    return strategy.scope()


def is_off(strength: keras.Variable) -> bool:
    """Whether a strength is 0, where Python can know without a wait.

    PyTorch runs eagerly: what is off is left out there. Its answer is kept
    until the variable is assigned again, because a look at a number makes a
    GPU stop. A compiled step, as of the other backends, is not traced anew
    for another strength, so there the answer is always False.
    """
    if keras.backend.backend() != "torch":
        return False
    import torch

    value = strength.value
    if torch.compiler.is_compiling() or value.device.type == "meta":
        return False
    known = (id(value), value._version)
    if vars(strength).get("_known", (None, None))[0] != known:
        strength._known = (known, bool(value.detach() == 0))
    return strength._known[1]


def assign_numbers(variables: list[keras.Variable], numbers: list) -> None:
    """Assigns numbers to scalar variables, several times faster than Keras.

    Hundreds of strengths change when adapters are switched.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        known = {n: tf.constant(n, "float32") for n in set(numbers)}
        for variable, number in zip(variables, numbers):
            variable.value.assign(known[number], read_value=False)
        return
    if backend == "jax":
        # Taken apart, so that each has a buffer of its own.
        numbers = list(keras.ops.convert_to_tensor(numbers, "float32"))
    for variable, number in zip(variables, numbers):
        variable.assign(number)


def multiply_add(outputs, codes, b):
    """`outputs + codes b` for a matrix b in one pass; None off PyTorch.

    TensorFlow and XLA find such sums themselves.
    """
    if keras.backend.backend() != "torch" or codes.dtype != outputs.dtype:
        return None
    import torch

    flat = outputs.reshape(-1, b.shape[1])
    codes = codes.reshape(-1, b.shape[0])
    return torch.addmm(flat, codes, b).reshape(outputs.shape)


def is_training(training) -> bool:
    """Whether a call trains; a ValueError where JAX hides it.

    `keras.RematScope` traces the arguments of what it computes anew, so that
    nothing inside can ask whether it trains (Keras's Dropout neither).
    """
    try:
        return bool(training)
    except Exception as error:
        raise ValueError(
            "This adapter does something else while training, and a "
            "`keras.RematScope` hides from it whether it trains. Expected "
            "`keras.RematScope(mode='list_of_layers', layer_names=[...])` "
            "with layers that hold no adapters, or an adapter without dropout."
        ) from error


def gradient_function(loss: Callable, variables: list[keras.Variable]):
    """A function of what `loss` takes that gives its gradients by variables.

    They may be frozen. Nothing is changed.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        def of(values, *args):
            mapping = list(zip(variables, values))
            with keras.StatelessScope(state_mapping=mapping):
                return loss(*args)

        gradient = jax.grad(of)
        return lambda *args: gradient([v.value for v in variables], *args)
    values = [v.value for v in variables]
    if backend == "tensorflow":
        import tensorflow as tf

        # In a graph: grouped convolutions have no gradient outside of one.
        @tf.function(autograph=False)
        def compute(*args):
            with tf.GradientTape() as tape:
                tape.watch(values)
                total = loss(*args)
            zero = tf.UnconnectedGradients.ZERO
            found = tape.gradient(total, values, unconnected_gradients=zero)
            return [tf.convert_to_tensor(x) for x in found]

        return compute
    return functools.partial(_torch_gradients, loss, values)


def _torch_gradients(loss, values, *args):
    import torch

    flags = [value.requires_grad for value in values]
    try:
        for value in values:
            value.requires_grad_(True)
        with torch.enable_grad():
            found = torch.autograd.grad(
                loss(*args), values, allow_unused=True, materialize_grads=True
            )
    finally:
        for value, flag in zip(values, flags):
            value.requires_grad_(flag)
    return list(found)
