"""LoRA on the fused experts of KerasHub's mixtures."""

import keras
import numpy as np
import pytest
from hub_models import MODELS
from keras import ops

import keras_spectral as ks

NAMES = [
    "gpt_oss_backbone",
    "mixtral_backbone",
    "qwen_moe_backbone",
    "qwen3_moe_backbone",
    "qwen3_5_moe_backbone",
]


pytestmark = pytest.mark.once
CASES = [case for case in MODELS if case.name in NAMES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_experts(case):
    keras.utils.set_random_seed(0)
    model, x = case.make(), case.inputs()
    plain = ops.convert_to_numpy(model(x))
    ks.wrap_model(model, "lora_experts", rank=2)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), plain)
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(weight + rng.normal(0, 0.3, weight.shape))
    adapted = ops.convert_to_numpy(model(x))
    assert np.abs(adapted - plain).max() > 1e-2
    ks.merge_model(model)
    merged = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(merged, adapted, atol=1e-4)
