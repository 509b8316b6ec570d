"""Puts one layer in another's place: the one file that knows Keras's insides.

Keras addresses a layer from many places: attributes and containers of its
owners, their trackers, PyTorch's module and parameter tables, TensorFlow's
checkpoint names, and the nodes and lists of functional graphs. Owners are
looked for in the model's own tree and in the trees of models that were met
before (`remember`); the heap is searched only for what is above a model that
has been called as a layer of another one.
"""

import contextlib
import gc
import inspect
import weakref
from collections.abc import Iterable

import keras
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.models.functional import Functional
from keras.src.ops.function import make_node_key
from keras.src.ops.node import KerasHistory
from keras.src.utils.tracking import DotNotTrackScope

from keras_spectral._internal.optimizers import renewed
from keras_spectral._internal.snapshot import Snapshot

# Models that were changed before: they may share layers with others.
_KNOWN: weakref.WeakSet = weakref.WeakSet()
# Of these attributes of a layer none holds a layer in a way that counts.
_BOOKS = (
    "_tracker",
    "_modules",
    "_torch_params",
    "optimizer",
    "_config_before",
    "build",
    "quantize",
)
_LIBRARIES = (
    "builtins keras keras_hub numpy tensorflow jax jaxlib torch collections "
    "functools inspect types weakref threading enum re"
).split()
_OPAQUE = (str, bytes, int, float, type, keras.Variable, keras.layers.Layer)
_COMPILED = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
    "_cached_spec_generate_fn",
)


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers that a layer tracks directly, in tracking order."""
    return list(layer._layers)


def hidden_holders(
    model: keras.Model, layers: Iterable[keras.layers.Layer]
) -> dict[str, list[str]]:
    """Who holds layers past Keras's trackers, where no adapter can reach.

    Looked at are functions (their closures and defaults) and plain objects
    that the model's layers hold.

    Returns:
        For the name of each layer that is held so the kinds of its holders.
    """
    wanted = {id(layer): layer for layer in layers}
    found: dict[str, list[str]] = {}
    seen: set[int] = set()

    def look(value, kind, depth):
        if kind and id(value) in wanted:
            kinds = found.setdefault(wanted[id(value)].name, [])
            if kind not in kinds:
                kinds.append(kind)
            return
        if not depth or id(value) in seen or isinstance(value, _OPAQUE):
            return
        seen.add(id(value))
        inner, kind_inside = (), kind
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list | tuple | set):
            inner = value
        elif inspect.isfunction(value):
            inner = _reached(value)
            kind_inside = f"function '{value.__name__}'"
        elif inspect.ismethod(value):
            inner = [value.__self__]
            kind_inside = f"method '{value.__name__}'"
        elif type(value).__module__.partition(".")[0] not in _LIBRARIES:
            inner = vars(value).values() if hasattr(value, "__dict__") else ()
            kind_inside = f"object of class {type(value).__name__}"
        for item in inner:
            look(item, kind_inside, depth - 1)

    for owner in all_layers(model):
        for name, value in list(vars(owner).items()):
            if name not in _BOOKS and name not in _COMPILED:
                look(value, "", 4)
    return found


def _reached(function):
    """What a function's defaults, closure and global names hold."""
    found = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            found.append(cell.cell_contents)
    names = function.__code__.co_names
    found += [v for k, v in function.__globals__.items() if k in names]
    return found


def all_layers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and everything below it, once each."""
    return list(layer._flatten_layers())


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights that a layer holds itself, not through sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def output_layers(model: keras.Model) -> list[keras.Operation]:
    """What computes a sequential or functional model's outputs."""
    if isinstance(model, keras.Sequential):
        return model.layers[-1:]
    outputs = getattr(model, "outputs", None) or []
    return [tensor._keras_history.operation for tensor in outputs]


def is_plain_graph(layer: keras.layers.Layer) -> bool:
    """Whether its configuration is that of its layers, each by itself."""
    return type(layer) in (Functional, keras.Sequential)


def set_trainable(
    layer: keras.layers.Layer, flag: bool, weights: bool | list[bool]
) -> None:
    """Sets a layer's flag and those of its own weights, not its sublayers'.

    A weight that was created as non-trainable stays so.
    """
    layer._trainable = flag
    own = layer._trainable_variables
    if isinstance(weights, bool):
        weights = [weights] * len(own)
    for variable, trainable in zip(own, weights):
        variable.trainable = trainable


