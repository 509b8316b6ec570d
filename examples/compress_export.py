"""Compress a trained model with calibration, report, fine-tune, export.

    python examples/compress_export.py
    python examples/compress_export.py --ratio 0.7 --out small.onnx

By default a small network is trained on scikit-learn's digits; put your own
model and data in its place. The export is ONNX where `--out` ends in `.onnx`
(on PyTorch and TensorFlow), else a TensorFlow SavedModel (on TensorFlow and
JAX). Choose the backend by KERAS_BACKEND.
"""

import argparse
import warnings

import keras
import numpy as np
import sklearn.datasets

import keras_spectral as ks

OUT = "saved_model" if keras.backend.backend() == "jax" else "small.onnx"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--ratio", type=float, default=0.5, help="share to remove")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--out", default=OUT, help=f"{OUT} by default")
args = parser.parse_args()
keras.utils.set_random_seed(0)

digits = sklearn.datasets.load_digits()
images = (digits.data / 16).astype("float32")  # (1797, 64)
x, test_x = images[:1300], images[1300:]
y, test_y = digits.target[:1300], digits.target[1300:]


def fit(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss)
    model.fit(x, y, epochs=args.epochs, verbose=0)


def describe(name, model):
    right = np.mean(model.predict(test_x, verbose=0).argmax(-1) == test_y)
    print(f"{name}: {model.count_params():,} weights, accuracy {right:.3f}")


layers = [keras.layers.Dense(256, activation="relu") for _ in range(2)]
layers = [keras.Input((64,)), *layers, keras.layers.Dense(10)]
model = keras.Sequential(layers)
fit(model)
describe("whole", model)

# A new model, whose layers' outputs on these inputs change least. The model
# that is given stays as it is.
options = {"method": "energy", "calibration": x[:256]}
small = ks.compress_model(model, ratio=args.ratio, **options)
ks.compression_report(small)
describe("compressed", small)
fit(small)
describe("fine-tuned", small)

few = test_x[:8]
expected = small.predict(few, verbose=0)
if args.out.endswith(".onnx"):
    import onnxruntime

    warnings.simplefilter("ignore")  # of the exporters' own parts
    # A fixed batch is what every exporter can do.
    options = {"input_signature": [keras.InputSpec("float32", few.shape)]}
    small.export(args.out, format="onnx", verbose=False, **options)
    session = onnxruntime.InferenceSession(args.out)
    (got,) = session.run(None, {session.get_inputs()[0].name: few})
else:
    import tensorflow as tf

    small.export(args.out, verbose=False)
    loaded = tf.saved_model.load(args.out)
    got = loaded.serve(few).numpy()
print(f"{args.out}: largest difference {np.abs(got - expected).max():.1e}")
