"""Quantiles of an amortised guide from fixed draws, the same at every call and for every row."""

from collections.abc import Callable, Mapping

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.seeds import fixed_seed

NUM_PAIRS = 256  # of antithetic draws
MAX_CHUNK = 2**20  # values in memory at a time


def local_quantiles(
    base: torch.distributions.Distribution,
    posterior: Callable[[Tensor], FlowDistribution],
    features: Tensor,
    levels: Tensor,
) -> Tensor:
    """Marginal quantiles of unconstrained local latents, shape ``(len(levels), rows, D)``.

    Args:
        base: of the flow.
        posterior: the distribution for features; with global draws in the context it has these on the left.
        features: shape ``(rows, context_dim)``.
        levels: in [0, 1].
    """
    draws = FlowDistribution(base, []).fixed_draws(NUM_PAIRS).unsqueeze(1)
    parts = []
    for rows in features.split(max(1, MAX_CHUNK // draws.numel())):
        latents = draws
        for transform in posterior(rows).transforms:
            latents = transform(latents)
        parts.append(torch.quantile(latents, levels, dim=0))
    return torch.cat(parts, dim=1)


def global_draws(
    guide: Callable[[], Mapping[str, Tensor]], latents: Latents, nesting: int, device: torch.device
) -> dict[str, Tensor]:
    """Values of the global latents, one for each fixed draw of :func:`local_quantiles`, but independent of it.

    Args:
        guide: the global guide.
        latents: the global latents.
        nesting: number of plate dims to stay left of.
        device: of the guide.
    """
    plate = pyro.plate("_fixed_draws", 2 * NUM_PAIRS + 1, dim=-1 - nesting)
    with fixed_seed(device):
        torch.default_generator.manual_seed(1)
        if device.type == "cuda":
            torch.cuda.manual_seed(1)
        with poutine.block(), plate:
            values = guide()
    result = {}
    for site in latents.sites:
        value = values[site.name]
        own = value.shape[value.dim() - site.event_dim - len(site.batch_shape) :]
        result[site.name] = value.reshape(-1, *own)
    return result
