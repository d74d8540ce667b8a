"""Moments of a flow: draws that are the same at every call, and the dimensions whose tails are too heavy for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, TransformedDistribution

from pyro_flowkit.ops.quasi_random import normal_draws, student_t_draws
from pyro_flowkit.seeds import fixed_seed
from pyro_flowkit.transforms.tensors import tensors_of

_FAR = 1e4  # where splines are linear


@torch.no_grad()
def fixed_draws(base: Distribution, transforms: Sequence[Transform], num_pairs: int) -> Tensor:
    """Draws of a base that went through transforms, shape ``(2 * num_pairs + 1, *B, D)``."""
    marginal: Any = getattr(base, "base_dist", None)
    is_known = isinstance(marginal, torch.distributions.Normal | torch.distributions.StudentT)
    if is_known and len(base.event_shape) == 1:
        loc, scale = marginal.loc, marginal.scale
        if isinstance(marginal, torch.distributions.Normal):
            noise = normal_draws(num_pairs, loc, seed=0)
        else:
            noise = student_t_draws(num_pairs, _first_row(marginal.df), seed=0)
        noise = torch.cat([torch.zeros_like(noise[:1]), noise])
        noise = noise.reshape(len(noise), *(1,) * len(base.batch_shape), -1)
        z = loc + scale * noise.expand(-1, *base.batch_shape, -1)
    else:
        device = next((t.device for t in tensors_of(base)), torch.device("cpu"))
        with fixed_seed(device):
            z = base.sample(torch.Size([2 * num_pairs + 1]))
    for transform in transforms:
        z = transform(z)
    return z


@torch.no_grad()
def reached_by_tail(distribution: TransformedDistribution, df: float) -> Tensor:
    """Which dimensions follow the tail of one of Student's t with at most so many degrees of freedom."""
    marginal: Any = getattr(distribution.base_dist, "base_dist", None)
    shape = distribution.batch_shape + distribution.event_shape
    if not isinstance(marginal, torch.distributions.StudentT):
        return torch.zeros(shape, dtype=torch.bool)
    far = marginal.loc.new_full((*shape,), _FAR)
    heavy = (marginal.df <= df).expand(shape)
    moved = far + _FAR * torch.diag_embed(heavy.to(far)).movedim(-2, 0)
    x = torch.cat([far.unsqueeze(0), moved])
    for transform in distribution.transforms:
        x = transform(x)
    return ((x[1:] - x[0]).abs() > 1e-3).any(0)


def _first_row(value: Tensor) -> Tensor:
    """Of a batch whose rows are equal."""
    return value.reshape(-1, value.shape[-1])[0]
