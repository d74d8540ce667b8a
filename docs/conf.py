"""Sphinx's settings: ``make docs`` builds the site without a network, and takes every warning for an error."""

import itertools
import operator
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from docutils.nodes import literal_block  # noqa: E402

import pyro_flowkit  # noqa: E402

project = "pyro_flowkit"
copyright = "the pyro_flowkit authors"
version = release = pyro_flowkit.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"pyro_flowkit {release}"
html_static_path = ["_static"]
pygments_dark_style = (
    "github-dark"  # furo's own underlines the names of modules, as if they were links
)
html_css_files = ["site.css"]
html_copy_source = False
html_search_scorer = str(DOCS / "_static" / "scorer.js")

# Notebooks show the outputs that they were committed with.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature says them, with the defaults
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "inherited-members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# Sphinx reads files below its own folder only.
for folder, pattern, copies in (
    ("tutorials", "[0-9][0-9]_*.ipynb", "tutorials"),
    ("benchmarks/results", "*.md", "benchmark_results"),
):
    shutil.rmtree(DOCS / copies, ignore_errors=True)
    (DOCS / copies).mkdir()
    for original in sorted((ROOT / folder).glob(pattern)):
        shutil.copy2(original, DOCS / copies)


def of_others(app, what, name, member, skip, options):
    """Leave out what our classes have from PyTorch, Pyro and Lightning: it is documented there."""
    owner = getattr(getattr(member, "fget", member), "__module__", None)
    return True if isinstance(owner, str) and not owner.startswith("pyro_flowkit") else None


PUBLIC = {
    line.strip()
    for page in (DOCS / "reference").glob("*.rst")
    for line in page.read_text(encoding="utf-8").splitlines()
}


def with_pages(app, name, cls, options, bases):
    """In the place of our bases that have no page name the next ones that have, or that are others'."""
    known = [
        base
        for base in cls.__mro__[1:-1]
        if not base.__module__.startswith("pyro_flowkit") or base.__name__ in PUBLIC
    ]
    nearest = [
        base for i, base in enumerate(known) if not any(issubclass(k, base) for k in known[:i])
    ]
    bases[:] = nearest or [object]


def in_tables(lines):
    """For each line of what a program printed, whether it stands in a table: a long one without gaps is a sentence."""
    table = False
    for blank, paragraph in itertools.groupby(lines, lambda line: not line.strip()):
        gaps = [(line, "  " in line.strip()) for line in paragraph]
        is_table = any(gap for _, gap in gaps)
        for line, gap in gaps:
            table = table if blank else is_table and (gap or len(line) <= 80)
            yield table


def mark_tables(app, doctree):
    """Of what a program printed, long sentences are wrapped, and what stands in columns is not."""
    for block in list(doctree.findall(literal_block)):
        if block.get("language") in ("text", "myst-ansi"):
            lines = block.astext().strip("\n").split("\n")
            parts = []
            for table, same in itertools.groupby(
                zip(in_tables(lines), lines, strict=True), operator.itemgetter(0)
            ):
                text = "\n".join(line for _, line in same).strip("\n")
                part = literal_block(text, text, **block.attributes)
                part["classes"] = [*block["classes"], *(["in-columns"] if table else [])]
                parts.append(part)
            block.replace_self(parts)


def setup(app):
    app.connect("doctree-read", mark_tables)
    app.connect("autodoc-process-bases", with_pages)
    app.connect("autodoc-skip-member", of_others)
