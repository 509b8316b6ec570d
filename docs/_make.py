"""Makes what the site needs before Sphinx reads it: tables, notebooks."""

import json
import pathlib

import rich.console

import keras_spectral as ks

QUIET = rich.console.Console(quiet=True)


def everything(docs: pathlib.Path) -> None:
    """Writes `_generated/` and `notebooks/` below the folder of the site."""
    made = docs / "_generated"
    made.mkdir(exist_ok=True)
    write(made / "options.md", options_table())
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
                titles = [x for x in text.splitlines() if x.startswith("#")]
                heading = titles[-1].strip("# ") if titles else heading
                continue
            about = cell["metadata"].setdefault("mystnb", {})
            about = about.setdefault("image", {})
            about.setdefault("alt", f"Figure of the section “{heading}”")
            tags = cell["metadata"].setdefault("tags", [])
            if "solution" in tags and "hide-input" not in tags:
                tags.append("hide-input")
        write(to / path.name, json.dumps(notebook))
    for old in to.glob("*.ipynb"):
        if not (source / old.name).exists():
            old.unlink()


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
