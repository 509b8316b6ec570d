"""CIFAR-10 as JPEG bytes, and ResNets trained on the clean images."""

import io
import os
import pathlib

import keras
import numpy as np

MEAN = np.float32([0.485, 0.456, 0.406])
STD = np.float32([0.229, 0.224, 0.225])


def data_folder(given: str | None) -> pathlib.Path:
    """The folder with `vision/` and `weights/`, given or from environment."""
    root = given or os.environ.get("KERAS_SPECTRAL_DATA")
    if not root:
        raise FileNotFoundError(
            "No CIFAR data: pass --data DIR or set KERAS_SPECTRAL_DATA to a "
            "directory that holds vision/cifar10_jpeg.npz and "
            "weights/resnet20_cifar10.npz."
        )
    return pathlib.Path(root)


def read_images(
    folder: pathlib.Path, split: str, rows: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decoded, normalised images (n, 32, 32, 3) and their labels.

    Args:
        folder: See `data_folder`.
        split: `"train"` or `"test"`.
        rows: Which images; all by default.
    """
    from PIL import Image

    with np.load(folder / "vision" / "cifar10_jpeg.npz") as file:
        data = file[f"{split}_jpeg"].tobytes()
        offsets, labels = file[f"{split}_offsets"], file[f"{split}_labels"]
    rows = np.arange(len(labels)) if rows is None else rows
    images = np.empty((len(rows), 32, 32, 3), "float32")
    for i, row in enumerate(rows):
        jpeg = io.BytesIO(data[offsets[row] : offsets[row + 1]])
        images[i] = np.asarray(Image.open(jpeg).convert("RGB"))
    return (images / 255 - MEAN) / STD, labels[rows].astype("int32")


def build_resnet(
    depth: int, input_shape: tuple[int, int, int] = (32, 32, 3)
) -> keras.Model:
    """The CIFAR ResNet of He et al. 2015 with parameter-free shortcuts.

    Convolutions and batch norms have the names of the PyTorch original,
    with underscores: `layer2_0_conv1`.

    Args:
        depth: 6 n + 2 layers, such as 20, 32 or 56.
        input_shape: Of one image.
    """
    inputs = x = keras.Input(input_shape)
    x = _conv_norm(x, 16, 1, "conv1", "bn1")
    x = keras.layers.ReLU()(x)
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"layer{stage}_{block}"
            x = _block(x, 8 * 2**stage, stride, name)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(10, name="linear")(x)
    return keras.Model(inputs, x, name=f"resnet{depth}")


def load_resnet(depth: int, folder: pathlib.Path) -> keras.Model:
    """A ResNet with the weights trained on clean CIFAR-10."""
    model = build_resnet(depth)
    with np.load(folder / "weights" / f"resnet{depth}_cifar10.npz") as file:
        unread = set(file.files)
        for layer in model.layers:
            name = layer.name.replace("_", ".")
            values = [
                file[f"{name}.{part}"]
                for part in _PARTS.get(type(layer).__name__, ())
            ]
            if values and values[0].ndim == 4:
                values[0] = values[0].transpose(2, 3, 1, 0)  # OIHW to HWIO
            if values and values[0].ndim == 2:
                values[0] = values[0].T
            if values:
                layer.set_weights(values)
                unread -= {f"{name}.{p}" for p in _PARTS[type(layer).__name__]}
    unread = {name for name in unread if "num_batches" not in name}
    if unread:
        raise ValueError(f"The model has no place for {sorted(unread)[:4]}.")
    return model


_PARTS = {
    "Conv2D": ("weight",),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
    "Dense": ("weight", "bias"),
}


def _conv_norm(x, filters, stride, conv, norm):
    # PyTorch pads both sides by 1; "same" with a stride of 2 does not.
    if stride > 1:
        x = keras.layers.ZeroPadding2D(1)(x)
    x = keras.layers.Conv2D(
        filters,
        3,
        stride,
        padding="valid" if stride > 1 else "same",
        use_bias=False,
        name=conv,
    )(x)
    return keras.layers.BatchNormalization(
        epsilon=1e-5, momentum=0.9, name=norm
    )(x)


def _block(x, filters, stride, name):
    shortcut = x
    if stride > 1:
        shortcut = keras.layers.AveragePooling2D(1, stride)(shortcut)
        extra = (filters - x.shape[-1]) // 2
        pad = [[0, 0], [0, 0], [0, 0], [extra, extra]]
        shortcut = keras.ops.pad(shortcut, pad)
    x = _conv_norm(x, filters, stride, f"{name}_conv1", f"{name}_bn1")
    x = keras.layers.ReLU()(x)
    x = _conv_norm(x, filters, 1, f"{name}_conv2", f"{name}_bn2")
    return keras.layers.ReLU()(keras.layers.Add()([x, shortcut]))
