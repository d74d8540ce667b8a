r"""From real numbers onto supports, without losing the tails that a float can hold.

These are the functions that ``torch.distributions.biject_to`` has for the same supports, computed differently. PyTorch
forms a simplex from probabilities that it clamps at the machine epsilon, 1.2e-7 in float32, and an interval likewise;
of the prior ``Dirichlet([0.1, ...])`` a fifth of the mass of a component lies below that. A float itself reaches much
further down, to 1e-38, so here

    y_k = exp(log sigmoid(t_k) + sum_{j<k} log sigmoid(-t_j)),        t_k = x_k - log(K - k),

is summed in float64, and only what is returned is rounded to the dtype of x. Log-dets are functions of x alone. Values
stop at ``smallest(dtype)``; :meth:`at_edge` says which have.

Positive definite and lower triangular matrices, for which PyTorch has no bijection, are added in NumPyro's layout:
the entries below the diagonal row by row, and then the logarithms of the diagonal.
"""

import math
from functools import cache
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.transforms import Transform
from torch.nn.functional import logsigmoid, pad


def smallest(dtype: torch.dtype) -> float:
    """The smallest value that a positive latent takes: a thousand times the smallest normal number of the dtype.

    At that number itself the derivative of ``n * log(value)`` would overflow for n > 4.
    """
    return 1024 * torch.finfo(dtype).tiny


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max / 4


