"""Wraps every linear layer of many real architectures, and takes all back."""

import re

import keras
import numpy as np
import pytest
from hub_models import APPLICATIONS
from hub_models import MODELS
from keras import ops

import keras_spectral as ks
from keras_spectral.model.hosts import adapter_places

# Layers that a model holds but does not use for its outputs, or that no
# gradient reaches: their adapters cannot learn. By pattern of paths.
UNREACHED = {
    "gemma3n_backbone": r".*(per_layer).*",
    "moonshine_backbone": r".*/(key|query)",
    "deeplab_v3_backbone": r".*stack3_block0_.*",
    "bert_masked_lm": r".*pooled_dense",
    "depth_anything_backbone": r".*fusion_stage_0/residual_layer1/.*",
    "blip2_backbone": r".*",
}
# KerasHub's SAM is for inference, and one of its outputs has a batch of its
# own; RQ-VAE moves its code book by itself.
NO_FIT = {"sam_image_segmenter", "sam_backbone", "rqvae_backbone"}
# On PyTorch the sum has another memory layout or alignment than the base's
# output, and the next kernel rounds otherwise (in Flux not on every run).
OTHER_LAYOUT = {
    "flux_backbone",
    "gemma3_vision_backbone",
    "stable_diffusion_3_backbone",
}


# PyTorch, which compiles nothing, runs all models; the others these, one for
# each way in which layers are held, called or shaped. The two tasks hold the
# backbones of BERT and GPT-2.
EVERYWHERE = {
    f"{name}_backbone"
    for name in """
    cspnet deberta_v3 gemma3n mixtral t5 vit whisper xlnet
    """.split()
} | {"bert_text_classifier", "gpt2_causal_lm", "mobilenet_v2"}

# On TensorFlow these train compiled, the others eagerly.
COMPILED = {
    "bert_text_classifier",
    "cspnet_backbone",  # groups have no gradients where it runs eagerly
    "gpt2_causal_lm",
    "mobilenet_v2",
}


def _cases():
    backend = keras.backend.backend()
    for case in MODELS + APPLICATIONS:
        wanted = backend == "torch" or case.name in EVERYWHERE
        if wanted and backend in case.backends:
            marks = [pytest.mark.compiled] * (case.name in COMPILED)
            yield pytest.param(case, id=case.name, marks=marks)


def test_the_short_list_names_models():
    names = {case.name for case in MODELS + APPLICATIONS}
    assert names >= EVERYWHERE and len(EVERYWHERE) == 11


def _outputs(model, case):
    outputs = keras.tree.flatten(model(case.inputs(), training=False))
    return [ops.convert_to_numpy(ops.cast(x, "float32")) for x in outputs]


def _error(got, expected):
    return max(
        np.abs(a - b).max() / max(1.0, np.abs(b).max())
        for a, b in zip(got, expected)
    )


def _randomize(model, size):
    rng = np.random.default_rng(3)
    for place in adapter_places(model):
        for weight in place.layer.trainable_weights:
            weight.assign(rng.normal(0, size, weight.shape))


def _fit_once(model, case):
    rng = np.random.default_rng(4)
    x = case.inputs()
    y = keras.tree.map_structure(
        lambda t: rng.normal(size=t.shape).astype("float32"),
        model(x, training=False),
    )
    # KerasHub's tasks keep an accuracy that does not fit a regression.
    kind = "metrics" if "image" in case.name else "weighted_metrics"
    is_task = any(c.__name__ == "Task" for c in type(model).__mro__)
    metrics = {kind: ["mse"]} if is_task else {}
    model.compile(
        optimizer=keras.optimizers.Adam(1e-2),
        loss=lambda y, p: ops.mean((ops.cast(p, "float32") - y) ** 2),
        # TensorFlow's graphs alone start faster than XLA on top of them.
        jit_compile=False
        if keras.backend.backend() == "tensorflow"
        else "auto",
        **metrics,
    )
    model.fit(x, y, batch_size=2, verbose=0)


# KerasHub's models have warnings of their own.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", list(_cases()))
def test_wrap_train_save_and_take_back(case, tmp_path):
    model = case.make()
    plain = _outputs(model, case)
    model.save_weights(tmp_path / "base.weights.h5")
    base = {id(w): w.numpy() for w in model.weights}

    ks.wrap_model(model, "lora", target="all", rank=1, trainable=[])
    limit = 1e-5 if case.name in OTHER_LAYOUT else 0
    assert _error(_outputs(model, case), plain) <= limit

    # Deep networks with random weights die or blow up at larger changes.
    size = 0.002 if case in APPLICATIONS else 0.02
    _randomize(model, size)
    if case.name not in NO_FIT:
        before = {id(w): w.numpy() for w in model.trainable_weights}
        _fit_once(model, case)
        assert not [
            weight.path
            for place in adapter_places(model)
            for weight in place.layer.trainable_weights
            if np.array_equal(weight.numpy(), before[id(weight)])
            and not re.fullmatch(UNREACHED.get(case.name, ""), place.path)
        ]
    assert not [
        w.path
        for w in model.weights
        if id(w) in base and not np.array_equal(w.numpy(), base[id(w)])
    ]

    adapted = _outputs(model, case)
    model.save_weights(tmp_path / "wrapped.weights.h5")
    _randomize(model, 0.2)
    model.load_weights(tmp_path / "wrapped.weights.h5")
    assert _error(_outputs(model, case), adapted) == 0

    with ks.unwrapped(model):
        model.load_weights(tmp_path / "base.weights.h5")
        assert _error(_outputs(model, case), plain) == 0
        model.save_weights(tmp_path / "again.weights.h5")
    ks.unwrap_model(model)
    assert not adapter_places(model)
    model.load_weights(tmp_path / "again.weights.h5")
    assert _error(_outputs(model, case), plain) == 0

    ks.wrap_model(model, "lora", target="all", rank=1)
    _randomize(model, 2 * size)
    adapted = _outputs(model, case)
    ks.merge_model(model)
    assert not adapter_places(model)
    # Random deep convolutional networks amplify rounding a thousandfold.
    limit = 1e-2 if case in APPLICATIONS else 1e-4
    assert _error(_outputs(model, case), adapted) < limit


# Blocks of several kinds, fused and grouped kernels, names that change when
# a model is built again, models that read a layer's `kernel` themselves.
TO_COMPRESS = """
    bert_text_classifier clip_backbone dinov2_backbone flux_backbone
    gemma4_backbone gpt2_causal_lm hgnetv2_backbone mobilenet_v2
    moonshine_backbone sam_backbone t5_backbone vit_backbone
""".split()


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the others compile each model"
)
@pytest.mark.parametrize("name", TO_COMPRESS)
def test_compress_save_and_load(name, tmp_path):
    case = next(c for c in MODELS + APPLICATIONS if c.name == name)
    model = case.make()
    plain = _outputs(model, case)
    small = ks.compress_model(model, max_error=0.6)
    assert isinstance(small, type(model))
    assert small.count_params() < model.count_params()
    assert _error(_outputs(model, case), plain) == 0
    got = _outputs(small, case)
    small.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    assert _error(_outputs(again, case), got) == 0
