"""What Keras offers no way to do: the one file that imports a backend."""

import contextlib
import functools
from collections.abc import Callable

import keras
import numpy as np

_FEW = 128  # columns; to turn round more of them costs what it saves


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


def read_checkpoint(file) -> dict:
    """The tensors of a PyTorch checkpoint as arrays, on any backend.

    Args:
        file: A path or an open file, of weights alone.
    """
    import torch

    stored = torch.load(file, weights_only=True)
    return {name: tensor.numpy() for name, tensor in stored.items()}


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


def number_in(variable) -> float | int:
    """The number in a scalar variable, of one replica where there are more."""
    return keras.ops.convert_to_numpy(variable).item()


def to_numpy(value) -> np.ndarray:
    """An array of a tensor or variable, a float32 one of any floats.

    Where JAX's processes hold parts of it they are gathered: then all of them
    have to call this.
    """
    value = keras.ops.cast(value, "float32")
    if keras.backend.backend() == "jax":
        from jax.experimental import multihost_utils

        if not (value.is_fully_addressable or value.is_fully_replicated):
            value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(keras.ops.convert_to_numpy(value), order="C")


def is_first_process() -> bool:
    """Whether it is the only process or JAX's first one."""
    if keras.backend.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0


def over_replicas(tensors: list) -> list:
    """Sums over the replicas of a TensorFlow strategy; else as they are."""
    if keras.backend.backend() != "tensorflow":
        return tensors
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, list(tensors))


def is_on(strength: keras.Variable) -> bool | None:
    """Whether a strength is not 0, where Python can know without a wait.

    PyTorch runs eagerly: what is off is left out there. Its answer is kept
    until the variable is assigned again, because a look at a number makes a
    GPU stop. A compiled step, as of the other backends, is not traced again
    for another strength, so there the answer is None.
    """
    if keras.backend.backend() != "torch":
        return None
    import torch

    value = strength.value
    if torch.compiler.is_compiling() or value.device.type == "meta":
        return None
    known = (id(value), value._version)
    if vars(strength).get("_known", (None, None))[0] != known:
        strength._known = (known, bool(value.detach() != 0))
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


def thin_product(inputs, matrix):
    """`inputs matrix` for a matrix (n, m) with one short side.

    The same product everywhere, in the shapes whose gradients processors
    compute fast: of rows, not of more axes, which takes XLA up to 70 times
    as long; and see `thin_factor`.
    """
    ops, (n, m) = keras.ops, matrix.shape
    few = m <= min(n, _FEW)
    if keras.backend.backend() == "torch":
        if few and _on_cpu(inputs, matrix):
            import torch

            return torch.nn.functional.linear(inputs, matrix.T.contiguous())
        return ops.matmul(inputs, matrix)
    if few:
        matrix = thin_factor(matrix)
    product = ops.matmul(ops.reshape(inputs, (-1, n)), matrix)
    return ops.reshape(product, (*ops.shape(inputs)[:-1], m))


def _on_cpu(x, y):
    """Whether both are PyTorch's tensors of one dtype, on the processor."""
    import torch

    both = isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)
    return both and x.dtype == y.dtype and y.device.type == "cpu"


def thin_factor(a):
    """A factor A (.., r) of few columns, as it is, to multiply inputs x.

    Its gradient `x^T g` is the transpose of `g^T x`, which takes XLA a tenth
    of the time on CPUs, and behind a barrier it cannot turn that round.
    """
    if keras.backend.backend() != "jax":
        return a
    import jax

    # Before 0.6 barriers have no gradients.
    if jax.default_backend() != "cpu" or jax.__version_info__ < (0, 6):
        return a
    turned = jax.lax.optimization_barrier(keras.ops.moveaxis(a, -1, 0))
    return keras.ops.moveaxis(turned, 0, -1)


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

    `keras.RematScope` traces the arguments of what it computes again, so that
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

    def compute(*args):
        along = _of_tensorflow if backend == "tensorflow" else _of_torch
        return along(lambda: (loss(*args), None), values)[2]

    if backend == "torch":
        return compute
    import tensorflow as tf

    # In a graph: grouped convolutions have no gradient outside of one.
    return tf.function(compute, autograph=False)


