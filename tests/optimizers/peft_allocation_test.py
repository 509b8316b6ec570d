"""Budgets, masks and ranks of HF PEFT's AdaLoRA, step by step."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.layers.allocation import RankAllocation
from keras_spectral.layers.allocation import Schedule

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch")

SIZES, RANK, TARGET, STEPS = ((6, 8), (8, 5)), 4, 2, 20


def _theirs():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(*SIZES[0])
            self.second = torch.nn.Linear(*SIZES[1])

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    config = peft.AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        tinit=3,
        tfinal=5,
        deltaT=2,
        total_step=STEPS,
        target_modules=["first", "second"],
    )
    return peft.get_peft_model(Net(), config)


def _ours():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((SIZES[0][0],)),
            keras.layers.Dense(SIZES[0][1], "tanh", name="first"),
            keras.layers.Dense(SIZES[1][1], name="second"),
        ]
    )
    target = ["first", "second"]
    ks.wrap_model(model, "adalora", target=target, rank=RANK)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    schedule = Schedule(3, 5, 2, STEPS, 2 * RANK, 2 * TARGET)
    return model, RankAllocation(optimizer, model.layers, schedule)


def test_equal_at_every_step():
    theirs = _theirs()
    ours, allocation = _ours()
    rng = np.random.default_rng(0)
    for step in range(1, STEPS + 1):
        variables, gradients = [], []
        for layer in ours.layers:
            module = getattr(theirs.base_model.model, layer.name)
            for own, other, turned in (
                (layer.lora_e, module.lora_E["default"], False),
                (layer.lora_a, module.lora_A["default"], True),
                (layer.lora_b, module.lora_B["default"], True),
            ):
                value = rng.normal(size=own.shape).astype("float32")
                gradient = rng.normal(size=own.shape).astype("float32")
                own.assign(value)
                variables.append(own)
                gradients.append(ops.convert_to_tensor(gradient))
                value, gradient = (
                    torch.tensor(x.T.copy() if turned else x[:, None])
                    for x in (value, gradient)
                )
                other.data.copy_(value)
                other.grad = gradient
        theirs.base_model.update_and_allocate(step)
        allocation(gradients, variables)
        for layer in ours.layers:
            module = getattr(theirs.base_model.model, layer.name)
            np.testing.assert_allclose(
                ops.convert_to_numpy(layer.lora_e),
                module.lora_E["default"].detach().numpy()[:, 0],
                atol=1e-6,
                err_msg=f"step {step}, layer {layer.name}",
            )
    pattern = theirs.peft_config["default"].rank_pattern
    ranks = [sum(kept) for kept in pattern.values()]
    assert ranks == allocation.ranks() and sum(ranks) == 2 * TARGET
