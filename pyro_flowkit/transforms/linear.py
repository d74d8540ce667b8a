"""Linear layers: an LU-factored mixing layer, and the fixed standardisation of data.

Both are the identity at first. Their triangles have positive diagonals, so the log-det is the sum of the diagonal's
logarithms.

References:
    Diederik P. Kingma, Prafulla Dhariwal. Glow. NeurIPS 2018 (LU factorisation of an invertible linear layer).

    Conor Durkan et al. Neural Spline Flows. NeurIPS 2019 (LU layers between couplings).
"""

from collections.abc import Callable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_flowkit.ops import chain
from pyro_flowkit.ops.chain import Link
from pyro_flowkit.transforms.base import FlowTransformModule


class LULinear(FlowTransformModule):
    """``y = L U x + b`` with L unit lower and U upper triangular; the identity at first.

    Both are in one parameter ``lu`` of shape ``(D, D)``: L below the diagonal, U above it, and on it the logarithm of
    U's diagonal.

    Args:
        input_dim: size D of the event.

    Shapes: ``(*batch, D)`` to ``(*batch, D)`` with log-det ``(*batch,)`` in nats, the same for every input.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> y, log_det = T.LULinear(3).call_and_ladj(torch.randn(5, 3))
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    is_affine = True

    def __init__(self, input_dim: int):
        super().__init__(input_dim)
        self.lu = nn.Parameter(torch.zeros(input_dim, input_dim))
        self.bias = nn.Parameter(torch.zeros(input_dim))

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(x)
        working = working_dtype(x, self.lu)
        lower, upper, ladj = self._factors(working)
        weight = torch.addmm(upper, lower.tril(-1), upper)
        y = F.linear(x.to(working), weight, self.bias.to(working))
        return y.to(x.dtype), ladj.to(x.dtype).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        working = working_dtype(y, self.lu)
        lower, upper, ladj = self._factors(working)
        x = y.to(working) - self.bias.to(working)
        x = solve_triangle(lower, x, upper=False, unitriangular=True)
        x = solve_triangle(upper, x, upper=True)
        return x.to(y.dtype), (-ladj).to(y.dtype).expand(y.shape[:-1])

    @torch.no_grad()
    def pushed_derivative(self, x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
        lower, upper, _ = self._factors(working_dtype(y, self.lu))
        rows = derivative.to(lower.dtype).reshape(-1, self.input_dim)
        rows = torch.linalg.solve_triangular(upper, rows, upper=True, left=False)
        rows = torch.linalg.solve_triangular(
            lower, rows, upper=False, left=False, unitriangular=True
        )
        return rows.to(derivative.dtype).reshape(derivative.shape)

    def link(self) -> Link | None:
        if type(self) is not LULinear:
            return None
        return chain.lu(self.lu, self.bias)._replace(names=("lu", "bias"))

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A matrix with L below its diagonal; U; and the log-det."""
        lu = self.lu.to(dtype)
        log_diagonal = lu.diagonal()
        return lu, lu.triu(1) + log_diagonal.exp().diag(), log_diagonal.sum()

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}"


class Standardization(FlowTransformModule):
    """``y = loc + L x``, fitted to data once and not learned: buffers, the identity at first.

    Both are in float64 whatever the flow's dtype, and so is the subtraction of ``loc``: of data far from zero (times,
    coordinates, years) little would be left in float32. Only float64 data have digits there.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> data = 5.0 + 2.0 * torch.randn(500, 2)
        >>> transform = T.Standardization(2)
        >>> transform.fit(data)
        >>> z = transform.inv(data)
        >>> torch.allclose(z.mean(0), torch.zeros(2), atol=1e-4), torch.allclose(z.std(0), torch.ones(2), atol=0.01)
        (True, True)
    """

    is_affine = True

    def __init__(self, input_dim: int):
        super().__init__(input_dim)
        self.register_buffer("loc", torch.zeros(input_dim, dtype=torch.float64))
        self.register_buffer("scale_tril", torch.eye(input_dim, dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = _in_the_same_dtype(fn, buffer)
        return self

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
        working = working_dtype(x, x)
        # every conversion is spelt out: a compiled trace gives an operation of two dtypes a gradient of the wider one
        y = F.linear(x.to(working), self.scale_tril.to(working)).to(self.loc.dtype) + self.loc
        return y.to(x.dtype), self._ladj(working).to(x.dtype).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check_input(y)
        working = working_dtype(y, y)
        x = solve_triangle(
            self.scale_tril.to(working), (y.to(self.loc.dtype) - self.loc).to(working), upper=False
        )
        return x.to(y.dtype), (-self._ladj(working)).to(y.dtype).expand(y.shape[:-1])

    def _ladj(self, dtype: torch.dtype) -> Tensor:
        return self.scale_tril.diagonal().log().sum(-1).to(dtype)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}"


def _in_the_same_dtype(fn: Callable[[Tensor], Tensor], buffer: Tensor) -> Tensor:
    """What a module's conversion does to a buffer, its dtype left as it is where the device has that."""
    try:
        moved = fn(buffer)
        return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
    except TypeError:  # a device without float64
        return fn(buffer.float())


def lu_linear(input_dim: int) -> LULinear:
    """An :class:`LULinear` mixing layer, the identity at first.

    Example:
        >>> import torch
        >>> import pyro_flowkit.transforms as T
        >>> transform = T.lu_linear(3)
        >>> x = torch.randn(5, 3)
        >>> y, log_det = transform.call_and_ladj(x)
        >>> y.shape, log_det.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    return LULinear(input_dim)


def working_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype to compute in: that of the wider of the two, and at least float32."""
    return torch.promote_types(torch.promote_types(x.dtype, parameter.dtype), torch.float32)


def solve_triangle(
    triangle: Tensor, x: Tensor, *, upper: bool, unitriangular: bool = False
) -> Tensor:
    """Solve ``triangle @ z = x`` for vectors ``x`` of shape ``(*batch, D)``; only the triangle itself is read."""
    columns = x.reshape(-1, x.shape[-1]).mT
    solution = torch.linalg.solve_triangular(
        triangle, columns, upper=upper, unitriangular=unitriangular
    )
    return solution.mT.reshape(x.shape)
