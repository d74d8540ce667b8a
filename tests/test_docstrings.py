"""Docstrings are reStructuredText: code stands in double backticks or in a role, nowhere in single ones."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("pyro_flowkit", "models", "benchmarks", "tests", "tutorials")
# What a backtick may begin, in this order: a literal, a role, a link. What is left over is Markdown.
MARKUP = re.compile(r"``.+?``(?!`)|:[\w:]+:`[^`]+`|`[^`]+`_{1,2}", re.DOTALL)


def docstrings(source: str) -> list[tuple[int, str]]:
    """Line and text of every docstring of a file, the strings under attributes among them."""
    bodies = [getattr(node, "body", None) for node in ast.walk(ast.parse(source))]
    return [
        (statement.lineno, statement.value.value)
        for body in bodies
        if isinstance(body, list)  # the body of a lambda or of a conditional is an expression
        for statement in body
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ]


def single_backticks(text: str) -> list[str]:
    return re.findall(r"`[^`]*`?", MARKUP.sub("", text))


def test_single_backticks_are_found_and_markup_is_not():
    text = "``a`` and :func:`b`, `c <https://d>`_, but `e` and\n`f\ng`; ``h`i``"
    assert single_backticks(text) == ["`e`", "`f\ng`"]
    assert docstrings('"""A."""\ndef f():\n    """B."""\n    return "C"') == [(1, "A."), (3, "B.")]


@pytest.mark.parametrize("room", ROOMS)
def test_code_in_docstrings_has_double_backticks_or_a_role(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert not [
        f"{path.relative_to(ROOT)}:{line}: {found}"
        for path in files
        for line, text in docstrings(path.read_text(encoding="utf-8"))
        for found in single_backticks(text)
    ]
