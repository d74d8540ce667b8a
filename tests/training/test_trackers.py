"""Trackers: files that survive a restart, libraries behind a buffer, and failures that leave the training alone."""

import csv
import math
import os
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import pytest

from pyro_flowkit.training.library_trackers import MLflowTracker, TensorBoardTracker
from pyro_flowkit.training.trackers import CsvTracker, safely


def metrics(step: int) -> dict[str, float]:
    return {
        "elbo": -1.0 / step,
        "learning_rate": 1e-3,
        "grad_norm": math.sqrt(step),
        "seconds": 0.1 * step,
    }


def log(tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log(step, metrics(step))


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# CSV


def test_csv_has_a_line_per_step_and_exact_values(tmp_path):
    path = tmp_path / "new" / "run.csv"
    tracker = CsvTracker(path)
    tracker.start({"lr": 1e-3}, 0)
    log(tracker, 1, 3)
    tracker.end({"stop_reason": "max_steps"})
    rows = table(path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    for step, row in enumerate(rows, 1):
        assert {name: float(row[name]) for name in metrics(step)} == metrics(step)
        assert row["validation"] == ""


def test_a_validation_goes_into_the_line_of_its_step(tmp_path):
    tracker = CsvTracker(tmp_path / "run.csv", interval=0.0)
    tracker.start({}, 0)
    log(tracker, 1, 2)
    tracker.log(2, {"validation": -1.25})
    log(tracker, 3, 3)
    tracker.end({})
    assert [row["validation"] for row in table(tmp_path / "run.csv")] == ["", "-1.25", ""]


def test_lines_are_written_while_the_fit_runs(tmp_path):
    tracker = CsvTracker(tmp_path / "run.csv", interval=0.0)
    tracker.start({}, 0)
    log(tracker, 1, 3)
    assert len(table(tmp_path / "run.csv")) == 2
    tracker.flush()
    assert len(table(tmp_path / "run.csv")) == 3


def test_rows_wait_until_the_interval_is_over(tmp_path):
    tracker = CsvTracker(tmp_path / "run.csv", interval=3600.0)
    tracker.start({}, 0)
    log(tracker, 1, 1000)
    assert table(tmp_path / "run.csv") == []
    tracker.end({})
    assert len(table(tmp_path / "run.csv")) == 1000


def test_a_resumed_run_continues_the_file_as_if_never_interrupted(tmp_path):
    whole, parts = CsvTracker(tmp_path / "whole.csv"), CsvTracker(tmp_path / "parts.csv")
    whole.start({}, 0)
    log(whole, 1, 9)
    whole.end({})
    parts.start({}, 0)
    log(parts, 1, 7)
    parts.flush()
    with open(tmp_path / "parts.csv", "a") as file:
        file.write("8,-0.1")  # killed in the midst of a line
    again = CsvTracker(tmp_path / "parts.csv")
    again.start({}, 4)
    assert [row["step"] for row in table(tmp_path / "parts.csv")] == ["1", "2", "3", "4"]
    log(again, 5, 9)
    again.end({})
    assert (tmp_path / "parts.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_cut_last_line_is_dropped_even_where_its_step_is_kept(tmp_path):
    path = tmp_path / "run.csv"
    tracker = CsvTracker(path)
    tracker.start({}, 0)
    log(tracker, 1, 2)
    tracker.flush()
    with open(path, "a") as file:
        file.write("3,-0.5,0.001,1.0,0.30,")  # complete but for the end of the line
    CsvTracker(path).start({}, 10)
    assert [row["step"] for row in table(path)] == ["1", "2"]


def test_a_new_metric_gets_a_column(tmp_path):
    path = tmp_path / "run.csv"
    tracker = CsvTracker(path, interval=0.0)
    tracker.start({}, 0)
    log(tracker, 1, 3)
    tracker.log(4, {**metrics(4), "kl_weight": 0.5})
    tracker.end({})
    assert [row["kl_weight"] for row in table(path)] == ["", "", "", "0.5"]
    assert [float(row["elbo"]) for row in table(path)] == [metrics(s)["elbo"] for s in (1, 2, 3, 4)]
    again = CsvTracker(path)
    again.start({}, 4)
    again.log(5, {**metrics(5), "kl_weight": 0.75})
    again.end({})
    assert [row["kl_weight"] for row in table(path)] == ["", "", "", "0.5", "0.75"]


def test_a_new_run_replaces_the_file_of_an_earlier_one(tmp_path):
    for _ in range(2):
        tracker = CsvTracker(tmp_path / "run.csv")
        tracker.start({}, 0)
        tracker.log(1, {"elbo": 1.0, "other": 2.0})
        tracker.end({})
    assert len(table(tmp_path / "run.csv")) == 1
    CsvTracker(tmp_path / "run.csv").start({}, 0)
    assert (tmp_path / "run.csv").read_text() == (
        "step,elbo,learning_rate,grad_norm,seconds,validation\n"
    )


@pytest.mark.parametrize("first_step", [0, 5])
@pytest.mark.parametrize("content", [b"x,y\n1,2\n", b"no end of line", b"\xff\x00\x01"])
def test_a_file_of_another_kind_is_left_alone(tmp_path, first_step, content):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Expected .*data.csv to be new or a file of CsvTracker"):
        safely([CsvTracker(path)]).start({}, first_step)
    assert path.read_bytes() == content


def test_an_interrupted_clean_up_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.csv"
    tracker = CsvTracker(path)
    tracker.start({}, 0)
    log(tracker, 1, 5)
    tracker.end({})
    before = path.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        CsvTracker(path).start({}, 2)
    assert path.read_bytes() == before


# What the loop uses


class Recorder:
    def __init__(self, fails_in: str = "", error: BaseException | None = None) -> None:
        self.fails_in, self.error = fails_in, error
        self.calls: list[str] = []

    def _note(self, hook: str) -> None:
        self.calls.append(hook)
        if hook == self.fails_in:
            raise self.error or OSError("disk full")

    def start(self, settings, first_step) -> None:
        self._note("start")

    def log(self, step, metrics) -> None:
        self._note("log")

    def end(self, summary) -> None:
        self._note("end")


@pytest.mark.parametrize("hook", ["start", "log", "end"])
def test_a_failing_tracker_is_left_out_with_one_warning(hook):
    failing, sound = Recorder(hook), Recorder()
    trackers = safely([failing, sound])
    with pytest.warns(
        RuntimeWarning, match=f"Recorder failed in {hook} .*OSError: disk full"
    ) as seen:
        trackers.start({}, 0)
        log(trackers, 1, 3)
        trackers.flush()
        trackers.end({})
    assert len(seen) == 1
    assert failing.calls[-1] == hook and failing.calls.count(hook) == 1
    assert sound.calls == ["start", "log", "log", "log", "end"]
    assert trackers


def test_no_tracker_left_is_false():
    trackers = safely([Recorder("log")])
    with pytest.warns(RuntimeWarning):
        trackers.log(1, {})
    assert not trackers
    assert not safely([])


def test_ctrl_c_in_a_tracker_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        safely([Recorder("log", KeyboardInterrupt())]).log(1, {})


def test_a_mistake_of_the_caller_is_raised_at_the_start_and_only_there():
    with pytest.raises(ValueError, match="bad path"):
        safely([Recorder("start", ValueError("bad path"))]).start({}, 0)
    with pytest.warns(RuntimeWarning, match="bad value"):
        safely([Recorder("log", ValueError("bad value"))]).log(1, {})


def test_what_is_no_tracker_is_refused():
    with pytest.raises(TypeError, match="got str without start, log, end"):
        safely(["run.csv"])


def test_a_file_that_cannot_be_written_any_more_does_not_stop_the_training(tmp_path):
    path = tmp_path / "run.csv"
    trackers = safely([CsvTracker(path, interval=0.0)])
    trackers.start({}, 0)
    log(trackers, 1, 2)
    path.unlink()
    path.mkdir()
    with pytest.warns(RuntimeWarning, match="CsvTracker failed in log"):
        log(trackers, 3, 5)
    assert not trackers


# TensorBoard


class FakeWriter:
    def __init__(self, log_dir, **options) -> None:
        self.log_dir, self.options = log_dir, options
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: dict[str, str] = {}
        self.closed = False

    def add_scalar(self, name, value, step) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name, text, step) -> None:
        self.texts[name] = text

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    made = []

    def make(*args, **kwargs):
        made.append(FakeWriter(*args, **kwargs))
        return made[-1]

    module = types.SimpleNamespace(SummaryWriter=make)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def test_tensorboard_gets_scalars_settings_and_summary(writers, tmp_path):
    tracker = TensorBoardTracker(tmp_path)
    assert writers == []  # nothing is written before the start
    tracker.start({"lr": 0.5}, 0)
    log(tracker, 1, 3)
    tracker.log(3, {"validation": -2.0})
    tracker.end({"stop_reason": "max_steps"})
    (writer,) = writers
    assert writer.options == {}
    assert [step for name, _, step in writer.scalars if name == "elbo"] == [1, 2, 3]
    assert ("validation", -2.0, 3) in writer.scalars
    assert "| lr | 0.5 |" in writer.texts["settings"]
    assert "| stop_reason | max_steps |" in writer.texts["summary"]
    assert writer.closed


def test_tensorboard_of_a_resumed_run_hides_the_steps_done_again(writers, tmp_path):
    TensorBoardTracker(tmp_path).start({}, 40)
    assert writers[0].options == {"purge_step": 41}


def test_more_rows_than_points_are_thinned_evenly_and_validations_kept(writers, tmp_path):
    tracker = TensorBoardTracker(tmp_path, interval=3600.0, max_points=10)
    tracker.start({}, 0)
    for step in range(1, 1001):
        tracker.log(step, metrics(step))
        if step == 333:
            tracker.log(step, {"validation": -2.0})
    tracker.end({})
    steps = [step for name, _, step in writers[0].scalars if name == "elbo"]
    assert steps == sorted([*range(100, 1001, 100), 333])
    assert [step for name, _, step in writers[0].scalars if name == "validation"] == [333]


def test_missing_tensorboard_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        TensorBoardTracker(tmp_path)


def test_tensorboard_reads_the_files(tmp_path):
    reason = "reads what TensorBoard wrote, which is an optional library"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        accumulator = pytest.importorskip(
            "tensorboard.backend.event_processing.event_accumulator", reason=reason
        )
        tracker = TensorBoardTracker(tmp_path)
    tracker.start({"lr": 0.5}, 0)
    log(tracker, 1, 6)
    tracker.end({"stop_reason": "interrupted"})
    time.sleep(1.1)  # event files are named after the second
    again = TensorBoardTracker(tmp_path)
    again.start({}, 4)
    log(again, 5, 5)
    again.end({})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    elbo = events.Scalars("elbo")
    assert [point.step for point in elbo] == [1, 2, 3, 4, 5]
    assert [point.value for point in elbo] == pytest.approx([-1, -1 / 2, -1 / 3, -1 / 4, -1 / 5])


# MLflow


class FakeClient:
    """One server for all clients: runs by id, experiments by name."""

    runs: dict[str, types.SimpleNamespace]
    experiments: dict[str, str]
    gate: threading.Event

    def __init__(self, tracking_uri=None) -> None:
        self.uri = tracking_uri

    def get_experiment_by_name(self, name):
        found = self.experiments.get(name)
        return None if found is None else types.SimpleNamespace(experiment_id=found)

    def create_experiment(self, name):
        self.experiments[name] = f"id of {name}"
        return self.experiments[name]

    def create_run(self, experiment_id, run_name=None):
        run_id = f"run {len(self.runs)}"
        self.runs[run_id] = types.SimpleNamespace(
            info=types.SimpleNamespace(run_id=run_id),
            data=types.SimpleNamespace(params={}),
            name=run_name,
            metrics=[],
            tags={},
            status="RUNNING",
            requests=[],
        )
        return self.runs[run_id]

    def search_runs(self, experiment_ids, filter_string, order_by, max_results):
        found = [r for r in self.runs.values() if f"'{r.name}'" in filter_string]
        return found[::-1][:max_results]

    def log_batch(self, run_id, metrics=(), params=(), tags=()):
        assert len(metrics) <= 1000 and len(params) <= 100
        if metrics:
            self.gate.wait(20.0)
            self.runs[run_id].requests.append(len(metrics))
        self.runs[run_id].metrics += metrics
        self.runs[run_id].data.params.update(params)
        self.runs[run_id].tags.update(tags)

    def update_run(self, run_id, status):
        self.runs[run_id].status = status

    set_terminated = update_run


@pytest.fixture
def mlflow(monkeypatch):
    gate = threading.Event()
    gate.set()
    client = type("Client", (FakeClient,), {"runs": {}, "experiments": {}, "gate": gate})
    entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (key, value, step),
        Param=lambda key, value: (key, value),
        RunTag=lambda key, value: (key, value),
    )
    module = types.SimpleNamespace(MlflowClient=client, entities=entities)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    yield client
    gate.set()


def steps_of(run, name="elbo") -> list[int]:
    return [step for key, _, step in run.metrics if key == name]


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("max_steps", "FINISHED"),
        ("interrupted", "KILLED"),
        ("non-finite at step 3: loss nan", "FAILED"),
    ],
)
def test_mlflow_gets_metrics_settings_and_how_it_ended(mlflow, reason, status):
    tracker = MLflowTracker(experiment="seeds", run_name="first")
    tracker.start({f"option {i}": i for i in range(150)}, 0)
    log(tracker, 1, 5)
    tracker.log(5, {"validation": -2.0})
    tracker.end({"stop_reason": reason, "best_step": 4})
    (run,) = mlflow.runs.values()
    assert mlflow.experiments == {"seeds": "id of seeds"}
    assert steps_of(run) == [1, 2, 3, 4, 5]
    assert ("validation", -2.0, 5) in run.metrics
    assert len(run.data.params) == 150 and run.data.params["option 7"] == "7"
    assert run.tags == {"stop_reason": reason, "best_step": "4"}
    assert run.status == status


