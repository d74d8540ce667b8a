"""A density of rows of numbers in the units of their table, and of the frames that hold them."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.tables.atoms import AtomHeads
from pyro_flowkit.tables.columns import check_integers, choose_columns
from pyro_flowkit.tables.flow import TableFlow
from pyro_flowkit.tables.preparation import Preparation

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RowDensity:
    """A density of rows in the units of their file.

    Attributes:
        preparation: between those units, of the columns without atoms, and what the flow sees.
        flow: a density of what it sees; None is the standard normal: this is the Gaussian of the training rows.
        heads: densities of the columns with atoms given the others; None: there are none.
    """

    preparation: Preparation
    flow: TableFlow | None = None
    heads: AtomHeads | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all D columns."""
        return self.preparation.columns if self.heads is None else self.heads.columns

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log density (nats) of rows of shape ``(N, D)`` in float64, shape ``(N,)``; of integers see preparation.py."""
        plain, given = rows, None
        if self.heads is not None:
            plain = rows[:, self.heads.plain]
            given = self.heads.scaled(rows.numpy()), self.heads.kinds(rows.numpy())
        points = self.preparation.cell_points()
        values = [self._log_prob(self.preparation.to_flow(plain + p), given) for p in points]
        total = torch.stack(values).logsumexp(0) - math.log(len(points))
        return total + self.preparation.log_det

    @torch.no_grad()
    def _log_prob(self, w: Tensor, given: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.flow is None:
            value = -0.5 * (w.square().sum(-1) + w.shape[-1] * math.log(2.0 * math.pi))
        else:
            parts = [self.flow.log_prob(part.float()).double() for part in w.split(ROWS_AT_ONCE)]
            value = torch.cat(parts)
        if self.heads is None or given is None:
            return value
        batches = zip(*(part.split(ROWS_AT_ONCE) for part in (w.float(), *given)), strict=True)
        return value + torch.cat([self.heads.log_prob(*batch).double() for batch in batches])

    @torch.no_grad()
    def sample(self, count: int, *, seed: int) -> Tensor:
        """Rows of shape ``(count, D)`` in float64."""
        with fixed_seed(torch.device("cpu"), seed):
            sizes = [min(ROWS_AT_ONCE, count - i) for i in range(0, count, ROWS_AT_ONCE)]
            return torch.cat([self._sample(size) for size in sizes])

    def _sample(self, count: int) -> Tensor:
        if self.flow is None:
            w = torch.randn(count, len(self.preparation.columns), dtype=torch.float64)
        else:
            w = self.flow.distribution().sample(torch.Size([count])).double()
        rows = self.preparation.from_flow(w)
        if self.heads is None:
            return rows
        whole = rows.new_empty(count, len(self.columns))
        whole[:, self.heads.plain] = rows
        whole[:, self.heads.index] = self.heads.sample(w.float())
        return whole

    def log_prob_of(
        self, frame: pd.DataFrame, *, where: str = "the table", allow_missing: bool = False
    ) -> np.ndarray:
        """Log density (nats) of the rows of a frame that has at least the columns, shape ``(N,)``.

        Args:
            frame: in the units of the training rows; further columns are ignored.
            where: what to call it in errors.
            allow_missing: whether values may be NaN; the density of such rows is NaN, too.

        Raises:
            TableError: if columns are missing, or values are no finite numbers, or no integers where those of the
                training rows were.
        """
        values, columns = choose_columns(
            frame, self.columns, where=where, allow_missing=allow_missing, missing="drop"
        )
        found = np.full(len(values), np.nan)
        complete = ~np.isnan(values).any(1)
        check_integers(values[complete], columns, self._integers, where=where)
        found[complete] = self.log_prob(torch.from_numpy(values[complete])).numpy()
        return found

    def sample_frame(self, count: int, *, seed: int) -> pd.DataFrame:
        """A frame of ``count`` rows with the columns of the table."""
        rows = self.sample(count, seed=seed).numpy()
        frame = pd.DataFrame(rows, columns=list(self.columns))
        return frame.astype(dict.fromkeys(self._integers, np.int64))

    @property
    def _integers(self) -> list[str]:
        flags = zip(self.preparation.columns, self.preparation.discrete, strict=True)
        return [name for name, flag in flags if flag]