def _wide(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()  # Apple's GPUs have no float64


class _TailTransform(Transform):
    """A bijection without parameters that keep it from being cached or compared."""

    bijective = True

    def with_cache(self, cache_size: int = 1) -> "_TailTransform":
        return self

    def at_edge(self, y: Tensor) -> Tensor:
        """Where values have stopped at the last one that the dtype can hold, bool, one for each value or its like."""
        raise NotImplementedError


class HalfLine(_TailTransform):
    """``bound + direction * exp(x)``; precise to the smallest number if the bound is 0."""

    domain = constraints.real

    def __init__(self, bound: Any = 0.0, *, direction: int = 1):
        super().__init__()
        self.bound, self.direction = bound, direction

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        kind = constraints.greater_than if self.direction > 0 else constraints.less_than
        return kind(self.bound)

    def _call(self, x: Tensor) -> Tensor:
        size = x.clamp(max=math.log(_largest(x.dtype))).exp()
        if self._is_positive():
            return size.clamp(min=smallest(x.dtype))
        return _at_least(self.bound + self.direction * size, self.bound, self.direction)

    def _inverse(self, y: Tensor) -> Tensor:
        distance = self.direction * (y - self.bound)
        return distance.clamp(min=smallest(y.dtype)).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x + torch.zeros_like(y)

    def at_edge(self, y: Tensor) -> Tensor:
        if self._is_positive():
            return (y <= smallest(y.dtype)) | (y >= _largest(y.dtype) / 2)
        return self.direction * (y - _next(self.bound, self.direction, y)) <= 0

    def _is_positive(self) -> bool:
        return self.direction > 0 and not isinstance(self.bound, Tensor) and self.bound == 0


class Between(_TailTransform):
    """``low + (high - low) sigmoid(x)``, measured from the nearer end; precise to the smallest number near a 0."""

    domain = constraints.real

    def __init__(self, low: Any, high: Any):
        super().__init__()
        self.low, self.high = low, high

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.interval(self.low, self.high)

    def _call(self, x: Tensor) -> Tensor:
        width = self.high - self.low
        y = torch.where(
            x < 0, self.low + width * x.sigmoid(), self.high - width * x.neg().sigmoid()
        )
        return _at_least(_at_least(y, self.low, 1), self.high, -1)

    def _inverse(self, y: Tensor) -> Tensor:
        y = _at_least(_at_least(y, self.low, 1), self.high, -1)
        return (y - self.low).log() - (self.high - y).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        width = self.high - self.low
        log_width = width.log() if isinstance(width, Tensor) else math.log(width)
        return log_width + logsigmoid(x) + logsigmoid(-x)

    def at_edge(self, y: Tensor) -> Tensor:
        return (y <= _next(self.low, 1, y)) | (y >= _next(self.high, -1, y))


class StickBreaking(_TailTransform):
    """PyTorch's ``StickBreakingTransform`` with small components precise: ``(*, K - 1)`` -> ``(*, K)``."""

    domain = constraints.real_vector
    codomain = constraints.simplex

    def _call(self, x: Tensor) -> Tensor:
        return self._logs(x)[0].exp().to(x.dtype).clamp(min=smallest(x.dtype))

    def _inverse(self, y: Tensor) -> Tensor:
        wide = _wide(y.clamp(min=smallest(y.dtype)))
        log_rest = _sum_from_the_right(wide)[..., 1:].log()
        return (wide[..., :-1].log() - log_rest - _log_offset(wide[..., 1:])).to(y.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        logs, log_left = self._logs(x)
        return (logs[..., :-1] + log_left).sum(-1).to(x.dtype)

    def at_edge(self, y: Tensor) -> Tensor:
        return y <= smallest(y.dtype)

    @staticmethod
    def _logs(x: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the components ``(*, K)``, and of what each break leaves of the stick, ``(*, K - 1)``."""
        wide = _wide(x)
        t = wide + _log_offset(wide)
        log_left = logsigmoid(-t)
        return pad(logsigmoid(t), [0, 1]) + pad(log_left.cumsum(-1), [1, 0]), log_left

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))


class CorrCholesky(_TailTransform):
    r"""PyTorch's ``CorrCholeskyTransform`` without its clamps: ``(*, n (n - 1) / 2)`` -> ``(*, n, n)``.

    ``L_ij = tanh(x_ij) prod_{k<j} sech(x_ik)`` below the diagonal, and ``L_ii = prod_{k<i} sech(x_ik)``.
    """

    domain = constraints.real_vector
    codomain = constraints.corr_cholesky

    def _call(self, x: Tensor) -> Tensor:
        matrix = _strictly_lower(_wide(x))
        left = _log_left(matrix).exp()
        diagonal = _diagonal(left).to(x.dtype).clamp(min=smallest(x.dtype))
        return (matrix.tanh() * left).to(x.dtype) + torch.diag_embed(diagonal)

    def _inverse(self, y: Tensor) -> Tensor:
        wide = _wide(y)
        rest = _sum_from_the_right(wide.square()).sqrt()
        rows, columns = _below_diagonal(y.shape[-1], y.device)
        return torch.asinh(wide[..., rows, columns] / rest[..., rows, columns + 1]).to(y.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        matrix = _strictly_lower(_wide(x))
        below = torch.ones_like(matrix).tril(-1)
        return ((2 * _log_sech(matrix) + _log_left(matrix)) * below).sum((-2, -1)).to(x.dtype)

    def at_edge(self, y: Tensor) -> Tensor:
        return _diagonal(y) <= smallest(y.dtype)

    def forward_shape(self, shape: Any) -> torch.Size:
        size = math.isqrt(2 * shape[-1]) + 1
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] - 1) // 2))


class LowerCholesky(_TailTransform):
    """Lower triangular matrices with a positive diagonal: ``(*, n (n + 1) / 2)`` -> ``(*, n, n)``."""

    domain = constraints.real_vector
    codomain = constraints.lower_cholesky

    def _call(self, x: Tensor) -> Tensor:
        size = self.forward_shape(x.shape)[-1]
        diagonal = HalfLine()(x[..., x.shape[-1] - size :])
        return _strictly_lower(x[..., : x.shape[-1] - size]) + torch.diag_embed(diagonal)

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = _below_diagonal(y.shape[-1], y.device)
        return torch.cat([y[..., rows, columns], HalfLine().inv(_diagonal(y))], dim=-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x[..., x.shape[-1] - y.shape[-1] :].sum(-1)

    def at_edge(self, y: Tensor) -> Tensor:
        return HalfLine().at_edge(_diagonal(y))

    def forward_shape(self, shape: Any) -> torch.Size:
        size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


class PositiveDefinite(LowerCholesky):
    """``L L^T`` of a :class:`LowerCholesky`; log-dets are those of the lower triangle, the measure of a Wishart."""

    codomain = constraints.positive_definite

    def _call(self, x: Tensor) -> Tensor:
        lower = super()._call(x)
        return lower @ lower.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = y.shape[-1]
        powers = torch.arange(size + 1, 1, -1, dtype=x.dtype, device=x.device)
        return size * math.log(2) + (powers * x[..., x.shape[-1] - size :]).sum(-1)

    def at_edge(self, y: Tensor) -> Tensor:
        return _diagonal(y) <= smallest(y.dtype)


def _next(bound: Any, sign: int, like: Tensor) -> Any:
    """The value next to a bound, on the side of ``sign``; next to 0 the smallest."""
    if not isinstance(bound, Tensor):
        return _next_number(float(bound), sign, like.dtype)
    bound = bound.to(like)
    step = torch.nextafter(bound, torch.full_like(bound, sign * math.inf))
    least = smallest(like.dtype)
    return torch.where(bound.abs() < least, bound + sign * least, step)


@cache
def _next_number(bound: float, sign: int, dtype: torch.dtype) -> float:
    return float(_next(torch.tensor(bound), sign, torch.zeros((), dtype=dtype)))


def _at_least(y: Tensor, bound: Any, sign: int) -> Tensor:
    """At least one step away from a bound, on the side of ``sign``."""
    edge = _next(bound, sign, y)
    return y.clamp(min=edge) if sign > 0 else y.clamp(max=edge)


def _log_offset(x: Tensor) -> Tensor:
    """``-log(K - k)`` for k = 1, ..., K - 1, which takes zeros to the centre of the simplex; x is ``(*, K - 1)``."""
    return -torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device).log()


def _sum_from_the_right(y: Tensor) -> Tensor:
    return y.flip(-1).cumsum(-1).flip(-1)


def _below_diagonal(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(size, size, -1, device=device)
    return rows, columns


def _strictly_lower(x: Tensor) -> Tensor:
    """``(*, n (n - 1) / 2)`` -> ``(*, n, n)``, row by row."""
    size = math.isqrt(2 * x.shape[-1]) + 1
    rows, columns = _below_diagonal(size, x.device)
    index = (rows * size + columns).expand(*x.shape[:-1], -1)
    flat = x.new_zeros(*x.shape[:-1], size * size).scatter(-1, index, x)
    return flat.reshape(*x.shape[:-1], size, size)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _log_sech(x: Tensor) -> Tensor:
    return math.log(2) + logsigmoid(-2 * x) + x


def _log_left(matrix: Tensor) -> Tensor:
    """Logarithm of the length that the entries to the left of each leave of a row, for a strictly lower matrix."""
    return pad(_log_sech(matrix).cumsum(-1)[..., :-1], [1, 0])
