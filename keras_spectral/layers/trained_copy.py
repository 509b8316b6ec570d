"""TrainedCopy: layers that train beside adapters, a copy for each name."""

import keras
from keras import ops

from keras_spectral._internal.checks import is_small
from keras_spectral._internal.layer_tools import set_trainable
from keras_spectral._internal.layer_tools import take_signature
from keras_spectral._internal.layer_tools import takes_training
from keras_spectral._internal.layouts import lay_out_like
from keras_spectral._internal.twin import twin
from keras_spectral.layers.host import Host
from keras_spectral.layers.member import Member

Pairs = list[tuple[keras.Variable, keras.Variable]]


class NamedCopy(Member, keras.layers.Layer):
    """An adapter's own copy of a layer's weights.

    It is float32 where the layer has 16 bits, because steps of an optimizer
    are too small for these.

    Args:
        base: The layer, with weights of its own.
        adapter_name: The name of the adapter that it trains with.
        **kwargs: Keras layer arguments.
    """

    def __init__(
        self, base: keras.layers.Layer, adapter_name: str = "default", **kwargs
    ):
        super().__init__(name=base.name, **kwargs)
        # Past Keras's trackers: the base's weights are no weights of its own.
        vars(self)["base"] = base
        vars(self)["pairs"] = []  # (weight of the base, its copy)
        vars(self)["running"] = []  # the same of what no gradient reaches
        self.name_member(adapter_name)

    def build(self, input_shape=None):
        for trains, pairs, variables in (
            (True, self.pairs, self.base._trainable_variables),
            (False, self.running, self.base._non_trainable_variables),
        ):
            for variable in variables:
                pairs.append((variable, self._copy(variable, trains)))
        self.add_strength()
        self.retraces = bool(self.running)
        self.built = True

    def _copy(self, variable, trains):
        dtype = keras.backend.standardize_dtype(variable.dtype)
        lay_out_like(f"{self.path}/{variable.name}", variable)
        return self.add_weight(
            name=variable.name,
            shape=variable.shape,
            dtype="float32" if is_small(dtype) else dtype,
            initializer=lambda shape, dtype=None: fresh(variable, dtype),
            trainable=trains,
            autocast=getattr(variable, "_autocast", True),
            regularizer=getattr(variable, "regularizer", None),
            constraint=getattr(variable, "constraint", None),
        )


