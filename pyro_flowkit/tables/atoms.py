r"""Columns with atoms: values that many rows share, in a column that is continuous otherwise (rain, 0 on most days).

Such a column has no density; one that is trained on it grows without bound. It has probabilities and a density,

    p(x_j | c)  =  P(x_j = a_k | c)                             at an atom a_k,
                   P(x_j is no atom | c) p(t | c) |y'(x_j)| / s  elsewhere,    t = (y(x_j) - m - b' c) / s

with the context c of a constant, all columns without atoms, and the columns with atoms before it. All of it together
factorises the density of a row. Where all values lie on one side of an atom, as amounts of rain do, y is the logarithm
of their distance to it if that is nearer to a normal (by its likelihood); elsewhere it is x_j itself. At first the
probabilities are the shares of the training rows and t, the residual of a linear regression on c, has a Student's t: of
100 degrees of freedom, nearly a normal, and where its tails have no variance of as many as its likelihood is largest
at. Then networks of c learn all of it. A rounded column is none of this: its values count as continuous.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_flowkit.bases import StudentTBase
from pyro_flowkit.flows import SplineFlow
from pyro_flowkit.tables.errors import TableError
from pyro_flowkit.tables.heavy_tails import HEAVY, has_heavy_tails, student_t

LEAST_COUNT, LEAST_SHARE = 10, 0.01  # rows at an atom, and their share of all
STANDS_OUT = 10.0  # times as many rows as at the values beside it
NEIGHBOURS = 10
MOST_ATOMS = 5  # a column with more is a rounded one
WIDTH = 32
REACH = 5.0  # standard deviations; what lies beyond counts as this for a context
RIDGE = 1e-3
NEARLY_NORMAL = 100.0  # degrees of freedom
CLEARLY_NEARER = 0.05  # nats, of a logarithm's likelihood
LARGEST_LOG = 700.0  # of a double


def find_atoms(column: np.ndarray) -> tuple[float, ...]:
    """The values of a column of shape ``(N,)`` that stand out by their number; none of a rounded column."""
    values, counts = np.unique(column, return_counts=True)
    found = []
    for i in map(int, np.flatnonzero(counts >= max(LEAST_COUNT, LEAST_SHARE * len(column)))):
        first = max(0, i - NEIGHBOURS // 2)
        beside = np.delete(counts[first : i + NEIGHBOURS // 2 + 1], i - first)
        if len(beside) and counts[i] >= STANDS_OUT * np.median(beside):
            found.append(float(values[i]))
    return tuple(found) if len(found) <= MOST_ATOMS else ()


class _Head(nn.Module):
    """One column with ``K`` atoms given a context of ``C`` numbers."""

    loc: Tensor
    slope: Tensor
    scale: Tensor
    edge: Tensor
    side: Tensor
    log_share: Tensor

    def __init__(self, context_dim: int, atoms: int):
        super().__init__()
        self.register_buffer("edge", torch.zeros((), dtype=torch.float64))
        self.register_buffer("side", torch.zeros((), dtype=torch.float64))  # 0: no logarithm
        self.register_buffer("loc", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("slope", torch.zeros(context_dim))
        self.register_buffer("log_share", torch.zeros(atoms + 1))
        last = nn.Linear(WIDTH, atoms + 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.logits = nn.Sequential(nn.Linear(context_dim, WIDTH), nn.SiLU(), last)
        self.flow = SplineFlow(
            1, context_dim, num_transforms=2, hidden_dims=[WIDTH, WIDTH], base="student_t"
        )

    def start(
        self,
        values: np.ndarray,
        kind: np.ndarray,
        context: Tensor,
        edges: Sequence[tuple[float, float]],
    ) -> None:
        """Shares, the choice of y, and the linear regression of y where values are no atoms.

        Args:
            values: of the column, shape ``(N,)``.
            kind: 0 for those that are no atoms.
            context: shape ``(N, C)``.
            edges: atoms that all other values lie on one side of, and that side, 1 or -1.
        """
        counts = np.bincount(kind, minlength=len(self.log_share)) + 0.5
        self.log_share.copy_(torch.from_numpy(np.log(counts / counts.sum())))
        own, c = values[kind == 0], context[torch.from_numpy(kind == 0)].double().numpy()
        largest = np.abs(own).max()
        plain = np.log((own / largest).std()) + np.log(largest)  # minus the likelihood of a normal
        for edge, side in edges:
            log = np.log(side * (own - edge))
            if np.log(max(log.std(), 1e-6)) + log.mean() < plain - CLEARLY_NEARER:
                self.edge.fill_(edge)
                self.side.fill_(side)
        own = self.outer(own)
        unit = np.abs(own).max() or 1.0
        own = own / unit
        middle, spread = np.median(own), 1.5 * np.subtract(*np.quantile(own, [0.75, 0.25]))
        near = np.clip(own, middle - 5 * spread, middle + 5 * spread) if spread > 0 else own
        slope = np.zeros(c.shape[1])
        if len(own) > 5 * c.shape[1]:
            centred = c - c.mean(0)
            gram = centred.T @ centred / len(c) + RIDGE * np.eye(c.shape[1])
            slope = np.linalg.solve(gram, centred.T @ (near - near.mean()) / len(c))
        left = own - c @ slope
        if not left.std() > 1e-6 * own.std():
            raise ValueError("one value or a linear function of other columns beside its atoms")
        loc, scale, df = left.mean(), left.std(), NEARLY_NORMAL
        if has_heavy_tails(left[:, None]):
            heavy, scale_of_heavy = student_t(left - np.median(left))
            if heavy < HEAVY:
                loc, scale, df = np.median(left), scale_of_heavy, heavy
        self.loc.fill_(unit * loc)
        self.scale.fill_(unit * scale)
        self.slope.copy_(torch.from_numpy(slope / scale))
        assert isinstance(self.flow.base, StudentTBase)
        self.flow.base.log_df.data.fill_(np.log(df))

    def outer(self, values: np.ndarray) -> np.ndarray:
        """y of values of shape ``(N,)``; NaN where they are on the other side of the edge, or at it."""
        side = float(self.side)
        if not side:
            return values
        distance = side * (values - float(self.edge))
        return np.log(distance, where=distance > 0, out=np.full(len(values), np.nan))

    def inner(self, y: Tensor) -> Tensor:
        """The values that y is of."""
        if not self.side:
            return y
        return self.edge + self.side * y.clamp(-LARGEST_LOG, LARGEST_LOG).exp()

    def all_logits(self, context: Tensor) -> Tensor:
        """Log-probabilities of "no atom" and of each atom, shape ``(N, K + 1)``."""
        return functional.log_softmax(self.log_share + self.logits(context), dim=-1)

    def log_prob(self, t: Tensor, kind: Tensor, context: Tensor) -> Tensor:
        chosen = self.all_logits(context).gather(1, kind[:, None])[:, 0]
        is_inside = (kind == 0) & ~t.isnan()
        residual = torch.where(is_inside, t - context @ self.slope, 0.0)
        density = self.flow.log_prob(residual[:, None], context) - self.scale.log().to(t.dtype)
        if self.side:
            density = density - (self.loc + self.scale * t).to(t.dtype)  # log of dy/dx
        density = torch.where(t.isnan(), -torch.inf, density)
        return chosen + torch.where(kind == 0, density, 0.0)


class AtomHeads(nn.Module):
    """The columns with atoms given the others, and those with atoms before them.

    Args:
        columns: names of all D columns.
        atoms: of some of them, by name.
    """

    def __init__(self, columns: Sequence[str], atoms: Mapping[str, Sequence[float]]):
        super().__init__()
        self.columns = tuple(columns)
        self.atoms = {name: tuple(atoms[name]) for name in columns if name in atoms}
        self.index = [self.columns.index(name) for name in self.atoms]
        self.plain = [i for i, name in enumerate(self.columns) if name not in self.atoms]
        self.heads = nn.ModuleList()
        size = 1 + len(self.plain)
        for values in self.atoms.values():
            self.heads.append(_Head(size, len(values)))
            size += len(values) + 2

    def start(self, rows: np.ndarray, w: Tensor, whole: np.ndarray) -> None:
        """Begin at the shares and the regressions of training rows of shape ``(N, D)`` and their w.

        Args:
            rows: those that train.
            w: of their columns without atoms.
            whole: all rows of the table, which say on which sides of an atom there are any.

        Raises:
            TableError: if a column has nothing beside its atoms.
        """
        context = _context(w)
        for i, (name, head) in enumerate(zip(self.atoms, self.heads, strict=True)):
            assert isinstance(head, _Head)
            kind = self.kinds(rows)[:, i].numpy()
            try:
                edges = _edges(whole[:, self.index[i]], self.atoms[name])
                head.start(rows[:, self.index[i]], kind, context, edges)
            except ValueError as error:
                raise TableError(
                    f"Expected columns that vary, got in {name!r} {error}: leave it out (exclude)"
                ) from error
            context = _with(context, self.scaled(rows)[:, i], self.kinds(rows)[:, i], head)

    def kinds(self, rows: np.ndarray) -> Tensor:
        """0 for no atom, k for the k-th one, of rows of shape ``(N, D)``; shape ``(N, heads)``."""
        kinds = np.zeros((len(rows), len(self.index)), dtype=np.int64)
        for i, (column, values) in enumerate(zip(self.index, self.atoms.values(), strict=True)):
            for k, value in enumerate(values, 1):
                kinds[rows[:, column] == value, i] = k
        return torch.from_numpy(kinds)

    def scaled(self, rows: np.ndarray) -> Tensor:
        """(y - m) / s of rows of shape ``(N, D)``, float32, shape ``(N, heads)``.

        At an atom it is 0, and on the other side of an edge NaN.
        """
        columns = []
        for column, head in zip(self.index, self.heads, strict=True):
            assert isinstance(head, _Head)
            y = head.outer(rows[:, column])
            columns.append((y - float(head.loc)) / float(head.scale))
        scaled = torch.from_numpy(np.stack(columns, axis=1)).float()
        return torch.where(self.kinds(rows) == 0, scaled, 0.0)

    def log_prob(self, w: Tensor, t: Tensor, kind: Tensor) -> Tensor:
        """Log density (nats, units of the table) of these columns given the others, shape ``(N,)``."""
        context = _context(w)
        total = w.new_zeros(len(w))
        for i, head in enumerate(self.heads):
            assert isinstance(head, _Head)
            total = total + head.log_prob(t[:, i], kind[:, i], context)
            context = _with(context, t[:, i], kind[:, i], head)
        return total

    def sample(self, w: Tensor) -> Tensor:
        """Values of these columns for rows whose other columns are w, float64, shape ``(N, heads)``."""
        context = _context(w)
        drawn = []
        for values, head in zip(self.atoms.values(), self.heads, strict=True):
            assert isinstance(head, _Head)
            kind = torch.distributions.Categorical(logits=head.all_logits(context)).sample()
            t = head.flow(context).sample()[:, 0] + context @ head.slope
            x = head.inner(head.loc + head.scale * t.double())
            at = torch.tensor([0.0, *values], dtype=torch.float64)[kind]
            drawn.append(torch.where(kind == 0, x, at))
            context = _with(context, t, kind, head)
        return torch.stack(drawn, dim=1)

    def log_scale(self, rows: np.ndarray) -> float:
        """Sum over these columns of the logarithm of the standard deviation beside the atoms, times their share."""
        kinds = self.kinds(rows).numpy()
        total = 0.0
        for i, column in enumerate(self.index):
            beside = kinds[:, i] == 0
            own = rows[beside, column]
            largest = np.abs(own).max()
            total += float(beside.mean() * (np.log((own / largest).std()) + np.log(largest)))
        return total

    def to_json(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {"columns": list(self.columns), "atoms": {k: list(v) for k, v in self.atoms.items()}}


def _edges(values: np.ndarray, atoms: Sequence[float]) -> list[tuple[float, float]]:
    """The atoms that all other values lie on one side of, and that side, 1 or -1."""
    others = values[~np.isin(values, atoms)]
    sides = {1.0: others.min() if len(others) else 0.0, -1.0: others.max() if len(others) else 0.0}
    return [(a, side) for a in atoms for side, nearest in sides.items() if side * (nearest - a) > 0]


def _context(w: Tensor) -> Tensor:
    return torch.cat([w.new_ones(len(w), 1), w.clamp(-REACH, REACH)], dim=1)


def _with(context: Tensor, t: Tensor, kind: Tensor, head: _Head) -> Tensor:
    """The context of the next column: what this one is, and its value if that is no atom."""
    kinds = functional.one_hot(kind, len(head.log_share)).to(context.dtype)
    value = torch.where(kind == 0, t, 0.0).nan_to_num(0.0).clamp(-REACH, REACH).to(context.dtype)
    return torch.cat([context, kinds, value[:, None]], dim=1)
