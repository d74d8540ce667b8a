"""``fit``: what it prints, writes and keeps, and what of a run may be relied on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_flowkit.__main__ import main
from pyro_flowkit.command_line import runs
from pyro_flowkit.command_line.runs import read_run
from pyro_flowkit.tables.split import split_rows
from tests.tables.small import FIT

SMALL = ["--width", "16", "--layers", "3"]
ROOT = Path(__file__).parents[2]


def printed(pattern: str, text: str) -> float:
    found = re.search(pattern + r"\s+([+-]?\d+\.\d+)", text)
    assert found, text
    return float(found[1])


def test_it_beats_the_gaussian_and_prints_both_with_their_paired_difference(
    table, tmp_path, capsys
):
    assert main(["fit", str(table), "-o", str(tmp_path / "run"), "--steps", "80", *SMALL]) == 0
    out = capsys.readouterr().out
    flow, gaussian = printed("  flow", out), printed("  full-covariance Gaussian", out)
    assert printed("  difference", out) == pytest.approx(flow - gaussian, abs=2e-4)
    assert flow - gaussian > 0.3
    test = pd.read_csv(tmp_path / "run" / "test.csv")
    assert len(test) == 40
    difference = test["log_prob"] - test["gaussian"]
    (error,) = re.search(r"difference\s+\S+\s+s\.e\. (\S+)", out).groups()
    assert float(error) == pytest.approx(difference.std(ddof=1) / 40**0.5, abs=1e-4)


def test_the_gaussian_is_that_of_maximum_likelihood_in_the_units_of_the_file(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3)) * [1.0, 1e3, 1e-4] + [0, 1e5, 1.0]
    np.savez(tmp_path / "rows.npz", rows=rows)
    assert main(["fit", str(tmp_path / "rows.npz"), "-o", str(tmp_path / "run"), *FIT]) == 0
    split = split_rows(200, 3, 0)
    train = torch.from_numpy(rows[split.train])
    law = torch.distributions.MultivariateNormal(train.mean(0), train.mT.cov(correction=0))
    expected = law.log_prob(torch.from_numpy(rows[split.test]))
    written = pd.read_csv(tmp_path / "run" / "test.csv")
    assert written["row"].tolist() == split.test.tolist()
    torch.testing.assert_close(torch.tensor(written["gaussian"].to_numpy()), expected)


def test_a_flow_without_a_gain_on_validation_rows_gives_way_to_the_gaussian(tmp_path, capsys):
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(90, 5)), columns=list("abcde"))
    rows.to_csv(tmp_path / "noise.csv", index=False)
    options = ["--steps", "30", "--lr", "0.05", *SMALL]
    assert main(["fit", str(tmp_path / "noise.csv"), "-o", str(tmp_path / "run"), *options]) == 0
    assert "the Gaussian is kept" in capsys.readouterr().out
    run = read_run(tmp_path / "run")
    assert run.metrics["kept"] == "gaussian" and run.density.flow is None
    assert run.metrics["test"]["difference"] == [0.0, 0.0]
    assert main(["diagnose", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("usable: the flow gained nothing")


def test_the_same_seed_gives_the_same_run(table, tmp_path):
    for name in ("first", "second"):
        assert main(["fit", str(table), "-o", str(tmp_path / name), *FIT, "--seed", "4"]) == 0
    first, second = ((tmp_path / name / "test.csv").read_text() for name in ("first", "second"))
    assert first == second


def test_a_run_is_plain_files(trained):
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "run.json",
        "preparation.json",
        "metrics.json",
        "flow.pt",
        "history.csv",
        "validation.csv",
        "test.csv",
    }
    assert len(pd.read_csv(folder / "history.csv")) == 120
    state = torch.load(folder / "flow.pt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    info = json.loads((folder / "run.json").read_text())
    assert info["settings"]["width"] == 16 and info["data"]["columns"] == [
        "height",
        "bent",
        "visits",
    ]
    assert str(folder.parent) not in json.dumps(info)


def test_columns_are_chosen_by_name_and_discrete_ones_dropped_on_demand(table, tmp_path, capsys):
    command = ["fit", str(table), *FIT]
    assert main([*command, "-o", str(tmp_path / "a"), "--columns", "bent", "height"]) == 0
    assert read_run(tmp_path / "a").density.preparation.columns == ("bent", "height")
    assert main([*command, "-o", str(tmp_path / "b"), "--discrete", "drop"]) == 0
    assert "left out as discrete: visits" in capsys.readouterr().out
    assert read_run(tmp_path / "b").density.preparation.columns == ("height", "bent")
    assert main([*command, "-o", str(tmp_path / "c"), "--discrete", "keep"]) == 0
    assert read_run(tmp_path / "c").density.preparation.discrete == (False, False, False)


@pytest.mark.parametrize("columns", [1, 2])
def test_one_and_two_columns_train(columns, tmp_path):
    rows = np.random.default_rng(0).exponential(size=(100, columns))
    np.savetxt(tmp_path / "rows.csv", rows, delimiter=",")
    assert main(["fit", str(tmp_path / "rows.csv"), "-o", str(tmp_path / "run"), *FIT]) == 0
    assert read_run(tmp_path / "run").density.preparation.columns == ("0", "1")[:columns]


def test_a_failure_while_writing_leaves_nothing_behind(table, tmp_path, monkeypatch):
    def broken(content):
        raise RuntimeError("the disk is gone")

    monkeypatch.setattr(runs, "_text", broken)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        main(["fit", str(table), "-o", str(tmp_path / "run"), *FIT])
    assert [path.name for path in tmp_path.iterdir()] == ["data.csv"]


def test_a_failure_while_overwriting_leaves_the_old_run(table, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert main(["fit", str(table), "-o", str(folder), *FIT]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    moved = []

    def break_second(source, target):
        moved.append(source)
        if len(moved) == 2:
            raise OSError("no space left")
        Path(source).rename(target)

    monkeypatch.setattr(runs.os, "replace", break_second)
    assert main(["fit", str(table), "-o", str(folder), *FIT, "--overwrite", "--seed", "1"]) == 2
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "run"]
    assert main(["fit", str(table), "-o", str(folder), *FIT, "--overwrite", "--seed", "1"]) == 0
    assert read_run(folder).info["options"]["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv", "run"]


def test_a_process_of_its_own_gives_help_fits_and_draws_without_arviz_and_matplotlib(
    trained, tmp_path
):
    folder, path = trained
    code = """
