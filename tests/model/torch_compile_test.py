"""`torch.compile` takes wrapped layers as one graph, as it does plain ones."""

import keras
import numpy as np
import pytest

import keras_spectral as ks

METHODS = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "oft": {"block_size": 4},
    "spectral": {"rank": 2},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools")
@pytest.mark.skipif(keras.backend.backend() != "torch", reason="its compiler")
@pytest.mark.parametrize("method", METHODS)
def test_no_graph_breaks(method):
    import torch

    layers = [keras.layers.Dense(8, "relu"), keras.layers.Dense(4)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    ks.wrap_model(model, method, "dense.*", **METHODS[method])
    x = torch.ones((2, 8))
    whole = torch.compile(
        lambda x: model(x, training=False), backend="eager", fullgraph=True
    )
    with torch.no_grad():
        np.testing.assert_allclose(whole(x), model(x), rtol=1e-6)
