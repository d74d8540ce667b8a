"""The pages keep their word: programs run, links and commands lead somewhere, every public name is there."""

import ast
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pyro.distributions.transforms as P
import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
VARIABLE = "…"


def load_snippets():
    """docs/snippets.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("snippets", DOCS / "snippets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


snippets = load_snippets()
PAGES = snippets.PAGES
WITH_PROGRAMS = [page for page in PAGES if snippets.programs(page)]


def name_of(page):
    return str(page.relative_to(ROOT))


def test_there_are_programs_in_the_pages():
    assert len(WITH_PROGRAMS) >= 15


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=name_of)
def test_the_programs_of_a_page_run_and_print_something(page):
    with snippets.few_steps():
        outputs = snippets.run(page)
    assert len(outputs) == len(snippets.programs(page))
    assert all(output.strip() for output in outputs)


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=name_of)
def test_a_program_has_the_imports_that_it_needs_and_shows_what_it_prints(page):
    imported = set()
    for code in snippets.programs(page):
        own = snippets.imports_of(code)
        assert not snippets.names_in(code) & (imported - own), code
        imported |= own
    shown = [block["output"] for block in snippets.BLOCK.finditer(page.read_text())]
    assert all(shown), f"Expected what each program prints, got none: run docs/snippets.py {page}"


def test_a_page_is_rewritten_with_what_its_programs_print(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nx = 1\nprint(x)\n```\n\n```text\nold\n```\n\n```python\nprint(x + 1)\n```\n"
    )
    snippets.write_outputs(page)
    assert re.findall(r"```text\n(.*?)```", page.read_text(), re.S) == ["1\n", "2\n"]
    assert page.read_text().count("```python") == 2


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_commands_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    made = ("benchmark_results/", "tutorials/")
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        source = link
        if page.parent == DOCS and link.startswith("benchmark_results/"):
            source = link.replace("benchmark_results/", "../benchmarks/results/")
        assert (page.parent / source).exists() or link.startswith(made[1:]), link
    for module in re.findall(r"python -m ((?:models|benchmarks|pyro_flowkit)[\w.]*)", text):
        assert importlib.util.find_spec(module.rstrip(".")) is not None, module
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(
        r"\bmake ([a-z][\w-]*)(?=[`\s])", "\n".join(re.findall(r"`[^`]*`|^make.*", text, re.M))
    ):
        assert target in targets, target


def reference():
    """The names of the reference by module."""
    found: dict[str, list[str]] = {}
    for page in (DOCS / "reference").glob("*.rst"):
        text = page.read_text()
        for module in re.findall(r"currentmodule:: (\S+)", text):
            lists = re.findall(r"autosummary::\n +:toctree: generated\n\n((?: +\w+\n)+)", text)
            found[module] = [name for names in lists for name in names.split()]
    return found


@pytest.mark.parametrize("module", sorted(reference()))
def test_every_public_name_has_its_page_and_every_page_a_name(module):
    if module == "pyro_flowkit.lightning":
        pytest.importorskip("lightning")
        public = {"FlowModule", "RowLoader"}
    else:
        imported = importlib.import_module(module)
        public = set(imported.__all__)
        public -= {name for name in public if isinstance(getattr(imported, name), type(sys))}
    if module == "pyro_flowkit.transforms":
        from pyro_flowkit import transforms

        public -= {name for name in P.__all__ if getattr(transforms, name) is getattr(P, name)}
    elsewhere = {
        "pyro_flowkit.training": {"fit", "FitResult"},
        "pyro_flowkit.ops": {"psis", "Tails"},
    }
    listed = reference()[module]
    assert len(listed) == len(set(listed))
    assert set(listed) == public - elsewhere.get(module, set())


def test_every_table_of_the_benchmarks_is_on_their_page():
    page = (DOCS / "benchmarks.md").read_text()
    tables = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    assert set(re.findall(r"\(benchmark_results/(\w+)\.md\)", page)) == tables


def template(node):
    """A string with the variable for what is put into it; several, where it may be one of several."""
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else VARIABLE for p in node.values]
        return "".join(map(str, parts))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def messages():
    sources = (ROOT / "pyro_flowkit").rglob("*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    return {template(node) for tree in trees for node in ast.walk(tree)}


def test_the_messages_that_are_explained_are_those_of_the_package():
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(), re.M)
    assert len(rows) >= 40
    known = messages()
    strange = [
        row
        for row in rows
        if not any(re.sub(r"'?…'?", VARIABLE, row) in re.sub(r"'?…'?", VARIABLE, m) for m in known)
    ]
    assert not strange
