"""A table in a file, a run on it that all tests read, and commands that must fail."""

import pytest

from pyro_flowkit.__main__ import main
from tests.tables.small import small_table


@pytest.fixture
def table(tmp_path):
    """Path of a CSV file."""
    path = tmp_path / "data.csv"
    small_table().to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(run folder, table) of a short training; for reading only."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "data.csv"
    small_table().to_csv(path, index=False)
    options = ["--steps", "120", "--width", "16", "--layers", "3", "--seed", "3"]
    assert main(["fit", str(path), "-o", str(folder / "run"), *options]) == 0
    return folder / "run", path


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail with one line on stderr; returns the line."""

    def run(*argv):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        captured = capsys.readouterr()
        lines = captured.err.strip().split("\n")
        assert len(lines) == 1 and lines[0].startswith("pyro-flowkit: error: expected")
        return lines[0]

    return run
