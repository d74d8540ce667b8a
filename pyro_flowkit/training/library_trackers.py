"""Trackers for TensorBoard, MLflow and Weights & Biases, which are loaded when a tracker is made.

Each costs time by the point, some 0.1 milliseconds and more. Where more rows than ``max_points`` have come together
since they were last written, evenly spaced ones are taken, and rows with a validation always; slow fits are complete.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from pyro_flowkit.training.trackers import BufferedTracker, Row, Settings


class TensorBoardTracker(BufferedTracker):
    """Scalars for TensorBoard, settings and summary as text. A resumed run hides the steps done again.

    Args:
        log_dir: Folder of the event files.
        interval: Seconds between writes.
        max_points: Most points per write.

    Raises:
        ImportError: If TensorBoard is not installed.

    Example:
        >>> from pathlib import Path
        >>> from pyro_flowkit.training import TensorBoardTracker
        >>> tracker = TensorBoardTracker("logs")  # fit(..., trackers=[tracker]) does the rest
        >>> tracker.start({"lr": 0.003}, 0)
        >>> tracker.log(1, {"elbo": -2.5})
        >>> tracker.end({"stop_reason": "max_steps"})
        >>> [path.name.split(".")[0] for path in Path("logs").iterdir()]
        ['events']
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], *, interval: float = 1.0, max_points: int = 50
    ) -> None:
        super().__init__(interval)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "Expected TensorBoard for TensorBoardTracker, got none: pip install tensorboard"
            ) from error
        self._make_writer: Callable[..., Any] = SummaryWriter
        self._log_dir, self._max_points = os.fspath(log_dir), max_points
        self._writer: Any = None

    def start(self, settings: Settings, first_step: int) -> None:
        """Opens an event file."""
        purge = {"purge_step": first_step + 1} if first_step else {}
        self._writer = self._make_writer(self._log_dir, **purge)
        self._writer.add_text("settings", _table(settings), first_step)

    def end(self, summary: Settings) -> None:
        """Writes what is left and closes the file."""
        last_step = self._rows[-1][0] if self._rows else 0
        try:
            self.flush()
            self._writer.add_text("summary", _table(summary), last_step)
        finally:
            self._writer.close()

    def _write(self, rows: list[Row]) -> None:
        for step, metrics in _thin(rows, self._max_points):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
        self._writer.flush()


class MLflowTracker(BufferedTracker):
    """Metrics, parameters (the settings) and tags (the summary) of one MLflow run.

    Requests run in a thread of their own, so that a slow server does not hold up the training; one that has not
    answered after a minute, at the start or at the end, is given up. A resumed fit continues the latest run of the same
    name, where ``run_name`` is given; MLflow cannot forget metrics, so it keeps both values of a step that was done
    twice. MLflow's own active run is left alone.

    Args:
        experiment: Name of the experiment; made if missing.
        run_name: Name of the run; None lets MLflow choose, and then a resumed fit is a new run.
        tracking_uri: Server or database; None takes MLflow's own setting.
        interval: Seconds between requests.
        max_points: Most steps per request.

    Raises:
        ImportError: If MLflow is not installed.

    Example:
        >>> from pyro_flowkit.training import MLflowTracker
        >>> tracker = MLflowTracker(experiment="seeds", run_name="first")  # fit(..., trackers=[tracker]) does the rest
        >>> tracker.start({"lr": 0.003}, 0)
        >>> tracker.log(1, {"elbo": -2.5})
        >>> tracker.end({"stop_reason": "max_steps"})
    """

    patience = 60.0

    def __init__(
        self,
        *,
        experiment: str = "Default",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        interval: float = 2.0,
        max_points: int = 200,
    ) -> None:
        super().__init__(interval)
        try:
            from mlflow import MlflowClient, entities
        except ImportError as error:
            raise ImportError(
                "Expected MLflow for MLflowTracker, got none: pip install mlflow"
            ) from error
        self._make_client: Callable[..., Any] = MlflowClient
        self._entities: Any = entities
        self._experiment, self._run_name, self._tracking_uri = experiment, run_name, tracking_uri
        self._max_points = max_points
        self._client: Any = None
        self._run_id = ""
        self._worker = _Worker()
        self._request: Future[None] | None = None

    def start(self, settings: Settings, first_step: int) -> None:
        """Opens a run, or the one to be continued."""
        self._rows, self._request = [], None
        self._wait(self._worker.submit(self._open, dict(settings), first_step))

    def end(self, summary: Settings) -> None:
        """Writes what is left and ends the run: FINISHED, KILLED if interrupted, FAILED if non-finite."""
        if self._request is not None:
            self._wait(self._request)
        rows, self._rows = _thin(self._rows, self._max_points), []
        request = self._worker.submit(self._close, rows, dict(summary))
        self._worker.stop()
        self._wait(request)

    def _wait(self, request: Future[None]) -> None:
        try:
            request.result(self.patience)
        except TimeoutError:
            if request.done():
                raise
            raise TimeoutError(f"no answer from MLflow in {self.patience:g} seconds") from None

    def _write(self, rows: list[Row]) -> None:
        rows = _thin(rows, self._max_points)
        if self._request is not None:
            if not self._request.done():
                self._rows = rows  # they go with the next ones
                return
            self._request.result()  # raises what the thread met
        self._request = self._worker.submit(self._send, rows)

    def _open(self, settings: dict[str, Any], first_step: int) -> None:
        self._client = client = self._make_client(tracking_uri=self._tracking_uri)
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            experiment_id = client.create_experiment(self._experiment)
        else:
            experiment_id = experiment.experiment_id
        run = self._earlier_run(experiment_id) if first_step else None
        known: Mapping[str, str] = {}
        if run is None:
            run = client.create_run(experiment_id, run_name=self._run_name)
        else:
            known = run.data.params  # which cannot change
            client.update_run(run.info.run_id, status="RUNNING")
        self._run_id = run.info.run_id
        param = self._entities.Param
        params = [param(key, str(value)) for key, value in settings.items() if key not in known]
        for first in range(0, len(params), 100):  # the most that a request may hold
            client.log_batch(self._run_id, params=params[first : first + 100])

    def _earlier_run(self, experiment_id: str) -> Any:
        """The latest run of this name, or None."""
        if self._run_name is None:
            return None
        quote = '"' if "'" in self._run_name else "'"
        runs = self._client.search_runs(
            [experiment_id],
            filter_string=f"attributes.run_name = {quote}{self._run_name}{quote}",
            order_by=["attributes.start_time DESC"],
            max_results=1,
        )
        return runs[0] if runs else None

    def _send(self, rows: list[Row]) -> None:
        metric, now = self._entities.Metric, int(time.time() * 1000)
        metrics = [
            metric(name, value, now, step)
            for step, values in rows
            for name, value in values.items()
        ]
        for first in range(0, len(metrics), 1000):  # the most that a request may hold
            self._client.log_batch(self._run_id, metrics=metrics[first : first + 1000])

    def _close(self, rows: list[Row], summary: dict[str, Any]) -> None:
        self._send(rows)
        tag = self._entities.RunTag
        tags = [tag(key, str(value)) for key, value in summary.items()]
        self._client.log_batch(self._run_id, tags=tags)
        reason = str(summary.get("stop_reason", "")).split(" ")[0]
        status = {"interrupted": "KILLED", "non-finite": "FAILED"}.get(reason, "FINISHED")
        self._client.set_terminated(self._run_id, status=status)


