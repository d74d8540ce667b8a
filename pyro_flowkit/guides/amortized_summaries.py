"""Marginal medians and quantiles of an amortised guide: of the global latents, and of the local ones of any data.

They come from fixed draws, the same at every call and for every row.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_flowkit.flow_distribution import FlowDistribution
from pyro_flowkit.guides.amortized_parts import AmortizedParts
from pyro_flowkit.guides.global_spline_flow import centred
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.guides.supports import bijection_to
from pyro_flowkit.ops.checks import check_floating
from pyro_flowkit.seeds import fixed_seed

NUM_PAIRS = 256  # of antithetic draws
MAX_CHUNK = 2**20  # values in memory at a time


class AmortizedSummaries(AmortizedParts):
    """What can be asked of a guide for local latents, after its setup, without drawing from it."""

    def unpack(self, latent: Tensor) -> dict[str, Tensor]:
        """Values of the local latents, ``{site: value}``, from draws of :meth:`get_posterior`.

        Args:
            latent: unconstrained, shape ``(*sample_shape, batch, D)``.

        Raises:
            ValueError: if they are not in floating point.
        """
        self._require_setup()
        check_floating(latent, "latents")
        return {
            site.name: bijection_to(site.support)(unconstrained)
            for site, unconstrained in self._local.unpack_rows(latent)
        }

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians, ``{site: value}``, of the global latents and of the local latents of these data."""
        values = self.quantiles([0.5], *args, **kwargs)
        return {name: value[0] for name, value in values.items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal quantiles, ``{site: values}`` stacked along a new first dimension.

        Those of local latents come from fixed draws, the same for every row, in unconstrained space; a row for each
        row of the encoder's features.

        Raises:
            ValueError: for a quantile outside of [0, 1].
        """
        self._require_setup()
        self.sync_with_store(lend=False)
        levels = torch.as_tensor(quantiles, dtype=torch.float64).reshape(-1)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"Expected quantiles in [0, 1], got {levels.tolist()}.")
        with poutine.block(), fixed_seed(self.affine.weight.device):
            self._create_plates(*args, **kwargs)
            self._lead()
            features = self._encode(args, kwargs)
            result = self._global_quantiles(levels, args, kwargs)
            context = self._fixed_global_context(args, kwargs)
        latents = local_quantiles(
            self.flow.base(),
            lambda rows: self._posterior(rows, context),
            features,
            levels.to(features),
        )
        result.update(self.unpack(latents))
        return result

    def _global_medians(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        medians = self._global_quantiles(torch.tensor([0.5]), args, kwargs)
        return {name: value[0] for name, value in medians.items()}

    def _global_quantiles(self, levels: Tensor, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        if self.global_guide is None:
            return {}
        try:
            return dict(self.global_guide.quantiles(levels.tolist(), *args, **kwargs))
        except (AttributeError, NotImplementedError):  # not every guide has them
            pass
        values = self._fixed_global_draws(args, kwargs)
        result = {}
        for site in self._global.sites:
            to = bijection_to(site.support)
            unconstrained = to.inv(values[site.name])
            result[site.name] = to(torch.quantile(unconstrained, levels.to(unconstrained), dim=0))
        return result

    def _fixed_global_draws(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        nesting = max([-self._dim, *(-frame.dim for frame in self._prototype_frames.values())])
        program = partial(self.global_guide, *args, **kwargs)
        return global_draws(program, self._global, nesting, self.affine.weight.device)

    def _fixed_global_context(self, args: tuple, kwargs: dict) -> Tensor | None:
        if not self.condition_on_global:
            return None
        draws = self._fixed_global_draws(args, kwargs)
        context = centred(self.global_guide, self._global, draws)
        return context.reshape(-1, 1, self._global.size)


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
    with fixed_seed(device, seed=1), poutine.block(), plate:
        values = guide()
    result = {}
    for site in latents.sites:
        value = values[site.name]
        own = value.shape[value.dim() - site.event_dim - len(site.batch_shape) :]
        result[site.name] = value.reshape(-1, *own)
    return result
