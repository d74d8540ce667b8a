r"""The density that a guide has to follow: a model's log joint as a function of the guide's unconstrained latents.

With u the vector of all latents in unconstrained space and z(u) their values,

    log p(x, u) = log p(x, z(u)) + log |det dz/du|
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flowkit.guides.latent_values import unpack
from pyro_flowkit.guides.masked import is_unscored

_PARTICLES = "latent_density_particles"


class LatentDensity:
    """log p(x, u) of a guide's model, differentiable, for many u at a time.

    They pass through the model under one more plate to the left of its own. A model that mixes particles there
    (``z.mean()``, ``float(z)``) would give wrong numbers without any error, so two of them are run by themselves, too;
    where they disagree, and where the model fails under the plate, they always are.

    Args:
        model: a Pyro model.
        guide: a guide for all of its latents, after its setup.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.

    Raises:
        ValueError: at the first call, if the model has latents that the guide does not know.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoContinuous,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ):
        self._model, self._guide = model, guide
        self._args, self._kwargs = tuple(args), dict(kwargs or {})
        self._nesting = 0
        self.is_vectorized = self._agrees()

    def __call__(self, latent: Tensor) -> Tensor:
        """log p(x, u) in nats for ``u`` of shape ``(n, D)``, shape ``(n,)``."""
        if self.is_vectorized:
            try:
                return self._together(latent)
            except torch.linalg.LinAlgError:  # of one particle; the others have a density
                pass
        return torch.stack([self._alone(row) for row in latent.unbind(0)])

    def _together(self, latent: Tensor) -> Tensor:
        size = latent.shape[0]
        values, total = unpack(self._guide, latent, nesting=self._nesting)
        with poutine.block(), pyro.plate(_PARTICLES, size, dim=-1 - self._nesting):
            trace = self._trace(values)
        for site in _observed(trace):
            log_prob = site["log_prob"]
            if log_prob.dim() <= self._nesting or log_prob.shape[-1 - self._nesting] != size:
                raise ValueError(f"Expected {size} particles at site {site['name']!r}.")
            total = total + log_prob.reshape(size, -1).sum(-1)
        return total

    def _alone(self, latent: Tensor) -> Tensor:
        values, total = unpack(self._guide, latent)
        try:
            sites = list(_observed(self._trace(values)))
        except torch.linalg.LinAlgError:  # a matrix singular in this dtype, far out
            return total * math.nan
        for site in sites:
            total = total + site["log_prob"].sum()
        return total

    def _trace(self, values: dict[str, Tensor]) -> poutine.Trace:
        # far out, a scale may under- or overflow: that is a density that is no number, not an error
        with poutine.block(), pyro.validation_enabled(False):
            model = poutine.condition(self._model, data=values)
            trace = poutine.trace(model).get_trace(*self._args, **self._kwargs)
            trace.compute_log_prob()
        return trace

    @torch.no_grad()
    def _agrees(self) -> bool:
        with torch.random.fork_rng(devices=[]):
            try:
                loc = self._guide._init_loc()
                latent = loc + 0.1 * torch.randn(2, *loc.shape, dtype=loc.dtype).to(loc.device)
                self._nesting = self._count_plates(latent[0])
                together = self._together(latent)
                alone = torch.stack([self._alone(row) for row in latent])
            except Exception:  # whatever a model not written for an outer plate may raise
                return False
        digits = math.sqrt(torch.finfo(together.dtype).eps)
        return torch.allclose(together, alone, rtol=digits, atol=digits, equal_nan=True)

    def _count_plates(self, latent: Tensor) -> int:
        """How many batch dimensions the model's plates take."""
        sites = _observed(self._trace(unpack(self._guide, latent)[0]))
        dims = [f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized]
        return -min(dims, default=0)


def _observed(trace: poutine.Trace) -> Iterator[dict[str, Any]]:
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not is_unscored(site):
            if not site["is_observed"]:
                raise ValueError(
                    f"Expected a guide for every latent of the model, got none for {name!r}."
                )
            yield site