def trainable_flags(layer: keras.layers.Layer) -> tuple[bool, list[bool]]:
    """What `set_trainable` would restore."""
    return layer._trainable, [v.trainable for v in layer._trainable_variables]


def config_of_shared(layer: keras.layers.Layer) -> keras.layers.Layer | dict:
    """What a `get_config` returns for a layer that others hold as well.

    While a whole model is saved, the layer itself: so Keras notes that it is
    shared, and restores the sharing. Else its configuration.
    """
    if get_global_attribute("shared_objects/id_to_config_map") is not None:
        return layer
    return keras.saving.serialize_keras_object(layer)


def build_in_place(layer: keras.layers.Wrapper, twin: int = 0) -> None:
    """Builds a wrapper so that its weights' paths lie under its base's.

    Args:
        layer: A wrapper with the name of its built base.
        twin: Number of a base whose path another one has as well (KerasHub
            has such), to keep the weights' paths apart.
    """
    base = layer.layer
    names = (base.path or base.name).split("/")[:-1]
    names += [base.name, f"adapter_{twin}"] if twin else []
    shape = (base.get_build_config() or {}).get("input_shape")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(keras.name_scope(name))
        layer.build(shape)


def take_signature(layer: keras.layers.Layer, base: keras.layers.Layer) -> None:
    """Lets a layer with a general `call` be called as another one is."""
    signature = inspect.signature(base.call)
    parameters = dict(signature.parameters)
    if "training" not in parameters:
        training = inspect.Parameter(
            "training", inspect.Parameter.KEYWORD_ONLY, default=None
        )
        parameters["training"] = training
    layer._call_signature = signature.replace(
        parameters=sorted(parameters.values(), key=lambda p: p.kind)
    )


def set_path(variable: keras.Variable, path: str) -> None:
    """Gives a new variable a path of its own."""
    variable._path = path


def takes_training(layer: keras.layers.Layer) -> bool:
    """Whether a layer's `call` has an argument `training`."""
    return bool(layer._call_has_training_arg)


def remember(model: keras.layers.Layer) -> None:
    """Lets later changes of shared layers reach this model as well."""
    _KNOWN.add(model)


def replace_layers(
    owners: list[keras.layers.Layer],
    swaps: dict[keras.layers.Layer, keras.layers.Layer],
    snapshot: Snapshot,
    renew_optimizers: bool = False,
) -> None:
    """Puts layers in the place of others, everywhere, all at once.

    Args:
        owners: What `owners` gave for a model that holds the layers.
        swaps: `{old layer: new layer}`. A new layer may own its old one.
        snapshot: Keeps what is changed, to be brought back after a failure.
        renew_optimizers: Whether models get an unbuilt copy of their built
            optimizer, which knows nothing of the old variables.
    """
    above = _owners_above(owners, swaps)
    models = [x for x in above if isinstance(x, keras.Model)]
    # All that can fail for a model's own reasons comes before any change.
    optimizers = _fresh_optimizers(models, swaps) if renew_optimizers else {}
    snapshot.keep(*above, *swaps, *swaps.values())
    mapping = {id(old): (old, new) for old, new in swaps.items()}
    swapped = {id(layer) for pair in swaps.items() for layer in pair}
    keys = {}
    for old, new in swaps.items():
        keys.update(_move_nodes(old, new, snapshot))
    for owner in owners:
        # Between a wrapper and its own base nothing is to be exchanged.
        if id(owner) not in swapped:
            _replace_in(owner, mapping, keys, snapshot)
    for owner in [*swaps.values(), *above]:
        # PyTorch's `zero_grad` and `parameters` look here.
        if hasattr(owner, "_torch_params"):
            owner._track_variables()
    for model, optimizer in optimizers.items():
        with DotNotTrackScope():
            model.optimizer = optimizer


def models_above(
    owners: list[keras.layers.Layer], layers: Iterable[keras.layers.Layer]
) -> list[keras.Model]:
    """The models among owners in whose trees one of the layers is."""
    above = _owners_above(owners, layers)
    return [x for x in above if isinstance(x, keras.Model)]


def forget_compiled(models: list[keras.Model]) -> None:
    """Drops compiled functions, which would go on running old layers."""
    for model in models:
        for name in _COMPILED:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        if hasattr(model, "_compiled_trainable_state"):
            state = {lay: lay.trainable for lay in model._flatten_layers()}
            with DotNotTrackScope():
                model._compiled_trainable_state = state


