"""Makes what the site needs before Sphinx reads it: tables, notebooks."""

import base64
import importlib.util
import json
import pathlib
import warnings

import _draw
import keras_hub
import numpy as np
import rich.console

import keras_spectral as ks

QUIET = rich.console.Console(quiet=True)
# What the rows of `benchmarks/study.py` are called where it has a name of its
# own for a method with certain options.
CALLS = {
    "pissa": '`"lora"`, `initializer="pissa"`',
    "spectral": '`"spectral"`',
    "spectral_values": '`"spectral"`, `mode="values"`',
    "spectral_rotate": '`"spectral"`, `mode="rotate"`',
    "full": "all weights",
    "head": "pooler and classifier alone",
}
TRAINS = {"full": "everything", "head": "the last two layers"}


def everything(docs: pathlib.Path) -> None:
    """Writes `_generated/` and `notebooks/` below the folder of the site."""
    made = docs / "_generated"
    made.mkdir(exist_ok=True)
    write(made / "options.md", options_table())
    study = module(docs.parent / "benchmarks" / "study.py")
    lines = study.read_lines(docs.parent / "benchmarks" / "study.jsonl")
    rows = study.summarise(lines)
    write(made / "study.md", study_table(study, rows))
    _draw.all_pictures(made, study, rows)
    copy_notebooks(docs.parent / "notebooks", docs / "notebooks")


def write(path: pathlib.Path, text: str) -> None:
    """Writes only what differs, so that Sphinx reads it again only then."""
    if not path.exists() or path.read_text("utf8") != text:
        path.write_text(text, "utf8")


def copy_notebooks(source: pathlib.Path, to: pathlib.Path) -> None:
    """Copies notebooks; pictures get a text, solutions fold."""
    to.mkdir(exist_ok=True)
    for path in sorted(source.glob("[0-9][0-9]_*.ipynb")):
        notebook = json.loads(path.read_text("utf8"))
        heading = ""
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                unpack(cell, to, path.stem)
                titles = [x for x in text.splitlines() if x.startswith("#")]
                heading = titles[-1].strip("# ") if titles else heading
                continue
            about = cell["metadata"].setdefault("mystnb", {})
            about = about.setdefault("image", {})
            text = f"Figure of the section “{heading}”"
            about.setdefault("alt", cell["metadata"].get("alt", text))
            if cell["metadata"].get("jupyter", {}).get("source_hidden"):
                cell["metadata"].setdefault("tags", []).append("hide-input")
        write(to / path.name, json.dumps(notebook))
    for old in to.glob("*.*"):
        if not (source / f"{old.stem}.ipynb").exists():
            old.unlink()


def unpack(cell: dict, to: pathlib.Path, stem: str) -> None:
    """Writes the pictures in a cell of text as files, which Sphinx can read."""
    for name, data in cell.pop("attachments", {}).items():
        file = to / f"{stem}{pathlib.Path(name).suffix}"
        file.write_bytes(base64.b64decode(data["image/png"]))
        cell["source"] = "".join(cell["source"]).replace(
            f"attachment:{name}", file.name
        )


def options_table() -> str:
    """Methods with their layers, default targets and options."""
    lines = ["| method | layer | default target | options | merges |"]
    lines += ["|---|---|---|---|---|"]
    for row in ks.methods(QUIET).rows:
        options = ", ".join(f"`{k}={v!r}`" for k, v in row.options.items())
        merges = "yes" if row.merges else "no"
        lines.append(
            f'| `"{row.name}"` | `ks.{row.cls.__name__}` '
            f"| `{row.target}` | {options or 'none'} | {merges} |"
        )
    return "\n".join(lines) + "\n"


def module(path: pathlib.Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def study_table(study, rows: list[dict]) -> str:
    """Every method of the study; what has not been run says so."""
    found = {row["method"]: row for row in rows}
    counts = weights_of(study)
    known = {row.name: row for row in ks.methods(QUIET).rows}
    lines = ["| method | trains | weights | merges | start with | accuracy |"]
    lines += ["|---|---|---|---|---|---|"]
    order = [row["method"] for row in rows]
    for name in order + [x for x in study.METHODS if x not in found]:
        method = known.get(study.METHODS[name][0])
        trains = TRAINS.get(name) or method.trains
        weights = counts.get(name, found.get(name, {}).get("weights"))
        merges = "-" if method is None else "yes" if method.merges else "no"
        rate = accuracy = "not measured"
        if name in found:
            row = found[name]
            if name in counts and counts[name] != row["weights"]:
                raise ValueError(f"{name} trains {weights}, the study {row}")
            rate = f"{row['rate']:g}"
            low, high = 100 * row["low"], 100 * row["high"]
            accuracy = f"{100 * row['accuracy']:.1f} ({low:.1f} to {high:.1f})"
        count = "not measured" if weights is None else f"{weights:,}"
        call = CALLS.get(name, f'`"{name}"`')
        lines.append(
            f"| {call} | {trains} | {count} | {merges} | {rate} | {accuracy} |"
        )
    return "\n".join(lines) + "\n"


def weights_of(study) -> dict[str, int]:
    """What each method trains in a model of MiniLM's size, but for the head.

    The table of tokens is small, as no method here touches it.
    """
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=8,
        num_layers=6,
        num_heads=12,
        hidden_dim=384,
        intermediate_dim=1536,
        max_sequence_length=128,
    )
    model = keras_hub.models.BertTextClassifier(backbone, num_classes=2)
    counts = {}
    for name, (method, options, _) in study.METHODS.items():
        # Deep LoRA needs data to start from: the study has counted it.
        if method in ("head", "full", "deep_lora"):
            continue
        with warnings.catch_warnings(action="ignore"):
            ks.wrap_model(model, method, **options)
        found = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
        counts[name] = found - study.HEAD_WEIGHTS
        ks.unwrap_model(model)
    return counts
