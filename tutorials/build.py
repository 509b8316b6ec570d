"""Builds notebooks/NN_topic.ipynb, with outputs, from tutorials/NN_topic.py.

A source is a script in jupytext's percent format. Tags of its cells: the
output of `picture` is shown below the title as well, with the cell's `alt` as
its text; `plot`, `checks` and `solution` are folded. At the end of a notebook
stand links to its neighbours and what it was built with.

`python tutorials/build.py` runs and writes them all, or those that are named
(`01_quickstart`). `--check` runs nothing: it fails if the input cells of a
notebook differ from its source. `--run` runs the sources as scripts, each on
one backend, another one every day, and those in EVERYWHERE on all three.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

import jupytext
import nbclient
import nbformat

TUTORIALS = pathlib.Path(__file__).resolve().parent
NOTEBOOKS = TUTORIALS.parent / "notebooks"
PACKAGES = ("keras", "keras-hub", "keras-spectral", "numpy")
BACKENDS = ("jax", "torch", "tensorflow")
EVERYWHERE = ("01",)
FOLDED = {"plot", "checks", "solution"}
MACHINE_PATH = re.compile(r"/(home|root|tmp|usr|work|Users)/|[A-Z]:\\\\")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="such as 01_quickstart")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--run", action="store_true")
    arguments = parser.parse_args()
    sources = sorted(TUTORIALS.glob("[0-9][0-9]_*.py"))
    known = {source.stem: source for source in sources}
    unknown = set(arguments.names) - known.keys()
    if unknown:
        parser.error(f"no tutorial {sorted(unknown)}; there are {[*known]}")
    chosen = [known[name] for name in arguments.names or known]
    if arguments.run:
        return 0 if run_all(chosen) else 1
    step = check if arguments.check else build
    return 0 if all([step(source) for source in chosen]) else 1


def run_all(sources):
    """Runs scripts two at a time; whether all of them ended well."""
    today = datetime.date.today().toordinal()
    runs = []
    for source in sources:
        number = source.stem[:2]
        turn = BACKENDS[(int(number) + today) % len(BACKENDS)]
        backends = BACKENDS if number in EVERYWHERE else [turn]
        runs += [(source, backend) for backend in backends]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return all(list(pool.map(lambda pair: run(*pair), runs)))


def run(source, backend):
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        extra = {
            "KERAS_BACKEND": backend,
            "KERAS_SPECTRAL_OUT": folder,
        }
        done = subprocess.run(
            [sys.executable, source],
            env={**os.environ, **extra},
            capture_output=True,
            text=True,
        )
    seconds = time.perf_counter() - start
    state = "failed" if done.returncode else "ran"
    print(f"{source.stem} {state} on {backend}, {seconds:.0f} s", flush=True)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
    return done.returncode == 0


def build(source):
    notebook = jupytext.read(source)
    with tempfile.TemporaryDirectory() as folder:
        # Pictures land there; the notebook shows them inline.
        nbclient.NotebookClient(
            notebook, timeout=1800, resources={"metadata": {"path": folder}}
        ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            if FOLDED & set(cell.metadata.get("tags", ())):
                cell.metadata["jupyter"] = {"source_hidden": True}
            # Frameworks log their start on stderr, with machine paths.
            cell.outputs = [
                x for x in cell.outputs if x.get("name") != "stderr"
            ]
            shown = json.dumps(cell.outputs)
            if found := MACHINE_PATH.search(shown):
                around = shown[max(0, found.start() - 60) : found.end() + 60]
                raise ValueError(
                    f"{source.name}: an output of cell {number} names a "
                    f"machine path: ...{around}... Print something else."
                )
    versions = built_with()
    text = ", ".join(f"{name} {value}" for name, value in versions.items())
    notebook.cells.insert(1, opening(source, notebook))
    notebook.cells.append(added("neighbours", neighbours(source)))
    notebook.cells.append(added("built", f"*Built with {text}.*"))
    notebook.metadata = {
        "kernelspec": notebook.metadata["kernelspec"],
        "keras_spectral": versions,
    }
    path = NOTEBOOKS / f"{source.stem}.ipynb"
    NOTEBOOKS.mkdir(exist_ok=True)
    nbformat.write(notebook, path)
    print(f"built {path.relative_to(TUTORIALS.parent)}")
    return True


def added(name, text, **parts):
    """A cell that the source does not have."""
    cell = nbformat.v4.new_markdown_cell(text, **parts)
    cell.id, cell.metadata["built"] = name, True
    return cell


def opening(source, notebook):
    """The picture of the page, to stand below its title."""
    for cell in notebook.cells:
        if "picture" in cell.metadata.get("tags", ()):
            images = [
                output.data["image/png"]
                for output in cell.outputs
                if "image/png" in output.get("data", ())
            ]
            if images and cell.metadata.get("alt"):
                text = f"![{cell.metadata['alt']}](attachment:picture.png)"
                data = {"picture.png": {"image/png": images[-1]}}
                return added("opening", text, attachments=data)
    raise ValueError(
        f"{source.name} shows no picture. Expected a cell that draws one, "
        'with tags=["picture"] and alt="what is to be seen".'
    )


def neighbours(source):
    """Links to the pages before and after."""
    pages = sorted(source.parent.glob("[0-9][0-9]_*.py"))
    place = pages.index(source)
    links = []
    for word, other in (("Before", place - 1), ("Next", place + 1)):
        if 0 <= other < len(pages):
            title = jupytext.read(pages[other]).cells[0].source.splitlines()[0]
            name = f"{pages[other].stem}.ipynb"
            links.append(f"{word}: [{title.lstrip('# ')}]({name}).")
    return "\\\n".join(links)


def check(source):
    path = NOTEBOOKS / f"{source.stem}.ipynb"
    if not path.exists():
        print(f"{path.name} is missing: run python tutorials/build.py")
        return False
    same = inputs(nbformat.read(path, 4)) == inputs(jupytext.read(source))
    print(
        f"{path.name} is up to date"
        if same
        else f"{path.name} differs from {source.name}: "
        "run python tutorials/build.py"
    )
    return same


def inputs(notebook):
    return [
        (cell.cell_type, cell.source)
        for cell in notebook.cells
        if not cell.metadata.get("built")
    ]


def built_with():
    # Tutorials fall back on JAX where the variable is not set.
    backend = os.environ.get("KERAS_BACKEND", "jax")
    return {
        "backend": backend,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


if __name__ == "__main__":
    sys.exit(main())
