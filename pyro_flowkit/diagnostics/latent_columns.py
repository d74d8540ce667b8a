"""The latents of a model in columns: draws of posterior and prior, and what their KL is made of."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_flowkit.diagnostics.naming import latent_sites
from pyro_flowkit.diagnostics.particles import Particles
from pyro_flowkit.programs.sites import is_point_mass, scored_sites, unscaled_log_prob


class LatentColumns:
    """The latents of some particles, as columns of shape ``(particles, data, latents)``."""

    def __init__(self, particles: Particles, dim: int, size: int):
        self.particles, self.dim, self.size = particles, dim, size
        self.sites = dict(latent_sites(particles))

    def names(self) -> dict[str, list[str]]:
        """Of the latents of every site, in the order of the columns."""
        names = {}
        for name, site in self.sites.items():
            value = self.particles.view(site["value"], site["fn"].event_dim)
            shape = [size for size in self._first(value).shape[2:] if size > 1]
            indices = [",".join(map(str, index)) for index in np.ndindex(*shape)]
            names[name] = [f"{name}[{index}]" if index else name for index in indices]
        return names

    def columns(self) -> dict[str, Tensor]:
        """Draws of posterior and prior, KL of every latent, site, and of all together, ``(.., 1)``."""
        found: dict[str, list[Tensor]] = {"posterior": [], "prior": [], "kl": [], "site_kl": []}
        for name, site in self.sites.items():
            guide_site = self.particles.guide_trace.nodes[name]
            event_dim = site["fn"].event_dim
            value = self._flat(site["value"], event_dim)
            found["posterior"].append(value)
            found["prior"].append(self._flat(site["fn"].sample(), event_dim))
            kl = _kl_by_dimension(guide_site, site)
            exact = torch.full_like(value, torch.nan) if kl is None else self._flat(kl, event_dim)
            found["kl"].append(exact)
            found["site_kl"].append(self._site_kl(guide_site, site, exact.sum(-1)).unsqueeze(-1))
        columns = {name: torch.cat(values, -1) for name, values in found.items()}
        total = sum(sign * self._log_prob(site) for site, sign in self._all())
        exact = columns["kl"].sum(-1)
        columns["kl_total"] = torch.where(exact.isnan(), total, exact).unsqueeze(-1)
        if len(self.sites) == 1:
            columns["site_kl"] = columns["kl_total"]
        return columns

    def _all(self) -> Iterator[tuple[Any, int]]:
        for _, site in scored_sites(self.particles.guide_trace):
            yield site, 1
        for site in self.sites.values():
            yield site, -1

    def _site_kl(self, guide_site: Any, site: Any, exact: Tensor) -> Tensor:
        """NaN where the log q of a point mass is that of another site, or of none."""
        if is_point_mass(guide_site["fn"]):
            return torch.full_like(exact, torch.nan)
        return torch.where(exact.isnan(), self._log_prob(guide_site) - self._log_prob(site), exact)

    def _log_prob(self, site: Any) -> Tensor:
        return self._flat(unscaled_log_prob(site)).sum(-1)

    def _first(self, value: Tensor) -> Tensor:
        return value.movedim(self.dim - (value.dim() - 1 - self.particles.nesting), 1)

    def _flat(self, value: Tensor, event_dim: int = 0) -> Tensor:
        value = self._first(self.particles.view(value, event_dim))
        value = value.expand(-1, self.size, *value.shape[2:])
        return value.reshape(self.particles.size, self.size, -1).double().cpu()


def _kl_by_dimension(guide_site: Any, model_site: Any) -> Tensor | None:
    """KL of every dimension by itself, or None where dimensions depend on each other."""
    q, p = (_univariate(site["fn"]) for site in (guide_site, model_site))
    masked = any(torch.is_tensor(site["mask"]) for site in (guide_site, model_site))
    if q is None or p is None or masked:
        return None
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        value = model_site["value"]
        return q.log_prob(value) - p.log_prob(value)


def _univariate(fn: Any) -> Any:
    """The distribution of one dimension, where all are independent of each other.

    A point mass is none: its density is that of the draw it was made from.
    """
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    unfit = fn.event_shape or isinstance(fn, dist.MaskedDistribution | dist.Delta)
    return None if unfit else fn
