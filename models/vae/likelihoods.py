r"""The discretised logistic distribution: a density of integer levels that needs no noise.

With :math:`a = (k + 1/2 - \mu) / s` and :math:`b = (k - 1/2 - \mu) / s`, a level k that is neither the lowest nor the
highest has

.. math:: p(k) = \sigma(a) - \sigma(b) = \sigma(a)\, \sigma(-b)\, (1 - e^{-1/s})

and the two at the ends have all that is beyond them: :math:`\sigma(a)` and :math:`\sigma(-b)`. The product has no
difference of nearly equal numbers, so its logarithm is finite wherever the distribution is.

Reference:
    Diederik P. Kingma et al. Improved Variational Inference with Inverse Autoregressive Flow. NeurIPS 2016, appendix.
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all


class DiscretizedLogistic(dist.TorchDistribution):
    """A logistic distribution rounded to the integers 0 to ``levels - 1``; what lies beyond goes to the ends.

    Args:
        loc: location, in levels.
        scale: positive scale, in levels; broadcasts with ``loc``.
        levels: number of levels, at least 2.

    Raises:
        ValueError: for fewer than two levels.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int, *, validate_args: bool | None = None
    ):
        if levels < 2:
            raise ValueError(f"Expected levels >= 2, got {levels}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability (nats) of levels, of the shape that they and the batch shape broadcast to."""
        if self._validate_args:
            self._validate_sample(value)
        above = F.logsigmoid((value + 0.5 - self.loc) / self.scale)
        below = F.logsigmoid((self.loc - value + 0.5) / self.scale)
        inside = above + below + torch.log(-torch.expm1(-1.0 / self.scale))
        at_end = torch.where(value <= 0, above, below)
        return torch.where((value <= 0) | (value >= self.levels - 1), at_end, inside)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        u = torch.rand(self._extended_shape(torch.Size(sample_shape))).to(self.loc)
        x = self.loc + self.scale * torch.logit(u, eps=torch.finfo(u.dtype).eps)
        return x.round().clamp(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """Mean of the logistic distribution before rounding, within the range of the levels."""
        return self.loc.clamp(0, self.levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "DiscretizedLogistic":
        shape = torch.Size(batch_shape)
        return DiscretizedLogistic(
            self.loc.expand(shape),
            self.scale.expand(shape),
            self.levels,
            validate_args=self._validate_args,
        )
