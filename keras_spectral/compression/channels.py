"""Structured pruning: whole units and filters go, and what they feed."""

import keras
import numpy as np
from keras import layers
from keras import ops

from keras_spectral.compression.choice import chosen_places
from keras_spectral.compression.masks import KeepZeros
from keras_spectral.compression.masks import hold
from keras_spectral.compression.saved import copy_model
from keras_spectral.compression.sparsity import most_important
from keras_spectral.kernels import kernel_view
from keras_spectral.model import surgery
from keras_spectral.model.select import Target

_CONV = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
# What leaves channels apart and in their places.
_PASS = (
    layers.Activation,
    layers.ReLU,
    layers.LeakyReLU,
    layers.ELU,
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianNoise,
    layers.GaussianDropout,
    layers.Identity,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.MaxPooling3D,
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
)


def without_channels(
    model: keras.Model,
    share: float,
    target: Target | None,
    exclude: Target | None,
) -> keras.Model:
    """A smaller copy of a sequential or functional model; see `prune_model`."""
    if not isinstance(model, keras.Model) or not surgery.is_plain_graph(model):
        raise ValueError(
            f"Received a {type(model).__name__}. Expected a sequential or "
            "functional model: of others it is not known which layer reads "
            "which channels. 'magnitude' prunes any model."
        )
    chosen = chosen_places(model, target or _can_shrink, exclude, False)
    graph = _Graph(model)
    cuts = _Cuts()
    for place in chosen:
        try:
            reached = graph.reached(place.layer)
        except ValueError as error:
            if target is None:
                continue
            raise ValueError(f"At '{place.path}': {error}") from error
        cuts.add(place.layer, _kept(place.layer, share), reached)
    if not cuts.outputs:
        raise ValueError(
            f"No channels of model '{model.name}' can be removed: those of "
            "every layer are outputs, or are read by layers that need all of "
            "them. 'magnitude' prunes any model."
        )
    return _rebuilt(model, cuts)


class _Cuts:
    """The channels that stay, by the names of layers."""

    def __init__(self):
        self.outputs, self.inputs, self.norms = {}, {}, {}

    def add(self, layer, kept, reached):
        self.outputs[layer.name] = kept
        for norm in reached["norms"]:
            self.norms[norm.name] = kept
        for reader, times in reached["readers"]:
            channels = layer.kernel.shape[-1]
            steps = channels * np.arange(times)[:, None]
            self.inputs[reader.name] = (steps + kept).ravel()


class _Graph:
    """Who reads what each layer gives, within one model."""

    def __init__(self, model):
        self.ends = {id(x) for x in surgery.output_layers(model)}
        self.readers, self.times = {}, {}
        for source, reader, shape in surgery.calls(model):
            self.readers.setdefault(id(source), []).append((reader, shape))
            self.times[id(reader)] = self.times.get(id(reader), 0) + 1

    def reached(self, layer):
        """Norms and layers that read a layer's channels.

        Raises:
            ValueError: They are outputs, or read by a layer that is not known
                to keep them apart.
        """
        _check_producer(layer)
        self._check_once(layer)
        found = {"norms": [], "readers": []}
        queue = [(layer, 1)]
        while queue:
            source, times = queue.pop()
            if id(source) in self.ends:
                raise ValueError(
                    "Its channels are the model's outputs. Expected a layer "
                    "that others read: leave it out."
                )
            for reader, shape in self.readers.get(id(source), ()):
                if _is_norm(reader, shape):
                    self._check_once(reader)
                    found["norms"].append(reader)
                    queue.append((reader, times))
                elif _absorbs(reader):
                    self._check_once(reader)
                    found["readers"].append((reader, times))
                elif type(reader) is layers.Flatten and None not in shape[1:]:
                    positions = int(np.prod(shape[1:-1]))
                    queue.append((reader, times * positions))
                elif type(reader) in _PASS and not _mixes(reader):
                    queue.append((reader, times))
                else:
                    raise ValueError(
                        f"Its channels are read by '{reader.name}' "
                        f"({type(reader).__name__}), which may mix them, or "
                        "need all. Expected Dense, Conv, BatchNormalization, "
                        "activations, pooling, dropout and Flatten "
                        "behind it: leave the layer out."
                    )
        return found

    def _check_once(self, layer):
        times = self.times.get(id(layer), 0)
        if times > 1:
            raise ValueError(
                f"'{layer.name}' is used {times} times. Expected layers that "
                "are used once: leave it out."
            )


