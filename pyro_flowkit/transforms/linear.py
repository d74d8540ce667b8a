"""Linear layers: an LU-factored mixing layer, the affine map of a guide, and the fixed standardisation of data.

All of them are the identity at first. The two triangular ones have positive diagonals, so their log-det is the sum of
the diagonal's logarithms.

References:
    Diederik P. Kingma, Prafulla Dhariwal. Glow. NeurIPS 2018 (LU factorisation of an invertible linear layer).

    Conor Durkan et al. Neural Spline Flows. NeurIPS 2019 (LU layers between couplings).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit.transforms.base import FlowTransformModule


class LULinear(FlowTransformModule):
    """``y = L U x + b`` with L unit lower and U upper triangular; the identity at first.

    Args:
        input_dim: size D of the event.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats, the same for every input.
    """

    def __init__(self, input_dim: int):
        super().__init__(input_dim)
        self.lower = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.upper = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.log_diagonal = nn.Parameter(torch.zeros(input_dim))
        self.bias = nn.Parameter(torch.zeros(input_dim))

    def _upper(self, dtype: torch.dtype) -> Tensor:
        diagonal = self.log_diagonal.to(dtype).exp()
        return self.upper.to(dtype).triu(1) + torch.diag_embed(diagonal)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        bias = self.bias
        working = _working(x, bias)
        upper = self._upper(working)
        weight = torch.addmm(upper, self.lower.to(working).tril(-1), upper)
        y = F.linear(x.to(working), weight, bias.to(working))
        return y.to(x.dtype), self._ladj(working).to(x.dtype).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        bias = self.bias
        working = _working(y, bias)
        x = y.to(working) - bias.to(working)
        x = _solve(self.lower.to(working), x, upper=False, unitriangular=True)
        x = _solve(self._upper(working), x, upper=True)
        return x.to(y.dtype), (-self._ladj(working)).to(y.dtype).expand(y.shape[:-1])

    def _ladj(self, dtype: torch.dtype) -> Tensor:
        return self.log_diagonal.to(dtype).sum(-1)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}"


class Affine(FlowTransformModule):
    """``y = loc + S x`` with learned location and scale; the last layer of a guide.

    The scale S is ``diag(s)`` or ``diag(s) (I + N)`` with N strictly lower triangular, so that a row of N is in units
    of its own scale. Every raw parameter is multiplied by ``rate``: under Adam, whose steps do not depend on the size
    of the gradient, the layer moves ``rate`` times faster than the rest of the flow.

    Args:
        loc: initial location, shape ``(D,)``.
        scale: initial scale of every dimension, positive.
        kind: "full" or "diagonal".
        rate: how much faster than other parameters the layer moves, positive.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: float,
        kind: Literal["full", "diagonal"] = "full",
        *,
        rate: float = 10.0,
    ):
        super().__init__(loc.shape[-1])
        self.rate = rate
        self.raw_loc = nn.Parameter(loc.detach().clone() / rate)
        self.raw_log_scale = nn.Parameter(torch.full_like(self.raw_loc, scale).log() / rate)
        shape = (self.input_dim, self.input_dim)
        self.raw_lower = nn.Parameter(loc.new_zeros(shape)) if kind == "full" else None

    @property
    def loc(self) -> Tensor:
        """Location, shape ``(D,)``."""
        return self.rate * self.raw_loc

    @property
    def log_scale(self) -> Tensor:
        """Logarithm of the diagonal of the scale, shape ``(D,)``."""
        return self.rate * self.raw_log_scale

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        working = _working(x, self.raw_loc)
        log_scale = self.log_scale.to(working)
        y = x.to(working)
        if self.raw_lower is not None:
            y = torch.add(y, F.linear(y, self.raw_lower.to(working).tril(-1)), alpha=self.rate)
        y = torch.add(y * log_scale.exp(), self.raw_loc.to(working), alpha=self.rate)
        return y.to(x.dtype), log_scale.sum(-1).to(x.dtype).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        working = _working(y, self.raw_loc)
        inverse_log_scale = -self.log_scale.to(working)
        x = torch.sub(y.to(working), self.raw_loc.to(working), alpha=self.rate)
        x = x * inverse_log_scale.exp()
        if self.raw_lower is not None:
            lower = self.rate * self.raw_lower.to(working)
            x = _solve(lower, x, upper=False, unitriangular=True)
        return x.to(y.dtype), inverse_log_scale.sum(-1).to(y.dtype).expand(y.shape[:-1])

    def extra_repr(self) -> str:
        kind = "diagonal" if self.raw_lower is None else "full"
        return f"input_dim={self.input_dim}, kind={kind!r}, rate={self.rate:g}"