def value_and_gradients(
    function: Callable,
    variables: list[keras.Variable],
    others: list[keras.Variable],
) -> tuple:
    """A loss, what comes with it, and the loss's gradients by variables.

    For training steps: what the function assigns stays assigned, within
    traced steps as well.

    Args:
        function: Of no arguments; returns the loss and anything else.
        variables: They may be frozen.
        others: All variables that the function reads or assigns besides.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        return _of_jax(function, variables, others)
    along = _of_tensorflow if backend == "tensorflow" else _of_torch
    return along(function, [v.value for v in variables])


def _of_tensorflow(function, values):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(values)
        loss, rest = function()
    zero = tf.UnconnectedGradients.ZERO
    found = tape.gradient(loss, values, unconnected_gradients=zero)
    return loss, rest, [tf.convert_to_tensor(x) for x in found]


def _of_torch(function, values):
    import torch

    flags = [value.requires_grad for value in values]
    try:
        for value in values:
            value.requires_grad_(True)
        with torch.enable_grad():
            loss, rest = function()
            found = torch.autograd.grad(
                loss, values, allow_unused=True, materialize_grads=True
            )
    finally:
        for value, flag in zip(values, flags):
            value.requires_grad_(flag)
    rest = keras.tree.map_structure(
        lambda x: None if x is None else x.detach(), rest
    )
    return loss.detach(), rest, list(found)


def _of_jax(function, variables, others):
    import jax

    chosen = {id(v) for v in variables}
    others = [v for v in others if id(v) not in chosen]
    before = [v.value for v in others]

    def of(values):
        mapping = [*zip(variables, values), *zip(others, before)]
        with keras.StatelessScope(mapping, collect_losses=True) as scope:
            loss, rest = function()
        return loss, (rest, [scope.get_current_value(v) for v in others])

    values = [v.value for v in variables]
    (loss, (rest, after)), found = jax.value_and_grad(of, has_aux=True)(values)
    for variable, value in zip(others, after):
        variable.assign(value)
    return loss, rest, list(found)


def on_state(step: Callable, groups: list[list], state: tuple) -> tuple:
    """A step of a JAX trainer, written with assignments to variables.

    Args:
        step: Of no arguments; returns logs.
        groups: The variables of each part of the state.
        state: Their values.

    Returns:
        The logs and the new state.
    """
    mapping = [
        pair for group, part in zip(groups, state) for pair in zip(group, part)
    ]
    with keras.StatelessScope(mapping) as scope:
        logs = step()
    after = ([scope.get_current_value(v) for v in group] for group in groups)
    return logs, tuple(after)


def inference_of(layer: keras.layers.Layer, inputs) -> Callable[[], None]:
    """A function that runs a compiled layer on inputs and waits for the end."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        weights = [v.value for v in layer.trainable_variables]
        others = [v.value for v in layer.non_trainable_variables]
        run = jax.jit(lambda *args: layer.stateless_call(*args)[0])
        return lambda: jax.block_until_ready(run(weights, others, inputs))
    if backend == "tensorflow":
        import tensorflow as tf

        run = tf.function(lambda x: layer(x), autograph=False)
        return lambda: run(inputs).numpy()
    import torch

    def run():
        with torch.no_grad():
            layer(inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    return run


def symmetric_eigen(
    matrix: np.ndarray, vectors: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """The eigenvalues, ascending, of a numpy matrix, and eigenvectors if asked.

    In float32 numpy takes as long as in float64, PyTorch half of it.
    """
    if keras.backend.backend() != "torch" or matrix.dtype != "float32":
        if vectors:
            return np.linalg.eigh(matrix)
        return np.linalg.eigvalsh(matrix), None
    import torch

    matrix = torch.from_numpy(matrix)
    if vectors:
        return tuple(x.numpy() for x in torch.linalg.eigh(matrix))
    return torch.linalg.eigvalsh(matrix).numpy(), None


def release(variable: keras.Variable) -> None:
    """Frees the memory of a variable that nobody reads until `refill`."""
    if keras.backend.backend() == "torch":
        variable.value.data = variable.value.data.new_empty(0)
    else:
        variable._value = None


def refill(variable: keras.Variable, other: keras.Variable) -> None:
    """Gives a released variable the numbers of another one."""
    value = keras.ops.copy(other)
    if keras.backend.backend() == "torch":
        variable.value.data = value.detach()
    else:
        variable._initialize(value)


def solve_positive(matrix, right):
    """`matrix^-1 right` where the symmetric part of matrices is positive.

    Not by LAPACK on JAX: on machines of few cores its batched calls in one
    compiled step wait for each other for ever.
    """
    if keras.backend.backend() != "jax":
        return keras.ops.solve(matrix, right)
    return keras.ops.matmul(_jax_inverse()(matrix), right)


@functools.cache
def _jax_inverse():
    """Gauss-Jordan elimination, which needs no pivots here, and one step of
    Newton's method for what rounding took."""
    import jax
    import jax.numpy as jnp

    def eliminate(k, matrix):
        unit = jax.nn.one_hot(k, matrix.shape[-1], dtype=matrix.dtype)
        row, column = unit @ matrix, matrix @ unit
        scaled = (row + unit) / (row @ unit)[..., None]
        return matrix - (column - unit)[..., :, None] * scaled[..., None, :]

    @jax.custom_vjp
    def inverse(matrix):
        found = jax.lax.fori_loop(0, matrix.shape[-1], eliminate, matrix)
        return found + found @ (jnp.eye(matrix.shape[-1]) - matrix @ found)

    def forward(matrix):
        found = inverse(matrix)
        return found, found

    def backward(found, gradient):
        turned = jnp.swapaxes(found, -1, -2)
        return (-turned @ gradient @ turned,)

    inverse.defvjp(forward, backward)
    return inverse
