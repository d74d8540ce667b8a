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
from pyro_flowkit.command_line import density, runs
from pyro_flowkit.command_line.flow import FlowSettings, TableFlow
from pyro_flowkit.command_line.order import order_columns
from pyro_flowkit.command_line.runs import read_run
from pyro_flowkit.command_line.tables import split_rows
from tests.command_line.small import FIT

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


def test_the_split_is_80_10_10_by_the_seed():
    split = split_rows(1003, 3, seed=5)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [802, 100, 101]
    order = np.random.default_rng(5).permutation(1003)
    assert np.concatenate([split.train, split.validation, split.test]).tolist() == order.tolist()


def test_a_flow_without_a_gain_on_validation_rows_gives_way_to_the_gaussian(tmp_path, capsys):
    rows = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 5)), columns=list("abcde"))
    rows.to_csv(tmp_path / "noise.csv", index=False)
    options = ["--steps", "30", "--lr", "0.05", *SMALL]
    assert main(["fit", str(tmp_path / "noise.csv"), "-o", str(tmp_path / "run"), *options]) == 0
    assert "the Gaussian is kept" in capsys.readouterr().out
    run = read_run(tmp_path / "run")
    assert run.metrics["kept"] == "gaussian" and run.density.flow is None
    assert run.metrics["test"]["difference"] == [0.0, 0.0]
    assert main(["diagnose", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.startswith("usable: the flow gained nothing")


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([1.0, 1.2, 0.8], True),
        ([-1.0, 1.3, -0.2], False),
        ([1.0, 2.0, 0.0, -1.0, 1.0], False),
        ([1.0, float("nan")], False),
        ([5.0], False),
    ],
)
def test_a_gain_must_exceed_two_standard_errors(gains, kept):
    assert density.is_gain(torch.tensor(gains)) is kept


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


@pytest.mark.parametrize(("columns", "layers"), [(1, 1), (2, 1), (5, 3), (9, 9), (4, 11)])
def test_a_fresh_flow_is_standard_normal_and_a_trained_one_a_density(columns, layers):
    flow = TableFlow(columns, FlowSettings(layers=layers, width=8))
    w = torch.randn(50, columns)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(w).sum(-1)
    torch.testing.assert_close(flow.log_prob(w), normal, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: _base_of(flow, x)))(w[:3])
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(_base_of(flow, w[:3])).sum(-1)
    torch.testing.assert_close(
        flow.log_prob(w[:3]), expected + jacobian.slogdet()[1], rtol=1e-4, atol=1e-4
    )


def test_the_column_that_the_others_explain_is_transformed_next_to_the_data():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 1000))
    explained = np.sin(2.0 * a) * b + 0.1 * rng.normal(size=1000)
    order = order_columns(torch.from_numpy(np.column_stack([a, explained, b, c])))
    assert sorted(order) == [0, 1, 2, 3] and order[-1] == 1
    flow = TableFlow(4, FlowSettings(order=order, layers=6, width=8))
    with torch.no_grad():
        for parameter in flow.layers[
            -3
        ].parameters():  # before a permutation and the columns' splines
            parameter.add_(0.3 * torch.randn_like(parameter))
    w = torch.randn(20, 4)
    moved = (_base_of(flow, w) - w).abs().amax(0) > 1e-4
    assert moved.tolist() == [False, True, False, False]


def test_an_order_must_hold_every_column_once():
    with pytest.raises(ValueError, match="order of 3 columns"):
        TableFlow(3, FlowSettings(order=(0, 1, 1)))


def _base_of(flow, w):
    for layer in reversed(flow.layers):
        w = layer.inverse_and_ladj(w)[0]
    return w


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


def test_steps_follow_the_rows_within_limits():
    few, some, many = (density.default_steps(rows, 256) for rows in (100, 20_000, 10**6))
    assert density.LEAST_STEPS == few < some < many == density.MOST_STEPS


def test_networks_alone_decay_and_the_less_the_more_rows_there_are():
    decays = [density.weight_decay(rows) for rows in (100, 16_000, 32_000)]
    assert decays == pytest.approx([1.0, 0.25, 0.0625])
    flow = TableFlow(3, FlowSettings(width=8))
    decaying, other = density._optimizer(flow, 0.5, list(flow.parameters()), lr=0.1).param_groups
    assert (decaying["weight_decay"], other["weight_decay"]) == (0.5, 0.0)
    assert len(decaying["params"]) == 3 and len(other["params"]) == 1


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
