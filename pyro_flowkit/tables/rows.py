"""A density of rows of numbers in the units of their table, and of the frames that hold them."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_flowkit.tables.columns import choose_columns
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.flow import TableFlow
from pyro_flowkit.tables.preparation import Preparation

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RowDensity:
    """A density of rows in the units of their file.

    Attributes:
        preparation: between those units and what the flow sees.
        flow: a density of what it sees; None is the standard normal: this is the Gaussian of the training rows.
    """

    preparation: Preparation
    flow: TableFlow | None = None

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log density (nats) of rows of shape ``(N, D)`` in float64, shape ``(N,)``; of integers see preparation.py."""
        points = self.preparation.cell_points()
        values = torch.stack([self._log_prob(self.preparation.to_flow(rows + p)) for p in points])
        return values.logsumexp(0) - math.log(len(points)) + self.preparation.log_det

    @torch.no_grad()
    def _log_prob(self, w: Tensor) -> Tensor:
        if self.flow is None:
            return -0.5 * (w.square().sum(-1) + w.shape[-1] * math.log(2.0 * math.pi))
        parts = [self.flow.log_prob(part.float()).double() for part in w.split(ROWS_AT_ONCE)]
        return torch.cat(parts)

    @torch.no_grad()
    def sample(self, count: int, *, seed: int) -> Tensor:
        """Rows of shape ``(count, D)`` in float64."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = len(self.preparation.columns)
            if self.flow is None:
                w = torch.randn(count, size, dtype=torch.float64)
            else:
                law = self.flow.distribution()
                sizes = [min(ROWS_AT_ONCE, count - i) for i in range(0, count, ROWS_AT_ONCE)]
                w = torch.cat([law.sample(torch.Size([n])).double() for n in sizes])
        return self.preparation.from_flow(w)

    def log_prob_of(self, frame: pd.DataFrame, *, where: str = "the table") -> np.ndarray:
        """Log density (nats) of the rows of a frame that has at least the columns, shape ``(N,)``.

        Args:
            frame: in the units of the training rows; further columns are ignored.
            where: what to call it in errors.

        Raises:
            TableError: if columns are missing, or values are no finite numbers, or no integers where those of the
                training rows were.
        """
        values, columns = choose_columns(frame, self.preparation.columns, where=where)
        broken = (values != np.round(values)).any(0) & np.array(self.preparation.discrete)
        if broken.any():
            names = [name for name, bad in zip(columns, broken, strict=True) if bad]
            raise TableError(
                f"Expected integers in {where}, as in training, got other values in {', '.join(names)}"
            )
        return self.log_prob(torch.from_numpy(values)).numpy()

    def sample_frame(self, count: int, *, seed: int) -> pd.DataFrame:
        """A frame of ``count`` rows with the columns of the table."""
        preparation = self.preparation
        frame = pd.DataFrame(
            self.sample(count, seed=seed).numpy(), columns=list(preparation.columns)
        )
        integers = [
            name
            for name, flag in zip(preparation.columns, preparation.discrete, strict=True)
            if flag
        ]
        return frame.astype(dict.fromkeys(integers, np.int64))
