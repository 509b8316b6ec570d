"""Runs the example of several devices, then a BERT that is saved for PEFT.

Usage: example_and_peft.py EXAMPLE FLAGS OF THE EXAMPLE
The folder is --out with ".peft". Where the example splits its kernels, the
BERT's queries are split as well.
"""

import runpy
import sys

sys.argv.pop(0)
out = runpy.run_path(sys.argv[0])["args"].out

import keras  # noqa: E402
import keras_hub  # noqa: E402
import numpy as np  # noqa: E402

import keras_spectral as ks  # noqa: E402

spread = keras.distribution.distribution()
if isinstance(spread, keras.distribution.ModelParallel):
    rules = keras.distribution.LayoutMap(spread.device_mesh)
    rules[".*query/kernel"] = (None, "model", None)
    keras.distribution.set_distribution(
        keras.distribution.ModelParallel(
            layout_map=ks.adapter_layout(rules), auto_shard_dataset=False
        )
    )
model = keras_hub.models.BertBackbone(
    vocabulary_size=50,
    num_layers=1,
    num_heads=4,
    hidden_dim=16,
    intermediate_dim=32,
    max_sequence_length=16,
)
ks.wrap_model(model, "lora", "attention", rank=4, seed=0, trainable=())
rng = np.random.default_rng(0)
for variable in model.trainable_variables:
    variable.assign(rng.normal(size=variable.shape))
ks.save_peft(model, f"{out}.peft")  # in all processes; the first one writes
