r"""Between rows in the units of their file and what a flow sees, with the log-det.

With m and the Cholesky factor L of the mean and the covariance of the training rows, the flow sees

    w = L^-1 (x - m),        log p(x) = log p(w) - sum_i log L_ii

so that a standard normal density of w is the Gaussian of maximum likelihood (of few rows with shrunk correlations, see
covariance.py; of rows with heavy tails m and L are those of heavy_tails.py). All of it is float64: columns that are
nearly collinear lose no digits before the flow, which is float32.

A column of integers has a probability, not a density. It gets noise, u uniform on [0, 1), in training, and its share of
the log-density is that of the cell,

    log p(x) = log int_[0,1) p(x + u) du  ~  log 1/K sum_k p(x + u_k)

with K fixed points u_k that are the same for all rows, so that a row's value does not depend on the others.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_flowkit.tables.covariance import shrinkage
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.heavy_tails import robust_scale

CELL_POINTS = 16
SINGULAR = 1e-12  # of a column's variance, what the columns before it leave unexplained


@dataclass(frozen=True)
class Preparation:
    """The map between rows and what a flow sees.

    Attributes:
        columns: D names.
        discrete: for each whether it holds integers that get noise.
        loc: mean m of the training rows (with the mean of the noise), shape ``(D,)``.
        scale_tril: L, shape ``(D, D)``.
    """

    columns: tuple[str, ...]
    discrete: tuple[bool, ...]
    loc: Tensor
    scale_tril: Tensor

    @classmethod
    def of(
        cls, rows: np.ndarray, columns: tuple[str, ...], discrete: tuple[bool, ...]
    ) -> "Preparation":
        """Fit it to training rows of shape ``(N, D)`` in random order; few rows have their correlations shrunk.

        Raises:
            TableError: if a column is a linear function of others, among the training rows.
        """
        unit = _unit(rows)  # squares of numbers beyond 1e154 are none
        noise = np.array(discrete, dtype=bool) / unit
        scaled = rows / unit
        loc = scaled.mean(0)
        variance = scaled.var(0) + noise**2 / 12.0
        flat = [name for name, value in zip(columns, variance, strict=True) if not value > 0]
        if flat:
            raise TableError(
                f"Expected columns that vary among the training rows, got one value in {', '.join(flat)}: leave them "
                "out (exclude)"
            )
        scale = np.sqrt(variance)
        standard = (scaled - loc) / scale
        correlation = standard.T @ standard / len(rows)
        correlation[np.diag_indices_from(correlation)] = 1.0
        factor = _cholesky(correlation, columns)
        share = shrinkage(standard)
        if share:
            factor = np.linalg.cholesky((1.0 - share) * correlation + share * np.eye(len(factor)))
        return cls(
            columns,
            discrete,
            torch.from_numpy(unit * (loc + 0.5 * noise)),
            torch.from_numpy((unit * scale)[:, None] * factor),
        )

    def robust(self, rows: np.ndarray) -> tuple["Preparation", Tensor]:
        """The same for rows of heavy tails, and the degrees of freedom of w, shape ``(D,)``."""
        unit = _unit(rows)
        loc, scale_tril, degrees = robust_scale(
            (rows + 0.5 * np.array(self.discrete, dtype=bool)) / unit
        )
        found = replace(
            self,
            loc=torch.from_numpy(unit * loc),
            scale_tril=torch.from_numpy(unit[:, None] * scale_tril),
        )
        return found, torch.from_numpy(degrees)

    def to_flow(self, rows: Tensor) -> Tensor:
        """w of rows of shape ``(N, D)``, float64."""
        centred = (rows.to(torch.float64) - self.loc).mT
        return torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).mT

    def from_flow(self, w: Tensor) -> Tensor:
        """Rows of w, in float64; the noise of integers is taken off."""
        rows = w.to(torch.float64) @ self.scale_tril.mT + self.loc
        return torch.where(torch.tensor(self.discrete, dtype=torch.bool), rows.floor(), rows)

    @property
    def log_det(self) -> float:
        """log|det dw/dx| (nats)."""
        return -float(self.scale_tril.diagonal().log().sum())

    @property
    def log_scale(self) -> float:
        """Sum of the logarithms of the columns' standard deviations: what densities of standardised columns add."""
        largest = self.scale_tril.abs().amax(1) if self.columns else torch.ones(0)
        squares = (self.scale_tril / largest[:, None]).square().sum(1)
        return float((largest.log() + squares.log() / 2).sum())

    def cell_points(self) -> list[Tensor]:
        """What to add to rows, one after the other, to average over the cells of integers; shape ``(D,)`` each."""
        count = sum(self.discrete)
        if not count:
            return [torch.zeros(len(self.columns), dtype=torch.float64)]
        points = torch.zeros(CELL_POINTS, len(self.columns), dtype=torch.float64)
        sobol = torch.quasirandom.SobolEngine(count).draw(CELL_POINTS, dtype=torch.float64)
        points[:, torch.tensor(self.discrete, dtype=torch.bool)] = sobol + 0.5 / CELL_POINTS
        return list(points)

    def noise_map(self) -> Tensor:
        """Matrix from noise in the integer columns to w, shape ``(D, number of such columns)``, float64."""
        unit = torch.eye(len(self.columns), dtype=torch.float64)[
            :, torch.tensor(self.discrete, dtype=torch.bool)
        ]
        return torch.linalg.solve_triangular(self.scale_tril, unit, upper=False)

    def to_json(self) -> dict[str, Any]:
        """Numbers and text only; float64 survives the way through JSON."""
        return {
            "columns": list(self.columns),
            "discrete": list(self.discrete),
            "loc": self.loc.tolist(),
            "scale_tril": self.scale_tril.tolist(),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Preparation":
        """Undo ``to_json``."""
        return cls(
            tuple(content["columns"]),
            tuple(content["discrete"]),
            torch.tensor(content["loc"], dtype=torch.float64),
            torch.tensor(content["scale_tril"], dtype=torch.float64),
        )


def _unit(rows: np.ndarray) -> np.ndarray:
    """A power of two near the largest number of each column, shape ``(D,)``."""
    return np.ldexp(1.0, np.frexp(np.abs(rows).max(0))[1] - 1)


def _cholesky(correlation: np.ndarray, columns: tuple[str, ...]) -> np.ndarray:
    """The factor, or an error that names the first column that the ones before it determine."""
    factor = np.zeros_like(correlation)
    for j in range(len(correlation)):
        left = correlation[j, j] - factor[j, :j] @ factor[j, :j]
        if not left > SINGULAR:
            raise TableError(
                f"Expected columns of which none is a linear function of others, got {columns[j]!r} as one of the "
                "columns before it: leave it out (exclude)"
            )
        factor[j, j] = np.sqrt(left)
        factor[j + 1 :, j] = (
            correlation[j + 1 :, j] - factor[j + 1 :, :j] @ factor[j, :j]
        ) / factor[j, j]
    return factor