class WandbTracker(BufferedTracker):
    """Metrics, configuration (the settings) and summary of one run of Weights & Biases.

    A run of one's own that is open already is neither taken nor ended. Every row has its ``step``, against which the
    site draws all metrics: W&B's own counter refuses the steps that a resumed fit does again. A resumed fit continues
    the run of ``run_id``, where that is given.

    Args:
        project: Name of the project; None takes W&B's own setting.
        run_id: What identifies the run within its project, text of one's own; None is a new run at every start.
        interval: Seconds between writes.
        max_points: Most steps per write.
        options: Further arguments of ``wandb.init``: ``entity``, ``name``, ``tags``, ``mode="offline"``, ``dir``, ...

    Raises:
        ImportError: If W&B is not installed.

    Example:
        >>> from pyro_flowkit.training import WandbTracker
        >>> tracker = WandbTracker("seeds", run_id="first")  # fit(..., trackers=[tracker]) does the rest
        >>> tracker.start({"lr": 0.003}, 0)
        >>> tracker.log(1, {"elbo": -2.5})
        >>> tracker.end({"stop_reason": "max_steps"})
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        run_id: str | None = None,
        interval: float = 2.0,
        max_points: int = 200,
        **options: Any,
    ) -> None:
        super().__init__(interval)
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "Expected Weights & Biases for WandbTracker, got none: pip install wandb"
            ) from error
        self._open: Callable[..., Any] = wandb.init
        self._options = {**options, "project": project, "id": run_id}
        self._max_points = max_points
        self._run: Any = None

    def start(self, settings: Settings, first_step: int) -> None:
        """Opens a run, or the one to be continued."""
        resume = "allow" if self._options["id"] is not None else None
        self._run = self._open(
            config=dict(settings), resume=resume, reinit="create_new", **self._options
        )
        self._run.define_metric("*", step_metric="step")

    def end(self, summary: Settings) -> None:
        """Writes what is left and ends the run, as failed if it was interrupted or non-finite."""
        reason = str(summary.get("stop_reason", "")).split(" ")[0]
        try:
            self.flush()
            self._run.summary.update(dict(summary))
        finally:
            self._run.finish(exit_code=int(reason in ("interrupted", "non-finite")))

    def _write(self, rows: list[Row]) -> None:
        for step, metrics in _thin(rows, self._max_points):
            self._run.log({"step": step, **metrics})


class _Worker:
    """A thread that does one thing after the other. Python does not wait for it at its exit."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[..., None], *args: Any) -> Future[None]:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._thread.start()
        future: Future[None] = Future()
        self._tasks.put((future, function, args))
        return future

    def stop(self) -> None:
        """Ends the thread once everything is done."""
        self._tasks.put(None)
        self._thread = None

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, args = task
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)


def _table(values: Settings) -> str:
    """A table in Markdown."""
    rows = (f"| {key} | {value} |" for key, value in values.items())
    return "\n".join(["| name | value |", "| --- | --- |", *rows])


def _thin(rows: list[Row], limit: int) -> list[Row]:
    """At most ``limit`` evenly spaced rows, the last among them, and all rows with a validation."""
    stride = -(-len(rows) // limit)
    if stride <= 1:
        return rows
    last = (len(rows) - 1) % stride
    return [
        row for number, row in enumerate(rows) if number % stride == last or "validation" in row[1]
    ]
