"""GLUE data for the benchmark: examples, batches, scores."""

import csv
import pathlib

import keras
import keras_hub
import numpy as np

from keras_spectral.course.data import download
from keras_spectral.course.data import source

MAX_LENGTH = {"mrpc": 96, "rte": 128, "cola": 96, "sst2": 96}
LENGTH_STEP = 16  # paddings of single batches, to compile few shapes
EVALUATION_SPLIT = {"mrpc": "dev", "rte": "dev", "cola": "dev", "sst2": "test"}
Rows = tuple[list[str], list[str], np.ndarray]  # first, second, labels
Inputs = dict[str, np.ndarray]


def read_tsv(folder: pathlib.Path, task: str, split: str) -> Rows:
    """Reads `task.split.tsv`: sentence1, sentence2 (may be empty), label."""
    with open(folder / f"{task}.{split}.tsv", encoding="utf8") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        rows = list(reader)
    labels = np.array([int(row["label"]) for row in rows], "int32")
    first = [row["sentence1"] for row in rows]
    return first, [row["sentence2"] or "" for row in rows], labels


def read_tfds(task: str, split: str) -> Rows:
    """Reads the task from TensorFlow Datasets, which may download it."""
    split = "train" if split == "train" else "validation"
    data = download(f"glue/{task}", split)
    labels = data["label"].astype("int32")
    if task == "rte":  # there 0 is entailment, in the TSV files 1 is
        labels = 1 - labels
    first = data["sentence1"] if "sentence1" in data else data["sentence"]
    second = data.get("sentence2", [b""] * len(first))
    return (
        [text.decode("utf8") for text in first],
        [text.decode("utf8") for text in second],
        labels,
    )


def read(given: str | None, task: str, split: str) -> Rows:
    """Reads one split from TSV files, or without any from the network."""
    place = pathlib.Path(given) if given else source()
    if place in (None, "tfds"):
        return read_tfds(task, split)
    return read_tsv(place if given else place / "text", task, split)


def encode(
    tokenizer: keras_hub.models.BertTokenizer,
    first: list[str],
    second: list[str],
    length: int,
) -> Inputs:
    """Packs [CLS] first [SEP] or [CLS] first [SEP] second [SEP].

    Too long a pair loses tokens from its longer sentence first, which is what
    round robin comes to. Padding at the end is cut to the longest example,
    rounded up to 8.
    """
    packer = keras_hub.layers.MultiSegmentPacker(
        sequence_length=length,
        start_value=tokenizer.cls_token_id,
        end_value=tokenizer.sep_token_id,
        pad_value=tokenizer.pad_token_id,
        truncate="round_robin",
    )
    segments = (first, second) if any(second) else (first,)
    token_ids, segment_ids = packer(tuple(tokenizer(s) for s in segments))
    token_ids = keras.ops.convert_to_numpy(token_ids)
    padding_mask = (token_ids != tokenizer.pad_token_id).astype("int32")
    longest = -(-padding_mask.sum(axis=1).max() // 8) * 8
    arrays = {
        "token_ids": token_ids,
        "segment_ids": keras.ops.convert_to_numpy(segment_ids),
        "padding_mask": padding_mask,
    }
    return {name: array[:, :longest] for name, array in arrays.items()}


class Batches(keras.utils.PyDataset):
    """The batches of every epoch, epoch after epoch.

    Args:
        inputs: All examples.
        labels: Their labels.
        plan: For each epoch the rows of each batch.
        cut: Whether a batch is padded to its own longest example only.
    """

    def __init__(
        self,
        inputs: Inputs,
        labels: np.ndarray,
        plan: list[list[np.ndarray]],
        cut: bool,
    ):
        super().__init__()
        self.inputs = inputs
        self.labels = labels
        self.plan = plan
        self.cut = cut
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.plan[0])

    def __getitem__(self, index):
        rows = self.plan[min(self.epoch, len(self.plan) - 1)][index]
        longest = self.inputs["padding_mask"].shape[1]
        if self.cut:
            longest = lengths(self.inputs)[rows].max()
            longest = -(-longest // LENGTH_STEP) * LENGTH_STEP
        cut = {k: array[rows, :longest] for k, array in self.inputs.items()}
        return cut, self.labels[rows]

    def on_epoch_end(self):
        self.epoch += 1


def lengths(inputs: Inputs) -> np.ndarray:
    """Tokens of each example, padding left out."""
    return inputs["padding_mask"].sum(axis=1)


def plain_batches(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive rows."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def grouped_batches(
    rows: np.ndarray,
    inputs: Inputs,
    size: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Batches of similar length, drawn within pools of 16 batches."""
    found = []
    for pool in plain_batches(rows, 16 * size):
        order = pool[np.argsort(lengths(inputs)[pool], kind="stable")]
        found += plain_batches(order, size)
    return [found[i] for i in rng.permutation(len(found))]


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 of class 1, Matthews, and how calibrated logits are.

    `nll` is the mean negative log-likelihood, `ece` the expected calibration
    error over 15 bins of confidence.
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    predicted, confidence = logits.argmax(axis=-1), np.exp(log_p.max(axis=-1))
    right = predicted == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [
        abs((right[bins == b] - confidence[bins == b]).sum()) for b in range(15)
    ]
    hits = ((predicted == 1) & (labels == 1)).sum()
    positives = (predicted == 1).sum() + (labels == 1).sum()
    matthews = np.corrcoef(predicted, labels)[0, 1] if predicted.std() else 0.0
    return {
        "accuracy": float(right.mean()),
        "f1": float(2 * hits / max(1, positives)),
        "matthews": float(matthews),
        "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
        "ece": float(sum(gaps) / len(labels)),
    }
