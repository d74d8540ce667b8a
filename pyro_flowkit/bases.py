"""Base distributions of a flow: small modules that make a distribution with event shape (D,)."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

INITIAL_DF = 10.0
LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


def make_base(
    base: str | torch.distributions.Distribution,
    input_dim: int,
    context_dim: int,
) -> nn.Module:
    """The module for ``base``; see :class:`~pyro_flowkit.SplineFlow`.

    Raises:
        ValueError: for an unknown name, a conditional base without a context, or a distribution of another event shape.
    """
    if isinstance(base, torch.distributions.Distribution):
        return FixedBase(base, input_dim)
    if base == "normal":
        return NormalBase(input_dim)
    if base == "student_t":
        return StudentTBase(input_dim)
    if base == "conditional_normal":
        if not context_dim:
            raise ValueError('Expected context_dim >= 1 for base="conditional_normal", got 0.')
        return NormalBase(input_dim)
    raise ValueError(
        'Expected base to be "normal", "student_t", "conditional_normal" or a distribution with event shape '
        f"({input_dim},), got {base!r}."
    )


class _StandardNormal(dist.Normal):
    """A normal of location 0 and scale 1, whose density takes three operations instead of nine."""

    def log_prob(self, value: Tensor) -> Tensor:
        return -0.5 * value.square() - LOG_SQRT_2PI


class NormalBase(nn.Module):
    """Standard normal; follows the device and dtype of the module."""

    loc: Tensor
    scale: Tensor

    def __init__(self, input_dim: int):
        super().__init__()
        self.register_buffer("loc", torch.zeros(input_dim), persistent=False)
        self.register_buffer("scale", torch.ones(input_dim), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return _StandardNormal(self.loc, self.scale, validate_args=False).to_event(1)


class _ClosedUniform(dist.Uniform):
    """A uniform whose upper end counts, and what rounding puts beside an end: an angle may be pi itself."""

    def log_prob(self, value: Tensor) -> Tensor:
        slack = 8 * torch.finfo(value.dtype).eps * torch.maximum(self.low.abs(), self.high.abs())
        is_inside = (value >= self.low - slack) & (value <= self.high + slack)
        log_density = -(self.high - self.low).log()
        return torch.where(is_inside, log_density, -math.inf)


def _with_ends(base: torch.distributions.Distribution) -> torch.distributions.Distribution:
    """The same distribution; a uniform with its upper end."""
    marginal = getattr(base, "base_dist", None)
    if not isinstance(marginal, torch.distributions.Uniform):
        return base
    closed = _ClosedUniform(marginal.low, marginal.high, validate_args=False)
    return closed.to_event(len(base.event_shape))


class _StudentT(dist.StudentT):
    """Student's t around 0 of scale 1, whose chi-square, which draws, is not validated: that would break a graph."""

    def __init__(self, df: Tensor):
        self.df, self.loc, self.scale = df, torch.zeros_like(df), torch.ones_like(df)
        self._chi2 = torch.distributions.Chi2(df, validate_args=False)
        torch.distributions.Distribution.__init__(self, df.shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_StudentT":
        """A new one of this batch shape."""
        return super().expand(batch_shape, self._get_checked_instance(_StudentT, _instance))


class StudentTBase(nn.Module):
    """Student's t with learned degrees of freedom for every dimension, 10 at first."""

    def __init__(self, input_dim: int):
        super().__init__()
        self.log_df = nn.Parameter(torch.full((input_dim,), math.log(INITIAL_DF)))

    def forward(self) -> dist.TorchDistribution:
        return _StudentT(self.log_df.exp()).to_event(1)


class FixedBase(nn.Module):
    """A distribution as it was handed in: its tensors do not follow ``.to()`` and are not in ``state_dict``."""

    def __init__(self, distribution: torch.distributions.Distribution, input_dim: int):
        super().__init__()
        if distribution.event_shape != (input_dim,):
            raise ValueError(
                f"Expected a base distribution with event shape ({input_dim},), got "
                f"{tuple(distribution.event_shape)} (batch shape {tuple(distribution.batch_shape)}): "
                ".to_event(1) makes the last batch dimension the event."
            )
        self.distribution = _with_ends(distribution)

    def forward(self) -> torch.distributions.Distribution:
        return self.distribution
