"""Every file of the zoo is read with the right numbers, or refused in plain words; and nothing is touched."""

import numpy as np
import pytest

from pyro_flowkit.__main__ import main
from pyro_flowkit.command_line.dialect import ReadOptions
from pyro_flowkit.command_line.reading import read_table
from tests.command_line.zoo import REFUSED, TABLES
from tests.tables.small import FIT


@pytest.mark.parametrize("animal", TABLES, ids=[animal.name for animal in TABLES])
def test_tables_are_read_with_the_right_names_and_numbers(animal, tmp_path):
    path = tmp_path / animal.name
    path.write_bytes(animal.content)
    options = dict(animal.options)
    columns = options.pop("columns", None)
    source = read_table(path, ReadOptions(**options))
    frame = source.frame if columns is None else source.frame[list(columns)]
    assert tuple(frame.columns) == animal.names
    np.testing.assert_allclose(frame.to_numpy(np.float64), animal.values, rtol=1e-12)
    assert animal.notes in source.notes
    assert path.read_bytes() == animal.content


@pytest.mark.parametrize("animal", REFUSED, ids=[animal.name for animal in REFUSED])
def test_what_is_no_table_is_refused_in_words(animal, tmp_path, fails):
    path = tmp_path / animal.name
    path.write_bytes(animal.content)
    assert animal.words in fails("fit", path, "-o", tmp_path / "run", "--steps", "1")
    assert path.read_bytes() == animal.content and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name", ["german.csv", "years-index.csv", "table.csv.xz", "latin-1.csv", "savetxt.txt"]
)
def test_a_handful_is_fitted_scored_and_drawn(name, tmp_path, capsys):
    (animal,) = (animal for animal in TABLES if animal.name == name)
    path, run = tmp_path / animal.name, tmp_path / "run"
    path.write_bytes(animal.content)
    assert main(["fit", str(path), "-o", str(run), *FIT]) == 0
    assert animal.notes in capsys.readouterr().out
    assert main(["score", str(run), str(path)]) == 0
    scores = np.loadtxt(capsys.readouterr().out.splitlines()[1:], delimiter=",")
    assert scores.shape == (30, 2) and np.isfinite(scores).all()
    assert main(["sample", str(run), "-n", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == ",".join(animal.names)


def test_the_zoo_has_at_least_sixty_files():
    assert len({animal.name for animal in [*TABLES, *REFUSED]}) == len(TABLES) + len(REFUSED) >= 60
