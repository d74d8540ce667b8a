"""The guide for the global latents of an amortised model, where minibatches make its gradients noisy.

A minibatch of b out of N data pulls all particles of the global latents into one direction, sqrt(N / b) times as hard
as their own spread justifies. Two things follow:

- Particles come in pairs e, -e of the base while gradients are recorded: the common pull cancels in the scale.
- The splines are frozen at first. Under Adam, whose steps do not shrink with the gradient, such noise bends them
  further than any signal would, and with many data the posterior of global latents is close to normal.
"""

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Size, Tensor

from pyro_flowkit.bases import _StandardNormal
from pyro_flowkit.guides.auto_spline_flow import AutoSplineFlow
from pyro_flowkit.guides.local_latents import Latents


class GlobalSplineFlow(AutoSplineFlow):
    """An :class:`AutoSplineFlow` with antithetic particles; see the module's docstring."""

    def get_base_dist(self) -> dist.TorchDistribution:
        base = super().get_base_dist().base_dist
        return AntitheticNormal(base.loc, base.scale, validate_args=False).to_event(1)


class AntitheticNormal(_StandardNormal):
    """Standard normal draws, in pairs of opposite sign along the first dimension while gradients are recorded."""

    def rsample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        if not torch.is_grad_enabled() or len(shape) < 2 or shape[0] % 2:
            return super().rsample(sample_shape)
        half = self.loc.new_empty((shape[0] // 2, *shape[1:])).normal_()
        return torch.cat([half, -half])


def check_covered(
    guide: Callable[..., Any], latents: Latents, plate: str, args: tuple, kwargs: dict
) -> None:
    """Raise a ValueError unless a global guide samples these latents, and no others."""
    trace = poutine.trace(guide).get_trace(*args, **kwargs)
    nodes = trace.iter_stochastic_nodes()
    covered = sorted(name for name, node in nodes if not node["infer"].get("is_auxiliary"))
    if covered != latents.names:
        raise ValueError(
            f"Expected a global guide for the latents outside of plate {plate!r}, {latents.names}, got one for "
            f"{covered}: poutine.block(model, hide=[...]) leaves latents out."
        )
