"""Trackers: where the numbers of a running fit go. CSV files here, TensorBoard, MLflow and W&B in
``library_trackers``.

A step of a small model takes a millisecond, and writing a row would be a good part of that. So ``log`` only puts a
row aside, and the rows are written together, a few times per second.

The loop talks to trackers through ``safely``: a full disk or a server that is gone ends the tracking, with one warning,
and not the training.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pyro_flowkit.warning import warn

Settings = Mapping[str, str | int | float]
Row = tuple[int, dict[str, float]]

COLUMNS = ("step", "elbo", "learning_rate", "grad_norm", "seconds", "validation")


class Tracker(Protocol):
    """What ``fit`` calls, on one process only.

    A tracker may also have a method ``flush()``: it is called before a checkpoint is written, so that a
    resumed run finds every row up to the step it resumes from.
    """

    def start(self, settings: Settings, first_step: int) -> None:
        """Called once, before the first step.

        Args:
            settings: The options of the fit.
            first_step: Number of steps done before: 0 for a new run, larger for a resumed one.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called after every step and after every validation.

        Args:
            step: Number of steps done. A validation has the number of the step that it follows.
            metrics: "elbo" (nats; per datum where there are data), "learning_rate", "grad_norm" and
                "seconds", or "validation" (nats per datum).
        """

    def end(self, summary: Settings) -> None:
        """Called once, after the last step.

        Args:
            summary: "stop_reason", "best_step" and the like.
        """


class BufferedTracker:
    """Puts rows aside and hands them to ``_write`` in one go, one row per step.

    Args:
        interval: Seconds between writes.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._rows: list[Row] = []
        self._due = time.monotonic() + interval

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Puts a row aside; metrics of one step that come one after the other make one row."""
        if self._rows and self._rows[-1][0] == step:
            self._rows[-1][1].update(metrics)
            return
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._interval
            self.flush()
        self._rows.append((step, dict(metrics)))

    def flush(self) -> None:
        """Writes the rows that were put aside."""
        rows, self._rows = self._rows, []
        if rows:
            self._write(rows)

    def _write(self, rows: list[Row]) -> None:
        raise NotImplementedError


class CsvTracker(BufferedTracker):
    """A CSV file with a line per step and a column per metric; empty cells where there is no value.

    A resumed run continues the file: lines beyond the step that it resumes from, and a last line that was cut
    off, are dropped first. A new run replaces the file of an earlier one. Both happen in one go: there is never
    half a file. Settings and summary are left to ``FitResult``.

    Args:
        path: The file; missing folders are made.
        interval: Seconds between writes.

    Example:
        >>> from pathlib import Path
        >>> from pyro_flowkit.training import CsvTracker
        >>> tracker = CsvTracker("history.csv")  # fit(..., trackers=[tracker]) does the rest
        >>> tracker.start({}, 0)
        >>> tracker.log(1, {"elbo": -2.5})
        >>> tracker.end({})
        >>> print(Path("history.csv").read_text().split()[1])
        1,-2.5,,,,
    """

    def __init__(self, path: str | os.PathLike[str], *, interval: float = 0.5) -> None:
        super().__init__(interval)
        self._path = Path(path)
        self._columns = list(COLUMNS)

    def start(self, settings: Settings, first_step: int) -> None:
        """Writes the header, or drops the lines of steps that will be done again.

        Raises:
            ValueError: If there is a file that was not written by this class.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        header = self._header()
        self._columns = header if header and first_step else list(COLUMNS)
        self._replace(self._columns, first_step)

    def end(self, summary: Settings) -> None:
        """Writes what is left."""
        self.flush()

    def _write(self, rows: list[Row]) -> None:
        found = dict.fromkeys(name for _, metrics in rows for name in metrics)
        new = [name for name in found if name not in self._columns]
        if new:
            self._replace([*self._columns, *new], rows[-1][0])
        names = self._columns[1:]
        with open(self._path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                (step, *map(metrics.get, names)) for step, metrics in rows
            )

    def _header(self) -> list[str]:
        """The columns of the file; none where there is no file.

        Raises:
            ValueError: If they are not those of such a file.
        """
        if not self._path.exists():
            return []
        with open(self._path, encoding="utf-8", errors="replace", newline="") as file:
            line = file.readline(10_000)
        columns = next(csv.reader([line]), [])
        if line and (columns[:1] != ["step"] or not line.endswith("\n")):
            raise ValueError(
                f"Expected {self._path} to be new or a file of CsvTracker, whose first column is 'step', "
                f"got a file that begins with {line[:60]!r}"
            )
        return columns

    def _replace(self, columns: list[str], last_step: int) -> None:
        """Writes the file anew, with the steps up to ``last_step`` and new columns at the end."""
        partial = self._path.with_name(self._path.name + ".partial")
        with open(partial, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(self._rows_up_to(last_step, len(columns)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self._path)
        self._columns = columns

    def _rows_up_to(self, last_step: int, width: int) -> Iterator[list[str]]:
        """The cells of the file's complete lines, as many in each."""
        if not self._path.exists():
            return
        with open(self._path, encoding="utf-8", newline="") as file:
            complete = csv.reader(line for line in file if line.endswith("\n"))
            old_width = len(next(complete, []))
            for row in complete:
                if len(row) == old_width and row[0].isdigit() and int(row[0]) <= last_step:
                    yield row + [""] * (width - old_width)


class _Safe:
    """Several trackers as one that does not raise; it is false when none is left."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def __bool__(self) -> bool:
        return bool(self._trackers)

    def start(self, settings: Settings, first_step: int) -> None:
        self._call("start", settings, first_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._call("log", step, metrics)

    def flush(self) -> None:
        self._call("flush")

    def end(self, summary: Settings) -> None:
        self._call("end", summary)

    def _call(self, hook: str, *args: Any) -> None:
        for tracker in tuple(self._trackers):
            try:
                method = getattr(tracker, hook, None)
                if method is not None:
                    method(*args)
            except Exception as error:
                if hook == "start" and isinstance(error, (TypeError, ValueError)):
                    raise  # the caller's mistake, and nothing is lost yet
                self._trackers.remove(tracker)
                warn(
                    f"{type(tracker).__name__} failed in {hook} and is left out from here on; the fit goes on. "
                    f"{type(error).__name__}: {error}",
                    RuntimeWarning,
                )


def safely(trackers: Sequence[Tracker]) -> _Safe:
    """Puts trackers together in one that does not raise: one that fails is left out, with one warning.

    A ValueError or TypeError of ``start`` is the caller's mistake and is raised.

    Args:
        trackers: The trackers.

    Returns:
        An object with the methods of ``Tracker`` and ``flush()``; false when no tracker is left.

    Raises:
        TypeError: If one of them lacks a method of ``Tracker``.
    """
    for tracker in trackers:
        missing = [
            hook for hook in ("start", "log", "end") if not callable(getattr(tracker, hook, None))
        ]
        if missing:
            raise TypeError(
                "Expected trackers with methods start, log and end, "
                f"got {type(tracker).__name__} without {', '.join(missing)}"
            )
    return _Safe(trackers)
