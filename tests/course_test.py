"""What the tutorials share, and the tool that builds them."""

import base64
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
from keras_spectral.course.smollm import LanguageModel
from keras_spectral.course.smollm import smollm

pytestmark = pytest.mark.once

TUTORIALS = pathlib.Path(__file__).parent.parent / "tutorials"
SOURCES = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))
PICTURE = '# %% tags=["picture"] alt="A dot."'
# A picture of one pixel.
DOT = (
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600000000200014873a4710000000049454e44ae426082"
)
FOLDED = {"plot", "checks", "solution"}


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
    text = "# %% [markdown]\n# # A page\n\n# %%\nprint(2)\n\n"
    text += '# %% tags=["solution"]\nprint(3)\n\n'
    source.write_text(first + text)
    with pytest.raises(ValueError, match="01_page.py shows no picture"):
        build.build(source)
    (tmp_path / "02_other.py").write_text(
        first + "# %% [markdown]\n# # Another\n# One.\n"
    )
    draw = "from IPython.display import Image, display\n"
    draw += f"display(Image(bytes.fromhex('{DOT}')))\n"
    source.write_text(first + text + f"{PICTURE}\n{draw}")
    monkeypatch.setattr(build, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(build, "TUTORIALS", tmp_path / "tutorials")
    assert build.build(source) and build.check(source)
    page = jupytext.read(tmp_path / "01_page.ipynb")
    assert "jupyter" not in page.cells[2].metadata
    assert page.cells[3].metadata["jupyter"] == {"source_hidden": True}
    assert page.cells[3].outputs[0].text == "3\n"
    shown = page.cells[1].attachments["picture.png"]["image/png"]
    assert base64.b64decode(shown).hex() == DOT
    assert page.cells[1].source == "![A dot.](attachment:picture.png)"
    assert page.cells[-2].source == "Next: [Another](02_other.ipynb)."
    source.write_text(first + "# %%\nprint(4)\n")
    assert not build.check(source)
    source.write_text(first + "# %%\nraise ValueError\n")
    assert not build.run(source, "torch")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_pages_are_short_and_open_with_a_picture(source):
    cells = jupytext.read(source).cells
    seen = [
        cell
        for cell in cells
        if cell.cell_type == "code"
        and not FOLDED & set(cell.metadata.get("tags", ()))
    ]
    pictures = [c for c in cells if "picture" in c.metadata.get("tags", ())]
    assert len(pictures) == 1 and len(pictures[0].metadata["alt"]) > 40
    lines = [
        line
        for cell in seen
        for line in cell.source.splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) <= 120
    assert not any(line.strip().startswith("assert") for line in lines)
    assert any("checks" in cell.metadata.get("tags", ()) for cell in cells)
    assert any("solution" in cell.metadata.get("tags", ()) for cell in cells)


def test_lite0_knows_a_flower_and_a_palace():
    try:
        model = course.lite0()
    except FileNotFoundError:
        pytest.skip("the archive is not in .data")
    assert model.count_params() == 4_694_024
    photos = np.stack([course.photo(n) for n in ("flower", "china")])
    assert photos.shape == (2, 224, 224, 3)
    assert photos.min() >= -1 and photos.max() <= 1
    flower, china = model.predict(photos, verbose=0).argsort(axis=1)
    assert flower[-1] == 985  # daisy
    assert 698 in china[-3:]  # palace


def test_archives_say_where_they_come_from(tmp_path, monkeypatch):
    place = tmp_path / "keras_spectral" / "course" / "data.py"
    monkeypatch.setattr(course_data, "__file__", str(place))
    for read in (course.lite0, course.sentences, course.prose, smollm):
        with pytest.raises(FileNotFoundError, match="make demo.*--dest .data"):
            read()


def test_smollm_knows_a_capital():
    try:
        writer = smollm()
    except FileNotFoundError:
        pytest.skip("the archive is not in .data")
    backbone = writer.backbone
    assert backbone.count_params() == 134_515_008
    assert "Paris" in writer.go_on("The capital of France is", tokens=2)
    rows = writer.rows(course.prose(), length=64, count=4)
    assert rows.shape == (4, 65) and rows.dtype == "int32"
    model = LanguageModel(backbone)
    assert 40 < model.perplexity(rows) < 160
    # Its configuration says that the table is tied: there is no other head.
    again = type(backbone).from_config(backbone.get_config())
    assert again.count_params() == backbone.count_params()


def test_smollm_of_a_few_blocks():
    try:
        writer = smollm(blocks=1)
    except FileNotFoundError:
        pytest.skip("the archive is not in .data")
    assert len(writer.backbone.transformer_layers) == 1
    rows = writer.rows(course.prose(), length=8, count=2)
    given = {"token_ids": rows, "padding_mask": np.ones_like(rows)}
    assert writer.backbone(given).shape == (2, 9, 576)


def test_download_says_what_it_takes(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        course.fashion("tfds")
