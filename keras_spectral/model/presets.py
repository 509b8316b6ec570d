"""The words that stand for layers to wrap, such as `"attention"`."""

import keras

from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.blocks.kinds import block_kind
from keras_spectral.kernels import LowRank
from keras_spectral.kernels.norm import is_norm
from keras_spectral.kernels.norm import scale_name
from keras_spectral.layers import BitFit
from keras_spectral.layers import LoRAExperts
from keras_spectral.layers import LoRARecurrent
from keras_spectral.layers.adapter import AdapterLayer
from keras_spectral.layers.ia3 import FEED_FORWARD_OUTPUT
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model.hints import ATTENTION
from keras_spectral.model.hints import KEY_VALUE
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places
from keras_spectral.model.paths import subject
from keras_spectral.model.surgery import output_layers

_LINEAR = (keras.layers.Dense, keras.layers.EinsumDense)


_CONV = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def adaptable(
    candidates: list[Place], adapter: type[AdapterLayer] = KernelAdapter
) -> list[Place]:
    """The places whose layers an adapter class fits."""
    fitting = [p for p in candidates if fits(adapter, subject(p.layer))]
    # Some models hold layers that they never build nor call.
    return [p for p in fitting if subject(p.layer).built] or fitting


def outside_backbone(model, candidates: list[Place]) -> list[Place]:
    """The weight-holding places of a task model outside of its backbone."""
    backbone = getattr(model, "backbone", None)
    # Some KerasHub backbones hold another one, which makes them no tasks.
    if not isinstance(backbone, keras.layers.Layer) or is_backbone(model):
        return []
    inside = {id(place.layer) for place in places(backbone)} | {id(backbone)}
    return [
        place
        for place in candidates
        if id(place.layer) not in inside
        and (
            own_variables(place.layer)
            or isinstance(place.layer, LowRank | TrainedCopy)
        )
    ]


def first_half(layer):
    """The layer that takes the input: of a factorised one its first half."""
    base = subject(layer)
    return base.down if isinstance(base, LowRank) else base


def fits(adapter, layer):
    try:
        adapter.check_base(layer)
        if layer.built:
            adapter.view_of(layer)
    except ValueError:
        return False
    return True


def _attention(model, candidates):
    """Query and value projections of every attention layer."""
    return [
        place
        for place in candidates
        if isinstance(first_half(place.layer), (*_LINEAR, *_CONV))
        and ATTENTION.fullmatch(place.layer.name)
    ]


def _key_value_ffn(model, candidates):
    """Key and value projections, and second layers of feed-forward nets."""
    return [
        place
        for place in candidates
        if isinstance(first_half(place.layer), (*_LINEAR, *_CONV))
        and (
            KEY_VALUE.fullmatch(place.layer.name)
            or FEED_FORWARD_OUTPUT.fullmatch(subject(place.layer).path or "")
        )
    ]


def _all_linear(model, candidates):
    """Every Dense and EinsumDense but heads."""
    heads = {id(p.layer) for p in outside_backbone(model, candidates)}
    if not hasattr(model, "backbone") and not is_backbone(model):
        heads |= {id(layer) for layer in output_layers(model)}
    return [
        place
        for place in candidates
        if isinstance(first_half(place.layer), _LINEAR)
        and id(place.layer) not in heads
    ]


def _conv(model, candidates):
    return [p for p in candidates if isinstance(first_half(p.layer), _CONV)]


def _all(model, candidates):
    """Every layer that a view covers; tied ones go for all presets."""
    return adaptable(candidates)


def _biases(model, candidates):
    """Every layer with a bias, and norms with a shift."""
    built = [p for p in candidates if subject(p.layer).built]
    return [p for p in built if fits(BitFit, subject(p.layer))]


def _norms(model, candidates):
    """Every norm with a scale."""
    found = [p for p in candidates if is_norm(subject(p.layer))]
    return [p for p in found if scale_name(subject(p.layer))]


def _experts(model, candidates):
    return [p for p in candidates if fits(LoRAExperts, subject(p.layer))]


def _recurrent(model, candidates):
    return [p for p in candidates if fits(LoRARecurrent, subject(p.layer))]


def _blocks(model, candidates):
    """Transformer blocks, and attention layers that stand in none."""
    chosen = []
    for place in candidates:
        inside = chosen and place.path.startswith(f"{chosen[-1].path}/")
        if block_kind(subject(place.layer)) is not None and not inside:
            chosen.append(place)
    return chosen


def _backbone(model, candidates):
    """The backbone of a task model."""
    backbone = getattr(model, "backbone", None)
    return [p for p in candidates if subject(p.layer) is subject(backbone)]


PRESETS = {
    "attention": _attention,
    "backbone": _backbone,
    "blocks": _blocks,
    "key-value-ffn": _key_value_ffn,
    "all-linear": _all_linear,
    "conv": _conv,
    "biases": _biases,
    "norms": _norms,
    "experts": _experts,
    "recurrent": _recurrent,
    "all": _all,
}


def is_backbone(model):
    return any(c.__name__ == "Backbone" for c in type(model).__mro__)
