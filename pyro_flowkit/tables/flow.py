"""The flow for tables: every coupling transforms a few columns given all of the others.

In a table one column is often nearly a function of the rest. A coupling that splits the columns in halves sees only
half of what such a column depends on. Here the columns are dealt into small groups, and each coupling transforms one
group given all others, in an order that order.py finds:

    w = S(v),    v -> z:  for each group g:  z_g = R(v_g; c(v_rest))

with S an element-wise spline, next to the data, for the shape of each column by itself, R the splines of a coupling,
and c its network. Every layer starts as the identity, so the flow starts as its base.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

import pyro_flowkit.transforms as T
from pyro_flowkit.bases import StudentTBase, make_base
from pyro_flowkit.flow_distribution import FlowDistribution

COLUMN_BINS = 16
DEFAULT_LAYERS = 9


@dataclass(frozen=True)
class FlowSettings:
    """What, together with the number of columns, determines the structure of a flow.

    Attributes:
        layers: number of couplings; None is one for each column, at most 9.
        width: units in the residual networks of the couplings.
        blocks: their residual blocks.
        bins: bins of the couplings' splines.
        bound: the splines live on [-bound, bound], in units of standard deviations.
        dropout: probability of dropping a hidden unit while training.
        order: numbers of the columns, those to be transformed next to the data last; None is the order they have.
        base: "normal" or "student_t", with degrees of freedom for each column; None leaves it to the rows.

    Example:
        >>> from pyro_flowkit.tables import FlowSettings
        >>> FlowSettings(layers=4).layers
        4
    """

    layers: int | None = None
    width: int = 64
    blocks: int = 2
    bins: int = 8
    bound: float = 5.0
    dropout: float = 0.0
    order: tuple[int, ...] | None = None
    base: str | None = None

    def to_json(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


class TableFlow(nn.Module):
    """A flow over rows w of a table, its base at first.

    Args:
        input_dim: number of columns D.
        settings: its structure.
        degrees: of freedom of each column, shape ``(D,)``, to begin with, for a base of Student's t.

    Raises:
        ValueError: for settings that make no flow, with the numbers.
    """

    def __init__(self, input_dim: int, settings: FlowSettings, degrees: Tensor | None = None):
        super().__init__()
        if settings.base not in (None, "normal", "student_t"):
            raise ValueError(f'Expected base "normal" or "student_t", got {settings.base!r}')
        self.settings = settings
        count = min(input_dim, DEFAULT_LAYERS) if settings.layers is None else settings.layers
        if count < 1:
            raise ValueError(f"Expected at least one layer, got {count}")
        groups = _groups(input_dim, count, settings.order)
        self.layers = nn.ModuleList()
        now = identity = torch.arange(input_dim)
        for i in range(count):
            group = groups[(i - count) % len(groups)]
            order = torch.cat([identity[~torch.isin(identity, group)], group])
            self._permute(now, order)
            self.layers.append(_coupling(input_dim, len(group), settings))
            now = order
        self._permute(now, identity)
        self.layers.append(T.spline(input_dim, COLUMN_BINS, settings.bound))
        self.base = make_base(settings.base or "normal", input_dim, 0)
        if degrees is not None and isinstance(self.base, StudentTBase):
            self.base.log_df.data = degrees.log().float()

    def _permute(self, now: Tensor, order: Tensor) -> None:
        if not torch.equal(now, order):
            self.layers.append(T.permute(len(now), now.argsort()[order]))

    def distribution(self) -> FlowDistribution:
        """Of one row w, event shape ``(D,)``."""
        transforms: list[Transform] = [layer for layer in self.layers]  # type: ignore[misc]
        return FlowDistribution(self.base(), transforms)

    def log_prob(self, w: Tensor) -> Tensor:
        """Exact log density (nats) of ``w`` of shape ``(N, D)``, shape ``(N,)``."""
        return self.distribution().log_prob(w)


def _coupling(input_dim: int, transformed: int, settings: FlowSettings) -> T.SplineCoupling:
    return T.spline_coupling(
        input_dim,
        hidden_dims=[settings.width] * settings.blocks,
        count_bins=settings.bins,
        bound=settings.bound,
        mask=torch.arange(input_dim) < input_dim - transformed,
        identity=True,
        activation=nn.SiLU,
        residual=True,
        dropout=settings.dropout,
    )


def _groups(input_dim: int, count: int, order: Sequence[int] | None) -> list[Tensor]:
    """Columns dealt into at most ``count`` groups of equal size, at least two where there are two columns."""
    columns = torch.arange(input_dim) if order is None else torch.tensor(order)
    if columns.sort().values.tolist() != list(range(input_dim)):
        raise ValueError(f"Expected an order of {input_dim} columns, got {order}")
    groups = columns.tensor_split(min(input_dim, max(count, 2)))
    return [group.sort().values for group in groups]
