"""Puts one layer in another's place: the one file that knows Keras's insides.

Keras addresses a layer from many places: attributes and containers of its
owners, their trackers, PyTorch's module and parameter tables, TensorFlow's
checkpoint names, and the nodes and lists of functional graphs. Owners are
looked for in the model's own tree and in the trees of models that were met
before (`remember`); the heap is searched only for what is above a model that
has been called as a layer of another one.
"""

import gc
import weakref
from collections.abc import Iterable

import keras
from keras.src.models.functional import Functional
from keras.src.ops.function import make_node_key
from keras.src.ops.node import KerasHistory
from keras.src.utils.tracking import DotNotTrackScope

from keras_spectral._internal.layer_tools import set_path
from keras_spectral._internal.optimizers import renewed
from keras_spectral._internal.snapshot import Snapshot
from keras_spectral.layers.host import Host
from keras_spectral.layers.member import own_weights

# Models that were changed before: they may share layers with others.
_KNOWN: weakref.WeakSet = weakref.WeakSet()
COMPILED = (
    "train_function",
    "test_function",
    "predict_function",
    "generate_function",
    "_cached_spec_generate_fn",
)


def output_layers(model: keras.Model) -> list[keras.Operation]:
    """The operations that compute the outputs of a model with a graph."""
    if isinstance(model, keras.Sequential):
        return model.layers[-1:]
    outputs = getattr(model, "outputs", None) or []
    return [tensor._keras_history.operation for tensor in outputs]


def is_plain_graph(layer: keras.layers.Layer) -> bool:
    """Whether its configuration is that of its layers, each by itself."""
    return type(layer) in (Functional, keras.Sequential)


def calls(model: keras.Model) -> list[tuple]:
    """Each call of an operation in a plain graph, `(source, reader, shape)`.

    The reader is given a tensor of that shape which the source made.
    """
    graph = model._functional if type(model) is keras.Sequential else model
    return [
        (tensor._keras_history.operation, operation, tensor.shape)
        for operation in graph.operations
        for index, node in enumerate(operation._inbound_nodes)
        if make_node_key(operation, index) in graph._nodes
        for tensor in node.input_tensors
    ]


def build_in_place(
    member: keras.layers.Layer, base: keras.layers.Layer, twin: int = 0
) -> None:
    """Builds a member so that its weights' paths lie under its base's.

    They are `base's path/adapter's name/weight`.

    Args:
        member: A member of a host, with the base's name.
        base: The base, built.
        twin: Number of a base whose path another one has as well (KerasHub
            has such), to keep the weights' paths apart.
    """
    member.build((base.get_build_config() or {}).get("input_shape"))
    parts = [base.path or base.name, *([f"adapter_{twin}"] if twin else [])]
    start = f"{member.name}/"
    for variable in _with_strength(member):
        rest = variable.path.removeprefix(start)
        path = "/".join([*parts, member.adapter_name, rest])
        set_path(variable, path)


def rename_member(member: keras.layers.Layer, name: str) -> None:
    """Gives a member another adapter's name, in its weights' paths as well."""
    for variable in _with_strength(member):
        parts = variable.path.split("/")
        if member.adapter_name in parts:
            place = len(parts) - 1 - parts[::-1].index(member.adapter_name)
            parts[place] = name
            set_path(variable, "/".join(parts))
    member.adapter_name = name


def _with_strength(member):
    return [*own_weights(member), member.adapter_strength]


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
        for name in COMPILED:
            if getattr(model, name, None) is not None:
                setattr(model, name, None)
        _note_flags(model)


def training_state(model: keras.Model) -> tuple:
    """A model's optimizer, and the compiled functions that belong to it."""
    names = COMPILED if keras.backend.backend() == "jax" else COMPILED[:1]
    functions = {name: getattr(model, name, None) for name in names}
    return getattr(model, "optimizer", None), functions


def set_training_state(model: keras.Model, optimizer, functions: dict) -> None:
    """Gives a model what `training_state` gave, or fresh functions."""
    names = COMPILED if keras.backend.backend() == "jax" else COMPILED[:1]
    for name in names:
        if hasattr(model, name):
            setattr(model, name, functions.get(name))
    if getattr(model, "optimizer", None) is not optimizer:
        with DotNotTrackScope():
            model.optimizer = optimizer
    _note_flags(model)


def _note_flags(model):
    """Tells Keras that the flags are those that it compiled with."""
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
            # One that failed in its making, or is in it, has no layers yet.
            if issubclass(type(other), keras.Model) and hasattr(
                other, "_layers"
            ):
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
        replaced += _pairs(new)
        replaced += [pair[::-1] for pair in _pairs(old)]
    for model in models:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and optimizer.built:
            fresh[model] = renewed(optimizer, replaced)
    return fresh


def _pairs(host):
    """The base's variables and the copies that train for them."""
    members = host.members() if isinstance(host, Host) else ()
    return [p for m in members for p in vars(m).get("pairs", ())]


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
                # TensorFlow and PyTorch register values in `__setattr__`;
                # Keras's own registers are updated above.
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

    Tuples are made again, and TensorFlow's own lists and dicts, which refuse
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
