"""Every tutorial runs from top to bottom (in its fast mode), and the notebook beside it is the same text, executed."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9][0-9]_*.py"))


def test_there_are_tutorials() -> None:
    assert TUTORIALS


@pytest.mark.parametrize("source", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs_without_warnings(source: Path) -> None:
    environment = {
        **os.environ,
        "PYRO_FLOWKIT_FAST": "1",
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(source)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("source", TUTORIALS, ids=lambda path: path.stem)
def test_notebook_is_the_executed_tutorial(source: Path) -> None:
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    expected = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == expected, (
        f"Expected {source.stem}.ipynb to hold the cells of {source.name}: run `make notebooks`."
    )
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
