"""``TableDensity``: from a frame to its density, in three lines."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from pyro_flowkit.diagnostics import Verdict
from pyro_flowkit.tables.columns import (
    Table,
    check_integers,
    check_table,
    choose_columns,
    without_columns,
)
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.flow import FlowSettings
from pyro_flowkit.tables.metrics import metrics_of, table_verdict
from pyro_flowkit.tables.missing import MISSING, fill_in
from pyro_flowkit.tables.split import Split, split_rows
from pyro_flowkit.tables.training import BATCH_SIZE, LEARNING_RATE, Trained, TrainOptions, train


class TableDensity:
    """The exact density of the rows of a table, in the table's own units.

    The flow starts as the Gaussian with the table's full covariance, trains on 80 % of the rows and is kept only if
    10 % gain by it; the last 10 % say how good it is on rows that it never saw::

        density = TableDensity(frame).fit()
        density.verdict()                # in words
        density.log_prob(frame)          # nats, shape (N,)
        density.sample(1000)             # a frame with the same columns

    Args:
        frame: columns of numbers, or an array of shape ``(N, D)``, whose columns are named "0", "1", ...
        columns: names of those to use; None: all.
        exclude: names of those to leave out.
        discrete: of columns of few distinct values: "noise": integers get uniform noise and count by their
            probability, others are refused; "drop": they are left out; "keep": they are treated as continuous.
        missing: of rows with NaN: "refuse": an error; "drop": they are left out; "impute": they are filled in from rows
            like them, and train, but neither choose nor test.
        settings: structure of the flow.
        seed: of the split, and of the training.
        name: what to call the table in errors.

    Attributes:
        table: the rows that passed all checks.
        split: which of them train, choose, and test.

    Raises:
        TableError: if the table has no density: text, missing values, constant or equal columns, too few rows.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> from pyro_flowkit.tables import TableDensity
        >>> frame = pd.DataFrame(np.random.default_rng(0).normal(size=(300, 2)), columns=["a", "b"])
        >>> density = TableDensity(frame).fit(steps=5)
        >>> density.log_prob(frame).shape, list(density.sample(10).columns)
        ((300,), ['a', 'b'])
    """

    def __init__(
        self,
        frame: pd.DataFrame | np.ndarray,
        *,
        columns: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        discrete: str = "noise",
        missing: str = "refuse",
        settings: FlowSettings | None = None,
        seed: int = 0,
        name: str = "the table",
    ):
        frame = without_columns(as_frame(frame), exclude, where=name)
        if missing not in MISSING:
            raise TableError(f"Expected missing to be one of {', '.join(MISSING)}, got {missing!r}")
        values, names = choose_columns(
            frame, columns, where=name, allow_missing=missing != "refuse"
        )
        lacks = np.isnan(values).any(1)
        complete = f"{name} without missing values" if lacks.any() else name
        table = check_table(values[~lacks], names, discrete=discrete, where=complete)
        split = split_rows(len(table.values), len(table.columns), seed, table.copies())
        self.table: Table = replace(table, rows=np.flatnonzero(~lacks))
        self.split: Split = split
        if missing == "impute" and lacks.any():
            kept = [names.index(column) for column in table.columns]
            self._fill_in(values[lacks][:, kept], np.flatnonzero(lacks), seed, name)
        self._settings, self._seed = settings or FlowSettings(), seed
        self._trained: Trained | None = None

    def __repr__(self) -> str:
        state = "fresh" if self._trained is None else "trained"
        size = f"{len(self.table.values):,} rows of {', '.join(self.table.columns)}"
        return f"TableDensity({size}; {state})"

    def _fill_in(self, rows: np.ndarray, numbers: np.ndarray, seed: int, name: str) -> None:
        """Add rows with missing values to those that train."""
        table, split = self.table, self.split
        filled = fill_in(rows, table.values[split.train], seed=seed)
        check_integers(filled, table.columns, table.noisy, where=name)
        count = len(table.values)
        added = np.arange(count, count + len(rows))
        self.table = replace(
            table,
            values=np.vstack([table.values, filled]),
            rows=np.concatenate([np.asarray(table.rows), numbers]),
            filled=len(rows),
        )
        order = np.random.default_rng(seed).permutation(np.concatenate([split.train, added]))
        copy_of = np.concatenate([split.copy_of, added])
        self.split = replace(split, train=order, copy_of=copy_of)

    def fit(
        self,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        batch_size: int = BATCH_SIZE,
        lr: float = LEARNING_RATE,
        progress: bool = False,
    ) -> "TableDensity":
        """Train the density; returns itself.

        Args:
            steps: of training; None: by the number of rows, and at most 80 seconds.
            seconds: of training; None: no limit where there are ``steps``.
            batch_size: rows per step.
            lr: learning rate at first.
            progress: show a bar.

        Raises:
            TableError: if the training rows have no Gaussian, or the settings make no flow.
        """
        options = TrainOptions(steps, seconds, batch_size, lr, self._seed)
        self._trained = train(self.table, self.split, self._settings, options, progress=progress)
        return self

    def log_prob(self, frame: pd.DataFrame | np.ndarray) -> np.ndarray:
        """Exact log density (nats) of every row of a frame with at least the table's columns, shape ``(N,)``.

        Rows with missing values have none; theirs is NaN.

        Raises:
            TableError: if columns are missing, or values are no numbers of the kind that the density was trained on.
            RuntimeError: before :meth:`fit`.
        """
        return self.trained.density.log_prob_of(as_frame(frame), allow_missing=True)

    def sample(self, count: int, *, seed: int = 0) -> pd.DataFrame:
        """A frame of ``count`` rows drawn from the density.

        Raises:
            RuntimeError: before :meth:`fit`.
        """
        return self.trained.density.sample_frame(count, seed=seed)

    @property
    def metrics(self) -> dict[str, Any]:
        """Means and standard errors (nats per row) on the three parts of the rows, and how training ended."""
        return metrics_of(self.trained)

    def verdict(self) -> Verdict:
        """What to make of it, by the rows that it was not trained on."""
        return table_verdict(self.metrics)

    @property
    def trained(self) -> Trained:
        """The density that was kept, with the course of its training.

        Raises:
            RuntimeError: before :meth:`fit`.
        """
        if self._trained is None:
            raise RuntimeError(
                "Expected TableDensity(frame).fit(), got a density that is not fitted"
            )
        return self._trained


def as_frame(table: pd.DataFrame | np.ndarray) -> pd.DataFrame:
    """A frame with text as names of the columns.

    Raises:
        TableError: if it is neither a frame nor an array of two dimensions, or two columns share a name.
    """
    if isinstance(table, np.ndarray) and table.ndim == 2:
        table = pd.DataFrame(table)
    if not isinstance(table, pd.DataFrame):
        raise TableError(
            "Expected a frame or an array of shape (N, D), got "
            f"{type(table).__name__}{getattr(table, 'shape', '')}"
        )
    frame = table.set_axis([str(name) for name in table.columns], axis=1)
    twice = frame.columns[frame.columns.duplicated()].unique().tolist()
    if twice:
        raise TableError(f"Expected every column to have a name of its own, got twice: {twice}")
    return frame
