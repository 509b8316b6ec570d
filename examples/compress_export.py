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

BACKEND = keras.backend.backend()

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--ratio", type=float, default=0.5, help="share to remove")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument(
    "--out", default="saved_model" if BACKEND == "jax" else "small.onnx"
)
args = parser.parse_args()

keras.utils.set_random_seed(0)
digits = sklearn.datasets.load_digits()
images = (digits.data / 16).astype("float32")  # (1797, 64)
x, y, test_x, test_y = (
    images[:1300],
    digits.target[:1300],
    images[1300:],
    digits.target[1300:],
)


def fit(model, epochs):
    model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, epochs=epochs, verbose=0)


def describe(name, model):
    right = model.predict(test_x, verbose=0).argmax(-1) == test_y
    print(
        f"{name}: {model.count_params():,} weights, accuracy {right.mean():.3f}"
    )


model = keras.Sequential(
    [
        keras.Input((64,)),
        keras.layers.Dense(256, activation="relu"),
        keras.layers.Dense(256, activation="relu"),
        keras.layers.Dense(10),
    ]
)
fit(model, args.epochs)
describe("whole", model)

# A new model, whose layers' outputs on these inputs change least. The model
# that is given stays as it is.
small = ks.compress_model(
    model, ratio=args.ratio, method="energy", calibration=x[:256]
)
ks.compression_report(small)
describe("compressed", small)
fit(small, args.epochs)
describe("fine-tuned", small)

expected = small.predict(test_x[:8], verbose=0)
if args.out.endswith(".onnx"):
    import onnxruntime

    # A fixed batch is what every exporter can do.
    signature = [keras.InputSpec("float32", (8, 64))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters' own parts
        small.export(
            args.out, format="onnx", verbose=False, input_signature=signature
        )
    session = onnxruntime.InferenceSession(args.out)
    (given,) = session.get_inputs()
    (got,) = session.run(None, {given.name: test_x[:8]})
else:
    import tensorflow as tf

    small.export(args.out, verbose=False)
    loaded = tf.saved_model.load(args.out)
    got = loaded.serve(test_x[:8]).numpy()
print(f"{args.out}: largest difference {np.abs(got - expected).max():.1e}")
