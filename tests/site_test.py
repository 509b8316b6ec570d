"""The site's code runs, page by page, and names everything public.

A page's blocks of Python run in their order and share their names. The first
line of a block can say that it is for one backend, `# KERAS_BACKEND=jax`, or
that it does not run here, `# not run: it downloads a model`. Where a block of
`output` follows, it is what the block before has printed.
"""

import contextlib
import inspect
import io
import pathlib
import re

import keras
import pytest

import keras_spectral as ks
from keras_spectral.layers import METHODS

DOCS = pathlib.Path(__file__).parents[1] / "docs"
MADE = ("_generated", "notebooks", "names")
PAGES = {
    str(path.relative_to(DOCS)): path
    for path in sorted(DOCS.rglob("*.md"))
    if not set(path.relative_to(DOCS).parts[:-1]) & set(MADE)
}
FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<kind>python|output)\n(?P<code>.*?)^(?P=fence)$",
    re.M | re.S,
)
# Other libraries announce what they will drop.
OTHERS = pytest.mark.filterwarnings("default")
# Pages that run on each backend, or need something; the others run once.
MARKS = {
    "start.md": [pytest.mark.compiled],
    "howto/loops.md": [],
    "howto/export.md": [pytest.mark.compiled, OTHERS],
    "from-peft.md": [pytest.mark.once, OTHERS],
}


def blocks_of(page: pathlib.Path) -> list[tuple[int, str, str]]:
    """Line, kind and text of each block."""
    text = page.read_text("utf8")
    return [
        (text[: m.start()].count("\n") + 1, m["kind"], m["code"])
        for m in FENCE.finditer(text)
    ]


def runs_here(code: str) -> bool:
    """Whether the block is for this backend, and for a machine like this."""
    first = code.splitlines()[0]
    if first.startswith("# not run"):
        return False
    match = re.fullmatch(r"# KERAS_BACKEND=(\w+)", first)
    return match is None or match[1] == keras.backend.backend()


def run_page(name: str, page: pathlib.Path) -> None:
    keras.utils.clear_session()  # automatic names count from the start
    names: dict = {"__name__": "__main__"}
    printed = None
    for line, kind, code in blocks_of(page):
        if kind == "output":
            if printed is not None:
                found = "\n".join(x.rstrip() for x in printed.splitlines())
                assert found.strip() == code.strip(), f"{name}:{line}"
            continue
        printed = None
        if not runs_here(code):
            continue
        # Tracebacks show the page's own lines.
        source = compile("\n" * line + code, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(source, names)
        printed = stream.getvalue()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=MARKS.get(name, pytest.mark.once))
        for name, page in PAGES.items()
        if any(kind == "python" for _, kind, _ in blocks_of(page))
    ],
)
def test_pages_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Methods that a page registers are not there for other tests.
    known = dict(METHODS)
    try:
        run_page(name, PAGES[name])
    finally:
        METHODS.clear()
        METHODS.update(known)


@pytest.mark.once
def test_lines_of_code_fit():
    for name, page in PAGES.items():
        for line, _, code in blocks_of(page):
            long = [x for x in code.splitlines() if len(x) > 80]
            assert not long, f"{name}:{line}: {long[0]}"


@pytest.mark.once
def test_api_pages_name_everything():
    listed = set()
    for page in (DOCS / "api").glob("*.md"):
        listed |= set(re.findall(r"^   ([\w.]+)$", page.read_text(), re.M))
    public = {x for x in ks.__all__ if not inspect.ismodule(getattr(ks, x))}
    for module in ("blocks", "callbacks", "optimizers", "plots", "schemes"):
        names = set(getattr(ks, module).__all__) - public
        public |= {f"{module}.{name}" for name in names}
    assert public == listed
