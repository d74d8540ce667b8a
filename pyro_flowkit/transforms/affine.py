r"""The affine map of a guide, its last layer: ``y = loc + S x`` with learned location and scale.

Location and scale are learned relative to fixed ones, ``origin`` and ``units`` U:

    loc = origin + U m,        S = U diag(s) (I + N)

N is strictly lower triangular ("full"), zero ("diagonal") or ``A B^T`` of low rank ("low_rank"). U is the identity at
first; :meth:`Affine.restart` puts a Gaussian there that was found otherwise, and learning goes on in its units: one
step then means as much for a posterior that is badly scaled as for any other.

Every raw parameter is multiplied by ``rate``: under Adam, whose steps do not depend on the size of the gradient, the
layer moves ``rate`` times faster than the rest of the flow. The entries of N, A and B are multiplied by
``rate / sqrt(D)``: a row has up to D of them, which together would otherwise move sqrt(D) times as far as its
diagonal, by noise alone.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit.ops import chain
from pyro_flowkit.ops.chain import Link
from pyro_flowkit.transforms.base import FlowTransformModule
from pyro_flowkit.transforms.linear import solve_triangle, working_dtype

AffineKind = Literal["full", "diagonal", "low_rank"]

MAX_RANK = 8
_TENSORS = ("origin", "units", "raw_loc", "raw_log_scale", "raw_lower")  # as a link has them


class Affine(FlowTransformModule):
    """``y = loc + S x``; S is lower triangular, diagonal, or diagonal times identity plus low rank.

    Args:
        loc: initial location, shape ``(D,)``.
        scale: initial scale of every dimension, positive.
        kind: "full", "diagonal" or "low_rank" (rank 8, or D if that is less).
        rate: how much faster than other parameters the layer moves, positive.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats, the same for every input.

    Raises:
        ValueError: for another kind.

    Example:
        >>> import torch
        >>> from pyro_flowkit.transforms.affine import Affine
        >>> y, log_det = Affine(torch.zeros(3), 0.5).call_and_ladj(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    is_affine = True
    origin: Tensor
    units: Tensor

    def __init__(
        self,
        loc: Tensor,
        scale: float,
        kind: AffineKind = "full",
        *,
        rate: float = 10.0,
    ):
        super().__init__(loc.shape[-1])
        if kind not in ("full", "diagonal", "low_rank"):
            raise ValueError(f'Expected "full", "diagonal" or "low_rank", got {kind!r}.')
        self.kind = kind
        size = self.input_dim
        self.rate = rate
        self._matrix_rate = rate / size**0.5
        ones = torch.ones_like(loc.detach())
        self.register_buffer("origin", torch.zeros_like(ones))
        self.register_buffer("units", torch.diag(ones) if kind == "full" else ones)
        self.raw_loc = nn.Parameter(loc.detach().clone() / rate)
        self.raw_log_scale = nn.Parameter((scale * ones).log() / rate)
        if kind == "full":
            self.raw_lower = nn.Parameter(ones.new_zeros(size, size))
        elif kind == "low_rank":
            rank = min(size, MAX_RANK)
            generator = torch.Generator().manual_seed(0)
            right = torch.randn(size, rank, generator=generator, dtype=torch.float64)
            self.raw_left = nn.Parameter(ones.new_zeros(size, rank))
            self.raw_right = nn.Parameter(torch.linalg.qr(right).Q.to(ones) / self._matrix_rate)

    @property
    def loc(self) -> Tensor:
        """Location, shape ``(D,)``."""
        return self._loc(self.raw_loc.dtype)

    @property
    def scale(self) -> Tensor:
        """S as a matrix, shape ``(D, D)``."""
        dtype = self.raw_loc.dtype
        if self.kind == "full":
            return self._triangle(dtype)
        diagonal = self._diagonal(dtype)
        if self.kind == "diagonal":
            return diagonal.diag()
        left, right, _ = self._low_rank(dtype)
        return diagonal[:, None] * (torch.eye(self.input_dim).to(left) + left @ right.mT)

    @torch.no_grad()
    def in_units(self, derivative: Tensor) -> Tensor:
        """A derivative with respect to y, shape ``(*batch, D)``, per unit of the scale: ``S^T`` times it, of which a
        "low_rank" map takes the diagonal."""
        dtype = derivative.dtype
        if self.kind == "full":
            return derivative @ self._triangle(dtype)
        return derivative * self._diagonal(dtype)

    @torch.no_grad()
    def restart(self, loc: Tensor, scale: Tensor) -> None:
        """Be the map with this location and scale, and learn in its units from here on.

        Args:
            loc: shape ``(D,)``.
            scale: a lower triangle ``(D, D)`` with a positive diagonal, or a positive diagonal ``(D,)``. A map that is
                not "full" takes the standard deviations, the norms of the triangle's rows.
        """
        if self.kind == "full":
            scale = scale if scale.dim() == 2 else scale.diag()
        else:
            scale = scale if scale.dim() == 1 else scale.norm(dim=-1)
        self.origin.copy_(loc)
        self.units.copy_(scale)
        self.raw_loc.zero_()
        self.raw_log_scale.zero_()
        if self.kind == "full":
            self.raw_lower.zero_()
        elif self.kind == "low_rank":
            self.raw_left.zero_()

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        dtype = working_dtype(x, self.raw_loc)
        y, loc = x.to(dtype), self._loc(dtype)
        if self.kind == "full":
            y = F.linear(y, self._triangle(dtype), loc)
        else:
            if self.kind == "low_rank":
                left, right, _ = self._low_rank(dtype)
                y = y + (y @ right) @ left.mT
            y = y * self._diagonal(dtype) + loc
        return y.to(x.dtype), self._ladj(dtype).to(x.dtype).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        dtype = working_dtype(y, self.raw_loc)
        x = y.to(dtype) - self._loc(dtype)
        if self.kind == "full":
            x = solve_triangle(self._triangle(dtype), x, upper=False)
        else:
            x = x / self._diagonal(dtype)
            if self.kind == "low_rank":
                left, right, core = self._low_rank(dtype)
                rows = (x @ right).reshape(-1, right.shape[-1])
                rows = torch.linalg.solve(core.mT, rows, left=False)
                x = x - (rows @ left.mT).reshape(x.shape)
        return x.to(y.dtype), (-self._ladj(dtype)).to(y.dtype).expand(y.shape[:-1])

    @torch.no_grad()
    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        if self.kind == "low_rank":
            return super().pushed_derivative(x, y, derivative)
        dtype = working_dtype(y, self.raw_loc)
        if self.kind == "diagonal":
            return (derivative.to(dtype) / self._diagonal(dtype)).to(derivative.dtype)
        rows = derivative.to(dtype).reshape(-1, self.input_dim)
        triangle = self._triangle(dtype)
        rows = torch.linalg.solve_triangular(triangle, rows, upper=False, left=False)
        return rows.to(derivative.dtype).reshape(derivative.shape)

    def link(self) -> Link | None:
        if type(self) is not Affine or self.kind == "low_rank":
            return None
        link = chain.affine(
            self.origin,
            self.units,
            self.raw_loc,
            self.raw_log_scale,
            self.raw_lower if self.kind == "full" else None,
            rate=self.rate,
            matrix_rate=self._matrix_rate,
        )
        return link._replace(names=_TENSORS[: len(link.tensors)])

    def _loc(self, dtype: torch.dtype) -> Tensor:
        moved = self.rate * self.raw_loc.to(dtype)
        units = self.units.to(dtype)
        return self.origin.to(dtype) + (units @ moved if self.kind == "full" else units * moved)

    def _diagonal(self, dtype: torch.dtype) -> Tensor:
        return self.units.to(dtype) * (self.rate * self.raw_log_scale.to(dtype)).exp()

    def _triangle(self, dtype: torch.dtype) -> Tensor:
        scale = (self.rate * self.raw_log_scale.to(dtype)).exp()
        lower = torch.addcmul(
            scale.diag(), self.raw_lower.to(dtype).tril(-1), scale[:, None], value=self._matrix_rate
        )
        return self.units.to(dtype) @ lower

    def _low_rank(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and ``I + B^T A``, whose determinant is that of ``I + A B^T`` (Woodbury)."""
        left = self._matrix_rate * self.raw_left.to(dtype)
        right = self._matrix_rate * self.raw_right.to(dtype)
        core = torch.eye(left.shape[-1], dtype=dtype, device=left.device) + right.mT @ left
        return left, right, core

    def _ladj(self, dtype: torch.dtype) -> Tensor:
        units = self.units.to(dtype)
        diagonal = units.diagonal() if self.kind == "full" else units
        ladj = diagonal.log().sum() + (self.rate * self.raw_log_scale.to(dtype)).sum()
        if self.kind == "low_rank":
            ladj = ladj + torch.linalg.slogdet(self._low_rank(dtype)[2]).logabsdet
        return ladj

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, kind={self.kind!r}, rate={self.rate:g}"
