"""``score``, ``sample``, ``compare`` and ``diagnose``: round trips, units, verdicts that follow from the numbers."""

import json

import numpy as np
import pandas as pd
import pytest

from pyro_flowkit.__main__ import main
from pyro_flowkit.command_line.runs import read_run
from tests.tables.small import FIT


def scores(folder, path, out):
    assert main(["score", str(folder), str(path), "-o", str(out)]) == 0
    return pd.read_csv(out)["log_prob"].to_numpy()


def test_scores_of_the_test_rows_are_those_that_fit_reported(trained, tmp_path):
    folder, path = trained
    found = scores(folder, path, tmp_path / "scores.csv")
    assert len(found) == 400
    test = pd.read_csv(folder / "test.csv")
    np.testing.assert_allclose(found[test["row"]], test["log_prob"], rtol=0, atol=1e-5)
    reported = read_run(folder).metrics["test"]["log_prob"][0]
    assert found[test["row"]].mean() == pytest.approx(reported, abs=1e-5)


def test_a_score_depends_neither_on_other_rows_nor_on_the_order_of_columns(trained, tmp_path):
    folder, path = trained
    whole = scores(folder, path, tmp_path / "whole.csv")
    part = pd.read_csv(path).iloc[[7, 3]][["visits", "height", "bent"]].assign(other="text")
    part.to_csv(tmp_path / "part.csv", index=False)
    found = scores(folder, tmp_path / "part.csv", tmp_path / "found.csv")
    np.testing.assert_allclose(found, whole[[7, 3]], rtol=0, atol=1e-5)


def test_scores_follow_a_change_of_units(trained, tmp_path):
    folder, path = trained
    centimetres = pd.read_csv(path)
    metres = centimetres.assign(height=centimetres["height"] / 100.0)
    metres.to_csv(tmp_path / "metres.csv", index=False)
    options = ["--steps", "120", "--width", "16", "--layers", "3", "--seed", "3"]
    command = ["fit", str(tmp_path / "metres.csv"), "-o", str(tmp_path / "run"), *options]
    assert main(command) == 0
    own, other = (
        read_run(run).metrics["test"]["log_prob"][0] for run in (tmp_path / "run", folder)
    )
    assert own - other == pytest.approx(np.log(100.0), abs=0.02)


def test_scores_and_samples_go_to_stdout_as_csv(trained, capsys):
    folder, path = trained
    capsys.readouterr()
    assert main(["score", str(folder), str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "row,log_prob" and len(lines) == 401
    assert [line.split(",")[0] for line in lines[1:4]] == ["0", "1", "2"]
    assert main(["sample", str(folder), "-n", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "height,bent,visits"


def test_draws_have_the_columns_and_the_units_of_the_table(trained, tmp_path):
    folder, path = trained
    out = tmp_path / "draws.csv"
    assert main(["sample", str(folder), "-n", "5000", "-o", str(out), "--seed", "1"]) == 0
    draws, data = pd.read_csv(out), pd.read_csv(path)
    assert list(draws.columns) == list(data.columns) and len(draws) == 5000
    assert draws["visits"].dtype.kind == "i"
    for name in data:
        spread = data[name].std()
        assert abs(draws[name].mean() - data[name].mean()) < 0.25 * spread
        assert 0.7 < draws[name].std() / spread < 1.4


def test_draws_follow_the_seed(trained, capsys):
    folder, _ = trained
    capsys.readouterr()
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["sample", str(folder), "-n", "5", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_runs_of_the_same_test_rows_are_compared(trained, table, tmp_path, capsys):
    folder, _ = trained
    other = tmp_path / "other"
    options = ["--steps", "40", "--width", "8", "--layers", "1", "--seed", "3"]
    assert main(["fit", str(table), "-o", str(other), *options]) == 0
    capsys.readouterr()
    assert main(["compare", str(folder), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("40 test rows")
    assert {line.split()[0] for line in lines[2:5]} == {str(folder), str(other), "full-covariance"}
    best, *rest = (float(line.split()[-4]) for line in lines[2:5])
    assert best == pytest.approx(max(best, *rest))
    expected = read_run(folder).metrics["test"]["log_prob"][0]
    (own,) = (line for line in lines if line.startswith(f"{folder} "))
    assert float(own.split()[1]) == pytest.approx(expected, abs=1e-4)


def test_runs_of_other_rows_columns_or_data_are_not_compared(trained, table, tmp_path, fails):
    folder, _ = trained

    def fit(name, data, *options):
        assert main(["fit", str(data), "-o", str(tmp_path / name), *FIT, *options]) == 0
        return tmp_path / name

    assert "test rows (another --seed), got" in fails("compare", folder, fit("seed", table))
    fewer = fit("columns", table, "--columns", "height", "bent", "--seed", "3")
    assert "the same columns, got" in fails("compare", folder, fewer)
    pd.read_csv(table).iloc[:-1].to_csv(tmp_path / "shorter.csv", index=False)
    shorter = fit("data", tmp_path / "shorter.csv", "--seed", "3")
    assert "the same data, got" in fails("compare", folder, shorter)
    kept = fit("kept", table, "--discrete", "keep", "--seed", "3")
    assert "the same data, got" in fails("compare", folder, kept)
    assert "every run once" in fails("compare", folder, folder)


def test_diagnose_says_what_came_out(trained, capsys):
    folder, _ = trained
    capsys.readouterr()
    assert main(["diagnose", str(folder)]) == 0
    out = capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"{metrics['test']['difference'][0]:.3f} nats per test row" in out
    for words in (
        "above the full-covariance Gaussian",
        "overfitting:",
        "max_steps",
        "skipped steps",
    ):
        assert words in out