import runpy, sys
from pyro_flowkit.__main__ import main
data, run, out = sys.argv[1:]
assert main(["fit", data, "-o", out + "/run", "--steps", "2", "--width", "8"]) == 0
assert main(["score", run, data, "-o", out + "/scores.csv"]) == 0
assert main(["sample", run, "-n", "3"]) == 0
print([name for name in ("arviz", "arviz_base", "arviz_stats", "matplotlib") if name in sys.modules])
del sys.modules["pyro_flowkit.__main__"]
sys.argv[1:] = ["--help"]
runpy.run_module("pyro_flowkit", run_name="__main__", alter_sys=True)
"""
    words = [sys.executable, "-c", code, str(path), str(folder), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "[]" in done.stdout.splitlines()
    for command in ("fit", "score", "sample", "compare", "diagnose"):
        assert f"\n    {command} " in done.stdout


def test_integers_are_counted_by_their_probability(tmp_path):
    # counts that do not depend on the other column: p(a, k) = N(a) P(k)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"a": rng.normal(size=1000), "k": rng.binomial(1, 0.3, size=1000)})
    table.to_csv(tmp_path / "coin.csv", index=False)
    options = ["--steps", "150", "--width", "8", "--layers", "2"]
    assert main(["fit", str(tmp_path / "coin.csv"), "-o", str(tmp_path / "run"), *options]) == 0
    exact = (
        torch.distributions.Normal(0.0, 1.0).entropy()
        + torch.distributions.Bernoulli(0.3).entropy()
    )
    test, _ = read_run(tmp_path / "run").metrics["test"]["log_prob"]
    assert test == pytest.approx(-float(exact), abs=0.15)
