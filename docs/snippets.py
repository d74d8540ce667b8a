"""The programs in the pages: run them, and write below each what it printed.

    python docs/snippets.py                     # all pages and the README
    python docs/snippets.py docs/start.md

The ```` ```python ```` blocks of a page run in their order and share their names, each with the imports that it needs.
What a block prints stands in the ```` ```text ```` block after it. The tests run the same programs with a few steps.
"""

import argparse
import ast
import contextlib
import io
import os
import pkgutil
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyro

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = sorted(
    page
    for page in (ROOT / "README.md", *DOCS.rglob("*.md"))
    if not {"_build", "tutorials", "benchmark_results"} & set(page.relative_to(ROOT).parts)
)
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.M | re.S
)
# What the tests make of the calls in the pages: enough to see that they run.
FEW = {
    "pyro_flowkit.fit": {"max_steps": 10},
    "pyro.infer.MCMC": {"num_samples": 4, "warmup_steps": 2},
    "pyro_flowkit.diagnostics.from_svi": {"num_samples": 100, "max_samples": 100},
    "pyro_flowkit.diagnostics.evidence_bounds": {"num_samples": 1000, "max_samples": 1000},
    "pyro_flowkit.diagnostics.probe_modes": {"num_starts": 1, "num_samples": 100},
    "pyro_flowkit.diagnostics.inference_gaps": {"num_steps": 6, "num_samples": 10},
}


def programs(page: Path) -> list[str]:
    return [block["code"] for block in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def imports_of(code: str) -> set[str]:
    """The names that the imports of a program make."""
    return {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }


def names_in(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


@contextlib.contextmanager
def few_steps() -> Iterator[None]:
    """Let fits, chains and diagnostics end early, whatever is said of guides that have learned nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", UserWarning)
        for name, options in FEW.items():
            stack.enter_context(mock.patch(name, _with(pkgutil.resolve_name(name), options)))
        yield


def _with(function: Callable[..., Any], options: dict[str, int]) -> Callable[..., Any]:
    """The function with these options instead of what it is called with, where that is not less."""

    def briefly(*args: Any, **given: Any) -> Any:
        fewer = {name: min(given.get(name) or few, few) for name, few in options.items()}
        return function(*args, **given | fewer)

    return briefly


def run(page: Path) -> list[str]:
    """Run the programs of a page in an empty folder; returns what each printed."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    outputs, codes = [], programs(page)
    here = os.getcwd()
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for code in codes:
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(code, str(page), "exec"), namespace)
                outputs.append("\n".join(line.rstrip() for line in printed.getvalue().splitlines()))
        finally:
            os.chdir(here)
    return outputs


def write_outputs(page: Path) -> None:
    outputs = iter(run(page))
    text = page.read_text(encoding="utf-8")
    page.write_text(
        BLOCK.sub(
            lambda block: f"```python\n{block['code']}```\n\n```text\n{next(outputs)}\n```\n", text
        ),
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run the programs in the pages, and write what they print."
    )
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    for page in parser.parse_args().pages:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error", UserWarning
            )  # a program that is shown says nothing of faults
            write_outputs(page)
        print(page)


if __name__ == "__main__":
    main()
