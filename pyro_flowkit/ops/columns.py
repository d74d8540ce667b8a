"""Which columns of a vector go through splines, and whose parameters those splines have."""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """A split of the columns 0 to ``dim - 1``.

    Args:
        dim: size of the event.
        own: columns whose splines have parameters of their own in every row.
        shared: columns whose splines have parameters that all rows share.

    The other columns pass through unchanged.

    Example:
        >>> from pyro_flowkit.ops import Columns
        >>> Columns(4, own=(0, 2), shared=(3,))  # column 1 passes through
        Columns(dim=4, own=(0, 2), shared=(3,))
    """

    dim: int
    own: tuple[int, ...]
    shared: tuple[int, ...] = ()

    rest: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """The columns that pass through unchanged."""
    packed: tuple[int, bytes, bytes] = field(init=False, repr=False, compare=False)
    """As the kernel reads them."""

    def __post_init__(self) -> None:
        taken = {*self.own, *self.shared}
        rest = tuple(column for column in range(self.dim) if column not in taken)
        own, shared = (struct.pack(f"{len(c)}i", *c) for c in (self.own, self.shared))
        object.__setattr__(self, "rest", rest)
        object.__setattr__(self, "packed", (self.dim, own, shared))

    @property
    def all_shared(self) -> "Columns":
        """The same columns, where all parameters are the same for the whole batch."""
        return Columns(self.dim, (), self.own + self.shared)

    def merge(self, own: Tensor, shared: Tensor, rest: Tensor) -> Tensor:
        """The parts, each of shape ``(*batch, its columns)``, in the order of the columns again."""
        parts = ((self.own, own), (self.shared, shared), (self.rest, rest))
        present = sorted((part for part in parts if part[0]), key=lambda part: part[0])
        together = torch.cat([tensor for _, tensor in present], dim=-1)
        order = _inverse([column for columns, _ in present for column in columns])
        return take(together, order, self.dim)


def take(x: Tensor, columns: tuple[int, ...], dim: int) -> Tensor:
    """These of the ``dim`` columns of ``x``: a view where they are neighbours, as the halves of a coupling are."""
    if not columns:
        return x[..., :0]
    first, stop = columns[0], columns[0] + len(columns)
    if columns == tuple(range(first, stop)):
        return x if len(columns) == dim else x[..., first:stop]
    return x.index_select(-1, torch.tensor(columns, device=x.device))


def _inverse(order: list[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
