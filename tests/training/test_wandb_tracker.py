"""The tracker for Weights & Biases, against a module that records what it is asked for."""

import sys
import types

import pytest
import torch

from pyro_flowkit import SplineFlow, fit
from pyro_flowkit.training import WandbTracker


class FakeRun:
    def __init__(self, options) -> None:
        self.options, self.rows, self.axes = options, [], []
        self.summary: dict[str, object] = {}
        self.exit_code = None

    def define_metric(self, name, step_metric) -> None:
        self.axes.append((name, step_metric))

    def log(self, row) -> None:
        self.rows.append(row)

    def finish(self, exit_code) -> None:
        self.exit_code = exit_code


@pytest.fixture
def runs(monkeypatch):
    made = []

    def init(**options):
        made.append(FakeRun(options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return made


def test_a_fit_is_a_run_with_settings_rows_and_summary(runs):
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    tracker = WandbTracker("moons", name="first", mode="offline")
    assert runs == []  # nothing is opened before the start
    fit(SplineFlow(2), data=x, max_steps=3, seed=0, trackers=[tracker], progress=False)
    (run,) = runs
    assert run.options["project"] == "moons" and run.options["name"] == "first"
    assert run.options["reinit"] == "create_new"  # a run that is open is left alone
    assert run.options["config"]["max_steps"] == "3"
    assert run.axes == [("*", "step")]
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert all({"elbo", "learning_rate", "grad_norm"} <= row.keys() for row in run.rows)
    assert run.summary["stop_reason"] == "max_steps"
    assert run.exit_code == 0


@pytest.mark.parametrize(("run_id", "resume"), [("seed-0", "allow"), (None, None)])
def test_a_run_with_an_id_is_continued(runs, run_id, resume):
    WandbTracker(run_id=run_id).start({}, 40)
    assert (runs[0].options["id"], runs[0].options["resume"]) == (run_id, resume)


def test_rows_beyond_max_points_are_thinned(runs):
    tracker = WandbTracker(interval=3600.0, max_points=10)
    tracker.start({}, 0)
    for step in range(1, 101):
        tracker.log(step, {"elbo": -1.0})
    tracker.end({})
    assert [row["step"] for row in runs[0].rows] == [*range(10, 101, 10)]


@pytest.mark.parametrize(
    ("reason", "code"), [("interrupted", 1), ("non-finite loss at step 3", 1), ("tolerance", 0)]
)
def test_a_run_that_was_cut_off_is_marked_as_failed(runs, reason, code):
    tracker = WandbTracker()
    tracker.start({}, 0)
    tracker.end({"stop_reason": reason})
    assert runs[0].exit_code == code


def test_a_run_is_ended_where_its_last_rows_cannot_be_written(runs):
    tracker = WandbTracker(interval=3600.0)
    tracker.start({}, 0)
    tracker.log(1, {"elbo": -1.0})
    runs[0].log = lambda row: 1 / 0
    with pytest.raises(ZeroDivisionError):
        tracker.end({})
    assert runs[0].exit_code == 0


def test_missing_wandb_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        WandbTracker()
