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
parser.add_argument(
    "--weights", default="imagenet", help="of MobileNetV2, or 'none'"
)
parser.add_argument("--size", type=int, default=160, help="pixels")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--rank", type=int, default=4)
parser.add_argument("--rate", type=float, default=5e-3)
parser.add_argument("--out", default="images.safetensors")
args = parser.parse_args()

keras.utils.set_random_seed(0)


def fit(model, x, y=None, epochs=args.epochs, rate=args.rate):
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, y, epochs=epochs, verbose=0)


def accuracy(model, x, y=None):
    scores = model.evaluate(x, y, batch_size=256, verbose=0, return_dict=True)
    return scores["accuracy"]


if args.folder:
    train, test = keras.utils.image_dataset_from_directory(
        args.folder,
        image_size=(args.size, args.size),
        validation_split=0.2,
        subset="both",
        seed=0,
        verbose=False,
    )
    body = keras.applications.MobileNetV2(
        (args.size, args.size, 3),
        include_top=False,
        weights=None if args.weights == "none" else args.weights,
        pooling="avg",
    )
    inputs = keras.Input((args.size, args.size, 3))
    hidden = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    hidden = body(hidden, training=False)  # norms keep their statistics
    head = keras.layers.Dense(len(train.class_names), name="head")
    model = keras.Model(inputs, head(hidden))
    data, tests = (train,), (test,)
else:
    digits = sklearn.datasets.load_digits()
    images = (digits.images[..., None] / 16).astype("float32")
    turned = np.rot90(images, axes=(1, 2)).copy()
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, name="head"),
        ]
    )
    fit(model, images[:1200], digits.target[:1200], epochs=3)
    print(
        f"upright: {accuracy(model, images[1200:], digits.target[1200:]):.3f}"
    )
    data = turned[:600], digits.target[:600]
    tests = turned[1200:], digits.target[1200:]
    print(f"turned, before: {accuracy(model, *tests):.3f}")

# A thin convolution beside each convolution, and a copy of the head.
ks.wrap_model(
    model, "conv_lora", target="conv", rank=args.rank, trainable="head"
)
ks.adapter_summary(model)
fit(model, *data)
print(f"adapted: {accuracy(model, *tests):.3f}")

ks.save_adapters(model, args.out)
ks.merge_model(model)  # plain Keras layers again
model.save(args.out.removesuffix(".safetensors") + ".keras")
