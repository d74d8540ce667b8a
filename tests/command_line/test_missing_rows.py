"""Rows with missing values, from the file to the scores."""

import numpy as np
import pandas as pd

from pyro_flowkit.__main__ import main
from pyro_flowkit.command_line.runs import read_run
from tests.tables.small import FIT, table_with_holes


def test_the_command_line_keeps_the_numbers_of_the_rows(tmp_path, capsys, fails):
    holes = table_with_holes()
    path, run, scores = tmp_path / "holes.csv", tmp_path / "run", tmp_path / "scores.csv"
    holes.to_csv(path, index=False, na_rep="?")
    command = ["fit", str(path), "-o", str(run), "--na", "?"]
    assert "missing: drop or impute" in fails(*command)
    assert main([*command, *FIT, "--missing", "drop"]) == 0
    assert "80 rows with missing values left out" in capsys.readouterr().out
    assert fails("score", run, path, "--na", "?").endswith("leave them out (missing: drop)")
    assert (
        main(["score", str(run), str(path), "--na", "?", "--missing", "drop", "-o", str(scores)])
        == 0
    )
    assert "; 80 rows with missing values left out" in capsys.readouterr().err
    found = pd.read_csv(scores)
    assert found["row"].tolist() == [i for i in range(400) if i % 5]
    test = read_run(run).tables["test"]
    own = found.set_index("row")["log_prob"].loc[test["row"]]
    np.testing.assert_allclose(own, test["log_prob"], rtol=0, atol=1e-5)
    assert main([*command, *FIT, "--missing", "impute", "--overwrite"]) == 0
    assert "80 rows filled in from rows like them, to train only" in capsys.readouterr().out
    (tmp_path / "none.csv").write_text("height,bent,visits\n1.5,,3\n")
    assert "rows without missing values" in fails(
        "score", run, tmp_path / "none.csv", "--missing", "drop"
    )