def owners(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers that may hold one of a model's: its tree, known models'."""
    roots = {id(model): model, **{id(known): known for known in list(_KNOWN)}}
    if model._inbound_nodes:
        # It has a place in another model's graph, which nothing leads to.
        for other in gc.get_objects():
            if issubclass(type(other), keras.Model):
                roots[id(other)] = other
    inside = {id(layer) for layer in model._flatten_layers()}
    found = {}
    for root in roots.values():
        tree = list(root._flatten_layers())
        if root is model or any(id(layer) in inside for layer in tree):
            found |= {id(layer): layer for layer in tree}
    return list(found.values())


def _owners_above(operations, layers):
    """All live layers in whose trees one of the layers is."""
    parents = {}
    for owner in operations:
        for child in getattr(owner, "_layers", ()):
            parents.setdefault(id(child), []).append(owner)
    above, queue = {}, list(layers)
    while queue:
        for parent in parents.get(id(queue.pop()), ()):
            if id(parent) not in above:
                above[id(parent)] = parent
                queue.append(parent)
    return list(above.values())


def _fresh_optimizers(models, swaps):
    fresh, replaced = {}, []
    for old, new in swaps.items():
        # Copies of heads train in place of the base's variables.
        replaced += vars(new).get("_pairs", ())
        replaced += [pair[::-1] for pair in vars(old).get("_pairs", ())]
    for model in models:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and optimizer.built:
            fresh[model] = renewed(optimizer, replaced)
    return fresh


def _move_nodes(old, new, snapshot):
    """Hands over the graph nodes; returns renamed node keys."""
    keys = {}
    for node in old._inbound_nodes:
        snapshot.keep(node, *node.outputs)
    new._inbound_nodes, old._inbound_nodes = old._inbound_nodes, []
    new._outbound_nodes, old._outbound_nodes = old._outbound_nodes, []
    for index, node in enumerate(new._inbound_nodes):
        keys[make_node_key(old, index)] = make_node_key(new, index)
        node.operation = new
        for tensor in node.outputs:
            _, node_index, tensor_index = tensor._keras_history
            history = KerasHistory(new, node_index, tensor_index)
            tensor._keras_history = history
    return keys


def _replace_in(owner, mapping, keys, snapshot):
    stores = [vars(owner), vars(owner).get("_modules") or {}]
    named = keys and isinstance(vars(owner).get("_nodes"), set)
    if not named and not any(_holds(list(s.values()), mapping) for s in stores):
        return
    snapshot.keep(owner)
    tracker = getattr(owner, "_tracker", None)
    if tracker is not None:
        for key in tracker.stored_ids["layers"] & mapping.keys():
            tracker.replace_tracked_value("layers", *mapping[key])
    # PyTorch keeps modules apart from the other attributes.
    for store in stores:
        for name, value in list(store.items()):
            if name in ("_tracker", "_modules"):
                continue
            swapped = _swapped(value, mapping, set())
            if swapped is not value:
                # TensorFlow and PyTorch keep books in `__setattr__`; Keras's
                # own are kept above.
                with DotNotTrackScope():
                    setattr(owner, name, swapped)
    if named:
        owner._nodes = {keys.get(key, key) for key in owner._nodes}


def _holds(value, mapping, depth=8):
    """Whether a container holds, at any depth, one of the layers."""
    if id(value) in mapping:
        return True
    if not depth or not isinstance(value, (list, dict, tuple, set)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return any(_holds(item, mapping, depth - 1) for item in items)


def _swapped(value, mapping, seen):
    """The value with layers exchanged; most containers change in place.

    Tuples are made anew, and TensorFlow's own lists and dicts, which refuse
    to be saved after a change.
    """
    if id(value) in mapping:
        return mapping[id(value)][1]
    if id(value) in seen or not isinstance(value, (list, dict, tuple, set)):
        return value
    seen.add(id(value))
    if isinstance(value, set):
        for item in [item for item in value if id(item) in mapping]:
            value.remove(item)
            value.add(mapping[id(item)][1])
        return value
    is_dict = isinstance(value, dict)
    keys = list(value) if is_dict else range(len(value))
    items = [value[key] for key in keys]
    fresh = [_swapped(item, mapping, seen) for item in items]
    if all(new is old for new, old in zip(fresh, items)):
        return value
    if isinstance(value, tuple):
        named = hasattr(value, "_fields")
        return type(value)(*fresh) if named else type(value)(fresh)
    if type(value).__module__.startswith("tensorflow."):
        return dict(zip(keys, fresh)) if is_dict else fresh
    for key, item in zip(keys, fresh):
        value[key] = item
    return value