def test_mlflow_continues_the_run_of_the_same_name(mlflow):
    for first, last in ((0, 3), (3, 6)):
        tracker = MLflowTracker(experiment="seeds", run_name="one")
        tracker.start({"max_steps": last}, first)
        log(tracker, first + 1, last)
        tracker.end({"stop_reason": "max_steps"})
    (run,) = mlflow.runs.values()
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert run.data.params == {"max_steps": "3"}  # MLflow lets no parameter change


def test_mlflow_begins_a_new_run_where_there_is_none_to_continue(mlflow):
    MLflowTracker(run_name="one").start({}, 0)
    MLflowTracker(run_name="one").start({}, 0)
    MLflowTracker(run_name="other").start({}, 5)
    MLflowTracker().start({}, 5)
    assert [run.name for run in mlflow.runs.values()] == ["one", "one", "other", None]


def test_a_slow_server_does_not_hold_up_the_training(mlflow):
    tracker = MLflowTracker(interval=0.0, max_points=50)
    tracker.start({}, 0)
    mlflow.gate.clear()  # requests hang from here on
    begun = time.perf_counter()
    log(tracker, 1, 5000)
    assert time.perf_counter() - begun < 10.0
    assert len(tracker._rows) <= 51
    mlflow.gate.set()
    tracker.end({})
    (run,) = mlflow.runs.values()
    assert steps_of(run)[0] == 1 and steps_of(run)[-1] == 5000
    assert steps_of(run) == sorted(steps_of(run))


