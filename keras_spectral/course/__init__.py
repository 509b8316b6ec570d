"""What the tutorials share: data, small trained models, pictures.

Nothing here is needed to use the library. A language model is in
`keras_spectral.course.smollm`, apart, since it needs KerasHub.
"""

from keras_spectral.course.data import Data
from keras_spectral.course.data import digits
from keras_spectral.course.data import fashion
from keras_spectral.course.data import images
from keras_spectral.course.data import prose
from keras_spectral.course.data import sentences
from keras_spectral.course.lite0 import lite0
from keras_spectral.course.lite0 import photo
from keras_spectral.course.models import Encoder
from keras_spectral.course.models import Pretrained
from keras_spectral.course.models import minilm
from keras_spectral.course.models import reader
from keras_spectral.course.models import vision
from keras_spectral.course.page import FAST
from keras_spectral.course.page import accuracy
from keras_spectral.course.page import count
from keras_spectral.course.page import draw_study
from keras_spectral.course.page import quiet
from keras_spectral.course.page import show
from keras_spectral.course.page import table
from keras_spectral.course.page import train

__all__ = [
    "FAST",
    "Data",
    "Encoder",
    "Pretrained",
    "accuracy",
    "count",
    "digits",
    "draw_study",
    "fashion",
    "images",
    "lite0",
    "minilm",
    "photo",
    "prose",
    "quiet",
    "reader",
    "sentences",
    "show",
    "table",
    "train",
    "vision",
]