class Standardization(FlowTransformModule):
    """``y = loc + L x``, fitted to data once and not learned: buffers, the identity at first."""

    def __init__(self, input_dim: int):
        super().__init__(input_dim)
        self.register_buffer("loc", torch.zeros(input_dim))
        self.register_buffer("scale_tril", torch.eye(input_dim))

    @torch.no_grad()
    def fit(self, data: Tensor, kind: Literal["diagonal", "full"] = "diagonal") -> None:
        """Take mean and scale from ``data`` of shape ``(n, D)``; "full" is the Cholesky factor of the covariance.

        Raises:
            ValueError: if the data is not finite, has another shape, or no spread to divide by.
        """
        if data.dim() != 2 or data.shape[-1] != self.input_dim or data.shape[0] < 2:
            raise ValueError(
                f"Expected data of shape (n, {self.input_dim}) with n >= 2, got shape {tuple(data.shape)}."
            )
        data = data.detach().to(torch.float64)
        if not bool(data.isfinite().all()):
            bad = int((~data.isfinite().all(-1)).sum())
            raise ValueError(
                f"Expected finite data, got NaN or inf in {bad} of {data.shape[0]} rows."
            )
        if kind == "diagonal":
            scale_tril = torch.diag(data.std(0))
        elif kind == "full":
            scale_tril, info = torch.linalg.cholesky_ex(data.mT.cov())
            if int(info) != 0:
                raise ValueError(
                    f"Expected data with a positive definite covariance, got a singular one (n={data.shape[0]}, "
                    f'D={self.input_dim}): use kind="diagonal", or add noise to discrete data (dequantize).'
                )
        else:
            raise ValueError(f'Expected kind to be "diagonal" or "full", got {kind!r}.')
        constant = (scale_tril.diagonal() <= 0).nonzero()[:, 0].tolist()
        if constant:
            raise ValueError(
                f"Expected every column to vary, got constant columns {constant}: drop them."
            )
        self.loc.copy_(data.mean(0))
        self.scale_tril.copy_(scale_tril)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        working = _working(x, self.loc)
        y = F.linear(x.to(working), self.scale_tril.to(working), self.loc.to(working))
        return y.to(x.dtype), self._ladj(working).to(x.dtype).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        working = _working(y, self.loc)
        x = _solve(self.scale_tril.to(working), y.to(working) - self.loc.to(working), upper=False)
        return x.to(y.dtype), (-self._ladj(working)).to(y.dtype).expand(y.shape[:-1])

    def _ladj(self, dtype: torch.dtype) -> Tensor:
        return self.scale_tril.to(dtype).diagonal().log().sum(-1)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}"


def lu_linear(input_dim: int) -> LULinear:
    """An :class:`LULinear` mixing layer, the identity at first."""
    return LULinear(input_dim)


def _working(x: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype to compute in: that of the wider of the two, and at least float32."""
    return torch.promote_types(torch.promote_types(x.dtype, parameter.dtype), torch.float32)


def _solve(triangle: Tensor, x: Tensor, *, upper: bool, unitriangular: bool = False) -> Tensor:
    """Solve ``triangle @ z = x`` for vectors ``x`` of shape ``(*batch, D)``; only the triangle itself is read."""
    columns = x.reshape(-1, x.shape[-1]).mT
    solution = torch.linalg.solve_triangular(
        triangle, columns, upper=upper, unitriangular=unitriangular
    )
    return solution.mT.reshape(x.shape)
