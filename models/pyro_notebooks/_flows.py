"""Flows made of conditional and plain transforms in Pyro's own distributions, called as a ``SplineFlow`` is."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class TransformFlow(nn.Module):
    """Transforms over a standard normal: ``flow()`` or ``flow(context)`` is a distribution of Pyro's.

    Args:
        input_dim: size of the event.
        transforms: of Pyro or of this package, from base to sample.
        owners: modules that own the parameters, where the transforms themselves do not (Pyro's inverses).
    """

    def __init__(
        self, input_dim: int, transforms: Sequence[Any], owners: Sequence[nn.Module] | None = None
    ):
        super().__init__()
        self.input_dim = input_dim
        self.transforms = list(transforms)
        self.owners = nn.ModuleList(self.transforms if owners is None else owners)

    def forward(self, context: Tensor | None = None) -> dist.TransformedDistribution:
        base = dist.Normal(torch.zeros(self.input_dim), torch.ones(self.input_dim)).to_event(1)
        if context is None:
            return dist.TransformedDistribution(base, self.transforms)
        return dist.ConditionalTransformedDistribution(base, self.transforms).condition(context)