@keras.saving.register_keras_serializable("keras_spectral")
class TrainedCopy(Host):
    """A layer that trains beside adapters, as a copy for each of their names.

    With the base's weights w and the copies w_n it runs as the base with
    `(1 - sum strength_n) w + sum strength_n w_n`: with one copy at strength
    1 as that copy, with none as the base. What a call changes by itself (the
    averages of a BatchNormalization) is of the copy that trains, else of the
    first active one.

    Dropping the host brings the base back as it was, `merged_values` is what
    it would be with what was trained.

    Args:
        layer: The base, a layer with weights of its own.
        members: The copies, or `{"adapter_name": name}` for new ones.
        **kwargs: Keras layer arguments.
    """

    opens_base = True

    def __init__(self, layer, members, **kwargs):
        super().__init__(layer, **kwargs)
        take_signature(self, layer)
        self._members = [
            NamedCopy(layer, **m) if isinstance(m, dict) else m for m in members
        ]

    def members(self):
        return self._members

    def with_members(self, members):
        if not members:
            return self.layer
        host = TrainedCopy(self.layer, members)
        host.take_base_from(self)
        return host

    def build(self, input_shape=None):
        given = self._base_trainable
        super().build(input_shape)
        if any(member.built for member in self._members):
            self._base_trainable = given  # another host has frozen it
        for member in self._members:
            if not member.built:
                member.build()

    def freeze_base(self):
        set_trainable(self.layer, False, False)

    def call(self, *args, training=None, **kwargs):
        if takes_training(self.layer):
            kwargs["training"] = training
        mixed = [m for m in self._members if m.batch_rows is not None]
        if not mixed:
            base = self._running_as(self._values(), self._live())
            return self.run_base(base, *args, **kwargs)
        outputs = self.run_base(self._running_as({}, None), *args, **kwargs)
        for member in mixed:
            base = self._running_as(_copies(member), None)
            own = self.run_base(base, *args, **kwargs)
            outputs = keras.tree.map_structure(
                member.where_chosen, own, outputs
            )
        return outputs

    def _values(self):
        """For each trained weight of the base the mean that stands for it."""
        strengths = [m.adapter_strength for m in self._members]
        rest = 1.0 - sum(ops.convert_to_tensor(s) for s in strengths)
        values = {}
        for i, (variable, first) in enumerate(self._members[0].pairs):
            copies = [m.pairs[i][1] for m in self._members]
            total = _share(rest, variable, first.dtype)
            for strength, copy in zip(strengths, copies):
                total = total + _share(strength, copy, first.dtype)
            # Variables are cast by Keras where a layer computes in less.
            if getattr(variable, "_autocast", True) and _is_float(variable):
                total = ops.cast(total, self.layer.compute_dtype)
            values[id(variable)] = total
        return values

    def _live(self):
        """Whose running values a call reads and changes; None: the base's."""
        active = [m for m in self._members if not m.is_off]
        trained = [m for m in active if m.trainable]
        return next(iter(trained + active), None)

    def _running_as(self, values, live):
        """The base with other values for its weights."""
        running = {} if live is None else live.running
        values = {**values, **{id(v): copy for v, copy in running}}
        changes = {
            name: exchanged(value, values)
            for name, value in vars(self.layer).items()
            if not name.startswith(("_trainable_v", "_non_trainable_v"))
        }
        changes["activity_regularizer"] = None
        changes["_trainable"] = live is not None and live.trainable
        if is_small(self.layer.variable_dtype):
            # Or the float32 copies would make float32 outputs.
            policy = f"mixed_{self.layer.compute_dtype}"
            changes["_dtype_policy"] = keras.DTypePolicy(policy)
        return twin(self.layer, **changes)

    def forwarded(self, base, name):
        members = vars(self).get("_members") or []
        if not members or not all(m.built for m in members):
            return getattr(base, name)
        try:
            strengths = [m.current_strength() for m in members]
        except Exception:  # within a graph, where there is no number yet
            return getattr(self._running_as(self._values(), None), name)
        on = [m for m, s in zip(members, strengths) if s]
        if on and (len(on) > 1 or on[0].current_strength() != 1):
            return getattr(self._running_as(self._values(), None), name)
        # Whole, as variables that can be assigned.
        values = _copies(on[0]) if on else {}
        return getattr(self._running_as(values, (*on, None)[0]), name)

    def merged_values(self, members=None):
        """As of all hosts, with what was trained; nothing is lost."""
        members = self._members if members is None else members
        strengths = [m.current_strength() for m in members]
        values = []
        for i, (variable, first) in enumerate(self._members[0].pairs):
            total = _share(1.0 - sum(strengths), variable, first.dtype)
            for strength, member in zip(strengths, members):
                copy = member.pairs[i][1]
                total = total + _share(strength, copy, first.dtype)
            values.append((variable, ops.cast(total, variable.dtype)))
        live = next((m for m, s in zip(members, strengths) if s), None)
        for variable, copy in live.running if live is not None else ():
            values.append((variable, fresh(copy, variable.dtype)))
        return values, 0.0

    def get_config(self):
        members = [{"adapter_name": m.adapter_name} for m in self._members]
        return {**super().get_config(), "members": members}


def fresh(variable, dtype):
    """A variable's value in a buffer of its own, as JAX wants for each."""
    return ops.copy(ops.cast(variable, dtype))


def _copies(member):
    return {id(variable): copy for variable, copy in member.pairs}


def _is_float(variable):
    return "float" in keras.backend.standardize_dtype(variable.dtype)


def _share(strength, variable, dtype):
    """Strength times a weight, zero where it is off, even of NaN."""
    strength = ops.cast(strength, dtype)
    value = ops.cast(variable, dtype)
    zero = ops.zeros((), dtype)
    return ops.where(ops.not_equal(strength, 0), value * strength, zero)


def exchanged(value, mapping):
    """A value, or a plain container of values, with some exchanged."""
    if id(value) in mapping:
        return mapping[id(value)]
    if isinstance(value, dict):
        changed = {k: exchanged(v, mapping) for k, v in value.items()}
        same = all(changed[k] is v for k, v in value.items())
        return value if same else changed
    if isinstance(value, list | tuple):
        items = [exchanged(item, mapping) for item in value]
        if all(new is old for new, old in zip(items, value)):
            return value
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return items if isinstance(value, list) else tuple(items)
    return value