def test_a_server_that_is_gone_ends_the_tracking_only(mlflow, monkeypatch):
    trackers = safely([MLflowTracker(interval=0.0)])
    trackers.start({}, 0)

    def gone(*args, **kwargs):
        raise ConnectionError("server is gone")

    monkeypatch.setattr(mlflow, "log_batch", gone)
    with pytest.warns(RuntimeWarning, match="MLflowTracker failed in .*server is gone"):
        log(trackers, 1, 10)
        trackers.end({})
    assert not trackers


def test_a_server_that_never_answers_is_given_up(mlflow):
    tracker = MLflowTracker()
    tracker.patience = 0.05
    trackers = safely([tracker])
    trackers.start({}, 0)
    log(trackers, 1, 3)
    mlflow.gate.clear()
    with pytest.warns(RuntimeWarning, match="MLflowTracker failed in end .*no answer from MLflow"):
        trackers.end({})


def test_missing_mlflow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match="pip install mlflow"):
        MLflowTracker()


def test_mlflow_itself_reads_the_run(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        mlflow = pytest.importorskip(
            "mlflow", reason="reads what MLflow wrote, which is an optional library"
        )
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder needs no database driver
    uri = tmp_path.as_uri()
    for first, last in ((0, 4), (4, 6)):
        tracker = MLflowTracker(experiment="seeds", run_name="it's one", tracking_uri=uri)
        tracker.start({"lr": 0.5}, first)
        log(tracker, first + 1, last)
        tracker.end({"stop_reason": "interrupted" if last == 4 else "max_steps"})
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("seeds")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "it's one" and run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.5"}
    assert run.data.tags["stop_reason"] == "max_steps"
    history = client.get_metric_history(run.info.run_id, "elbo")
    assert [(point.step, point.value) for point in history] == [(s, -1 / s) for s in range(1, 7)]
    assert mlflow.active_run() is None
