"""What the tutorials share, and the tool that builds them."""

import importlib.util
import logging
import os
import pathlib
import sys
import warnings

import jupytext
import keras
import numpy as np
import pytest

from keras_spectral import course
from keras_spectral.course import data as course_data

pytestmark = pytest.mark.once

TUTORIALS = pathlib.Path(__file__).parent.parent / "tutorials"


@pytest.fixture
def no_folder(monkeypatch):
    monkeypatch.delenv("KERAS_SPECTRAL_DATA", raising=False)


def _build():
    spec = importlib.util.spec_from_file_location(
        "tutorials_build", TUTORIALS / "build.py"
    )
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


@pytest.mark.usefixtures("no_folder")
def test_images_are_digits_by_default():
    data = course.images(train=100, test=50)
    assert "digits" in data.name
    assert data.x.shape == (100, 8, 8, 1) and data.test_x.shape == (50, 8, 8, 1)
    assert data.y.dtype == "int32" and set(data.y) == set(range(10))
    assert data.x.min() == 0 and data.x.max() == 1


def test_images_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "vision").mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 6), ("test", 4)):
        images = rng.integers(0, 256, (count, 28, 28), "uint8")
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = np.arange(count).astype("uint8")
    np.savez(tmp_path / "vision" / "fashion_mnist.npz", **arrays)
    monkeypatch.setenv("KERAS_SPECTRAL_DATA", str(tmp_path))
    data = course.images(train=5)
    assert "Fashion" in data.name
    assert data.x.shape == (5, 28, 28, 1) and data.test_x.shape[0] == 4
    expected = arrays["train_images"][:5, ..., None] / 255
    np.testing.assert_allclose(data.x, expected, atol=1e-6)
    np.testing.assert_array_equal(data.test_y, np.arange(4))


def test_a_folder_that_is_not_there(monkeypatch):
    monkeypatch.setenv("KERAS_SPECTRAL_DATA", os.path.join("no", "folder"))
    with pytest.raises(FileNotFoundError, match="which is no folder"):
        course.images()


def test_training_and_counting():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 4)).astype("float32")
    y = x[:, :3].argmax(axis=1)
    losses = course.train(model, x, y, 0.1, epochs=20, batch_size=30)["loss"]
    assert len(losses) == 20 and losses[-1] < losses[0] / 2
    right = model.predict(x, verbose=0).argmax(axis=1) == y
    assert course.accuracy(model, x, y) == right.mean() > 0.8
    assert course.count(model.weights) == 15


@pytest.mark.usefixtures("no_folder")
def test_digits_as_sentences():
    pytest.importorskip("keras_hub")
    from keras_spectral.course import models

    words = models._words(course_data.digits().x[:3])
    assert words["token_ids"].shape == (3, 17)
    assert set(words["token_ids"][:, 0]) == {18}
    assert words["token_ids"][:, 1:].min() >= 1
    assert words["token_ids"][:, 1:].max() <= 17


def test_quiet_silences_two_warnings_only():
    logger = logging.getLogger("tensorflow")
    level = logger.level
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            course.quiet()
            warnings.warn("`shuffle=True` was passed, but", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        assert [str(each.message) for each in seen] == ["something else"]
        assert not logger.isEnabledFor(logging.WARNING)
        assert logger.isEnabledFor(logging.ERROR)
    finally:
        logger.setLevel(level)


def test_solutions_are_folded_in_notebooks(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    build = _build()
    source = tmp_path / "01_page.py"
    first = (TUTORIALS / "01_quickstart.py").read_text().split("# %%")[0]
    source.write_text(
        first + '# %%\nprint(2)\n\n# %% tags=["solution"]\nprint(3)\n'
    )
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(build, "TUTORIALS", tmp_path / "tutorials")
    assert build.build(source) and build.check(source)
    page = jupytext.read(tmp_path / "01_page.ipynb")
    assert "jupyter" not in page.cells[0].metadata
    assert page.cells[1].metadata["jupyter"] == {"source_hidden": True}
    assert page.cells[1].outputs[0].text == "3\n"
    source.write_text(first + "# %%\nprint(4)\n")
    assert not build.check(source)
    source.write_text(first + "# %%\nraise ValueError\n")
    assert not build.run(source, "torch")


def test_download_says_what_it_takes(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        course.fashion("tfds")
