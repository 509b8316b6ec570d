"""How Sphinx builds the site: `make docs`, warnings are errors.

Nothing is fetched. What is made at build time lies in folders that git
ignores: `_generated/` (drawings and tables), `notebooks/` (copies) and
`api/names/` (a page for each public name).
"""

import inspect
import os
import pathlib
import re
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import _make  # noqa: E402
from docutils import nodes  # noqa: E402
from docutils.utils.math import latex2mathml  # noqa: E402

import keras_spectral  # noqa: E402
from keras_spectral.layers import METHODS  # noqa: E402

# An attribute of the package, which autodoc takes for a module.
sys.modules["keras_spectral.schemes"] = keras_spectral.schemes

project = "keras_spectral"
author = "the keras_spectral authors"
copyright = "the keras_spectral authors, Apache-2.0"
release = version = keras_spectral.__version__
html_title = f"keras_spectral {release}"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_generated/**", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
pygments_dark_style = "github-dark"
nitpicky = True
default_role = "literal"
smartquotes = False
python_use_unqualified_type_names = True

nb_execution_mode = "off"
myst_enable_extensions = [
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_custom_sections = [("Call arguments", "params_style")]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Pages that other people write and that may not be there yet.
EXPECTED = ("distribution",)
# Methods of every Keras layer, which add nothing here.
OF_KERAS = {"build", "call", "get_config", "from_config", "compute_mask"}
OF_KERAS |= {"compute_output_shape", "compute_output_spec", "update_step"}
# What a literal has to look like to become a link to a name's page.
NAME = re.compile(r"(?:ks\.|keras_spectral\.)?((?:\w+\.)?\w+)(?:\(.*\))?", re.S)


def show_init(app, what, name, documented, options, signature, returns):
    """Keras's `__new__` hides what constructors take."""
    if what != "class" or "__init__" not in vars(documented):
        return None
    found = inspect.signature(documented.__init__)
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in list(found.parameters.values())[1:]
    ]
    plain = found.replace(
        parameters=plain, return_annotation=inspect.Signature.empty
    )
    return str(plain), None


def skip_keras(app, what, name, documented, skip, options):
    """Leaves out what every Keras layer has."""
    return True if name in OF_KERAS else None


def as_rst(app, what, name, documented, options, lines):
    """Makes reStructuredText of docstrings that are plain text.

    What stands between backticks is literal, what stands outside of them
    means itself, and indented formulas keep their lines.
    """
    found: list[str] = []
    prose: list[str] = []
    body, example, formula, last = True, False, False, ""
    for line in lines:
        body = body and not re.match(r"[A-Z][\w/ ]+:$", line)
        example = bool(line.strip()) and (example or line.startswith(">>> "))
        if body and line.startswith("    ") and not formula:
            formula = not last.startswith((" ", "-")) and not prose[-1].strip()
            prose += ["::", ""] if formula else []
        formula = formula and (line.startswith("    ") or not line.strip())
        if example or formula:
            found += escaped(prose) + [line]
            prose = []
        else:
            prose.append(line)
        last = line if line.strip() else last
    lines[:] = found + escaped(prose)
    if lines:
        lines[0] = lines[0].replace(".. ", "\N{HORIZONTAL ELLIPSIS} ")


def escaped(lines: list[str]) -> list[str]:
    """Doubles backticks, and puts a backslash before `|` and a last `_`."""
    if not lines:
        return []
    parts = re.split(r"(`+)([^`]+)\1", "\n".join(lines))
    for at in range(0, len(parts), 3):
        plain = parts[at].replace("|", r"\|")
        parts[at] = re.sub(r"(\w)_(?=\W|$)", r"\1\_", plain)
    for at in range(1, len(parts), 3):
        parts[at] = "``"
        parts[at + 1] += "``"
    return "".join(parts).split("\n")


def resolve(app, env, node, contnode):
    """Names of other libraries stay text; our own have one page each."""
    if node["refdomain"] != "py":
        return None
    target = node["reftarget"]
    if node["reftype"] not in ("class", "exc"):
        return None
    last = target.rsplit(".", 1)[-1]
    for path, entry in env.domains["py"].objects.items():
        if path.startswith("keras_spectral.") and path.endswith(f".{last}"):
            uri = app.builder.get_relative_uri(node["refdoc"], entry.docname)
            return nodes.reference(
                "", "", contnode, internal=True, refuri=f"{uri}#{entry.node_id}"
            )
    return contnode


def drop_expected(app, docname, source):
    """Leaves links to pages out that are not there yet."""
    for page in EXPECTED:
        if page not in app.env.found_docs:
            text = source[0].replace(f"\n{page}\n", "\n")
            link = rf"\[([^\]]*)\]\([./]*{page}\.md\)"
            source[0] = re.sub(link, r"\1", text)


def link_names(app, doctree, docname):
    """Makes a link of each literal that is a public name."""
    known = app.env.domains["py"].objects
    for literal in list(doctree.findall(nodes.literal)):
        if isinstance(literal.parent, nodes.reference | nodes.title):
            continue
        text = literal.astext()
        if text.strip('"') in METHODS and text.startswith('"'):
            text = f"ks.{METHODS[text.strip(chr(34))].__name__}"
        match = NAME.fullmatch(text)
        if match is None or f"keras_spectral.{match[1]}" not in known:
            continue
        entry = known[f"keras_spectral.{match[1]}"]
        plain_word = match[1].islower() and "_" not in match[1]
        if entry.docname == docname or (plain_word and match[1] == text):
            continue
        uri = app.builder.get_relative_uri(docname, entry.docname)
        link = nodes.reference(
            "", "", internal=True, refuri=f"{uri}#{entry.node_id}"
        )
        literal.replace_self(link)
        link += literal


def write_mathml(self, node):
    """Browsers draw MathML themselves; MathJax would be fetched."""
    block = isinstance(node, nodes.math_block)
    tex = node.astext().replace(r"\dots", r"\ldots")
    self.body.append(latex2mathml.tex2mathml(tex, as_block=block))
    raise nodes.SkipNode


def setup(app):
    mathml = (write_mathml, None)
    app.add_html_math_renderer("mathml", mathml, mathml)
    _make.everything(HERE)
    app.connect("autodoc-process-signature", show_init)
    # Before napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("autodoc-skip-member", skip_keras)
    app.connect("missing-reference", resolve)
    app.connect("source-read", drop_expected)
    app.connect("doctree-resolved", link_names)
    return {"parallel_read_safe": True}
