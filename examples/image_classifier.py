"""Adapt a convolutional network to a new kind of images with ConvLoRA.

    python examples/image_classifier.py
    python examples/image_classifier.py --folder photos --epochs 5

By default a small network learns scikit-learn's digits, then meets the same
digits turned by a quarter. With `--folder`, which holds one folder of images
for each class, keras.applications' MobileNetV2 learns these classes. Choose
the backend by KERAS_BACKEND.
"""

import argparse

import keras
import numpy as np
import sklearn.datasets

import keras_spectral as ks

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--folder", help="images, a folder for each class")
parser.add_argument("--weights", default="imagenet", help="or a file's path")
parser.add_argument("--size", type=int, default=160, help="pixels")
parser.add_argument("--epochs", type=int, default=8)
args = parser.parse_args()
keras.utils.set_random_seed(0)


def fit(model, data, epochs):
    model.compile(
        keras.optimizers.Adam(5e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(*data, epochs=epochs, verbose=0)


if args.folder:
    options = {"image_size": (args.size, args.size), "verbose": False}
    train, test = keras.utils.image_dataset_from_directory(
        args.folder, validation_split=0.2, subset="both", seed=0, **options
    )
    data, tests = (train,), (test,)
    options = {"include_top": False, "pooling": "avg", "weights": args.weights}
    body = keras.applications.MobileNetV2((args.size, args.size, 3), **options)
    inputs = keras.Input((args.size, args.size, 3))
    hidden = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    hidden = body(hidden, training=False)  # norms keep their statistics
    head = keras.layers.Dense(len(train.class_names), name="head")
    model = keras.Model(inputs, head(hidden))
else:
    digits = sklearn.datasets.load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    turned = np.rot90(images, axes=(1, 2)).copy()
    data, tests = (
        (turned[rows], digits.target[rows])
        for rows in (slice(600), slice(1200, None))
    )
    layers = [
        keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
        keras.layers.Conv2D(64, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10, name="head"),
    ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    fit(model, (images[:1200], digits.target[:1200]), epochs=3)
    print(f"turned, before: {model.evaluate(*tests, verbose=0)[1]:.3f}")

# A thin convolution beside each convolution, and a copy of the head.
ks.wrap_model(model, "conv_lora", target="conv", rank=4, trainable="head")
ks.adapter_summary(model)
fit(model, data, args.epochs)
print(f"adapted: {model.evaluate(*tests, verbose=0)[1]:.3f}")

ks.save_adapters(model, "images.safetensors")
ks.merge_model(model)  # plain Keras layers again
model.save("images.keras")