def _can_shrink(layer):
    return layer.built and isinstance(layer, (layers.Dense, *_CONV))


def _check_producer(layer):
    if type(layer) not in (layers.Dense, *_CONV) or not _absorbs(layer):
        raise ValueError(
            f"It is a {type(layer).__name__}, possibly with groups or with "
            "channels first. Expected a Dense, Conv1D, Conv2D or Conv3D with "
            "channels last."
        )
    if _mixes(layer):
        raise ValueError("Its softmax needs all channels: leave it out.")


def _mixes(layer):
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", "") in ("softmax", "log_softmax")


def _absorbs(layer):
    """Whether a layer's kernel has a row for each input channel."""
    if type(layer) is layers.Dense:
        return True
    last = getattr(layer, "data_format", "") == "channels_last"
    return type(layer) in _CONV and layer.groups == 1 and last


def _is_norm(layer, shape):
    kind = layers.BatchNormalization
    return type(layer) is kind and layer.axis in (-1, len(shape) - 1)


def _kept(layer, share):
    """Numbers of the channels with the largest L1 norms, at least one."""
    kernel = ops.convert_to_numpy(layer.kernel)
    norms = np.abs(kernel).reshape(-1, kernel.shape[-1]).sum(axis=0)
    kept = np.flatnonzero(most_important(norms, share))
    return kept if kept.size else np.array([norms.argmax()])


def _rebuilt(model, cuts):
    """The model that Keras makes of a configuration with fewer channels."""
    whole = copy_model(model)
    config = whole.get_config()
    for entry in config["layers"]:
        entry.pop("build_config", None)
        options = entry["config"]
        if options.get("name") in cuts.outputs:
            size = len(cuts.outputs[options["name"]])
            options["units" if "units" in options else "filters"] = size
        constraint = options.get("kernel_constraint")
        if _is_mask(constraint):
            inner = constraint["config"]["constraint"]
            options["kernel_constraint"] = inner
    classes = {type(layer).__name__: type(layer) for layer in whole.layers}
    small = type(whole).from_config(config, classes)
    if not small.built:
        small.build(config.get("build_input_shape"))
    for old in whole.layers:
        _copy_weights(old, small.get_layer(old.name), cuts)
        small.get_layer(old.name).trainable = old.trainable
    return small


def _is_mask(constraint):
    known = isinstance(constraint, dict)
    return known and constraint.get("class_name") == KeepZeros.__name__


def _copy_weights(old, new, cuts):
    values = [ops.convert_to_numpy(w) for w in old.weights]
    if old.name in cuts.norms:
        values = [value[cuts.norms[old.name]] for value in values]
    elif old.name in cuts.inputs or old.name in cuts.outputs:
        values = [_cut(value, old.name, cuts) for value in values]
    new.set_weights(values)
    constraint = getattr(old, "kernel_constraint", None)
    if isinstance(constraint, KeepZeros):
        hold(kernel_view(new), _cut(constraint.mask, old.name, cuts))


def _cut(value, name, cuts):
    """The part of a kernel or a bias that stays."""
    if name in cuts.outputs:
        value = np.take(value, cuts.outputs[name], axis=-1)
    if name in cuts.inputs and value.ndim > 1:
        value = np.take(value, cuts.inputs[name], axis=-2)
    return value
