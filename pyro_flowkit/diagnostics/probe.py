r"""Where the posterior has mass that a guide has not: what its own draws cannot see.

Short optimisations from draws of the prior and from over-dispersed draws of the guide, all at once by Adam,
lead to diagonal Gaussians g around modes of the model's density p(x, u) in unconstrained space; L-BFGS
refines one for each place (:mod:`pyro_flowkit.guides.gaussian`). With Z the evidence that the guide's own
draws see, the points

    U = {u: log q(u) < log p(x, u) - log Z - log 20}

are those where the guide hardly is. By Jensen's inequality the mass of U is at least

    log M = log P_g(U) + E_g[log p(x, u) - log g(u) | u in U],

whatever the g, less two standard errors; the share of the posterior that is missed is at least M / (M + Z). It
is 1/2 for one of two equal modes and for half of a support, and near 0 for a guide that covers the posterior.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from torch import Tensor

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.diagnostics.calibration import store_of_model
from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.guide_density import log_guide
from pyro_flowkit.diagnostics.particles import Particles, draw_particles
from pyro_flowkit.diagnostics.schema import DIAGNOSTIC, LOWER_BOUND, schema_attrs
from pyro_flowkit.guides.auto_spline_flow import AutoSplineFlow
from pyro_flowkit.guides.gaussian import Gaussian, improved
from pyro_flowkit.guides.latent_vector import LatentDensity, in_words, pack, unpack
from pyro_flowkit.ops.psis import psis
from pyro_flowkit.ops.quasi_random import normal_draws

FACTORS = (3.0, 10.0)
"""Standard deviations of the guide by which its over-dispersed draws spread."""

_RARE = math.log(20.0)
_ITERATIONS = 50
_STEPS = 150
_PAIRS = 4  # of draws in a step
_MIN_IN_REGION = 8


def probe_modes(
    model: Callable,
    guide: Callable,
    *,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_starts: int = 24,
    num_samples: int = 1000,
    max_seconds: float = 30.0,
    seed: int = 0,
) -> xr.Dataset:
    """Looks for modes, and parts of the support, that a guide leaves out.

    ::

        probe = probe_modes(model, guide, args=args)
        print(diagnose(from_svi(model, guide, args=args), probe=probe))

    Args:
        model: a Pyro model whose latents are all in the guide and have a support that real numbers can be mapped onto.
        guide: one that says its ``log_prob`` (``AutoSplineFlow``, ``AmortizedSplineFlow``), one of Pyro's guides with a
            Gaussian in unconstrained space, or any program that samples the latents themselves.
        args: positional arguments of both: all data.
        kwargs: keyword arguments of both.
        num_starts: number of optimisations: a third from draws of the prior (around the origin where it cannot be
            drawn from), the others from draws around the guide's mean with 3 and 10 times its standard deviations.
        num_samples: draws of the guide, for the evidence that it sees, and of each Gaussian.
        max_seconds: after which no other optimisation begins (wall clock); at least one is done.
        seed: of the starts and draws, without effect on the generator of the caller.

    Returns:
        A Dataset along ``place``, one for each place where searches ended: ``count`` (of these searches), ``elbo`` of
        the Gaussian in nats, a lower bound on the evidence, ``missed`` (the share of the posterior, at least, that is
        around there and where the guide hardly is) and ``where`` (values of the first latents, in words). The
        attribute ``num_starts`` is the number of searches. ``diagnose`` reads it.

    Raises:
        ValueError: as ``evidence_bounds``, for latents that real numbers cannot be mapped onto, and for a guide whose
            density cannot be had at given values.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import probe_modes
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> probe = probe_modes(model, guide, num_starts=2, seed=0)
        >>> probe = probe_modes(model, guide, num_starts=2, seed=0)
        >>> float(probe["missed"].sum()) < 0.1
        True
    """
    if num_starts < 1 or num_samples < 100:
        raise ValueError(
            f"Expected num_starts >= 1 and num_samples >= 100, got {num_starts} and {num_samples}"
        )
    kwargs = kwargs or {}
    deadline = Deadline(wall_seconds=max_seconds)
    with evaluation(model, guide, seed=seed):
        region = _Region(model, guide, args, kwargs, num_samples)
        starts = torch.stack([_start(region, model, i) for i in range(num_starts)])
        found = _searched(region.density, starts, region.spread)
        places: list[_Place] = []
        for gaussian in found:
            same = next((place for place in places if _is_near(gaussian, place.gaussian)), None)
            if same is None and not (places and deadline.is_over):
                gaussian = _refined(region.density, gaussian, deadline)
                same = next((place for place in places if _is_near(gaussian, place.gaussian)), None)
                if same is None:
                    same = _Place(gaussian, *region.missed(gaussian, num_samples))
                    places.append(same)
            if same is not None:
                same.count += 1
    return xr.Dataset(
        {
            "count": ("place", [place.count for place in places], {"kind": DIAGNOSTIC}),
            "elbo": (
                "place",
                [place.elbo for place in places],
                {"kind": LOWER_BOUND, "units": "nats"},
            ),
            "missed": ("place", [place.missed for place in places], {"kind": DIAGNOSTIC}),
            "where": ("place", np.asarray([place.where for place in places])),
        },
        {"place": np.arange(len(places))},
        schema_attrs(num_starts=num_starts),
    )


@dataclass
class _Place:
    """Where searches end: a Gaussian, its ELBO, what the guide misses, where in words, and how many searches."""

    gaussian: Gaussian
    elbo: float
    missed: float
    where: str
    count: int = 0


class _Region:
    """The guide's draws, the evidence that they see, and the points where it hardly is."""

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        num_samples: int,
    ) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs
        chunks = list(
            draw_particles(
                model,
                guide,
                args,
                kwargs,
                num_samples=num_samples,
                chunk_size=num_samples,
                whole_data=True,
            )
        )
        self.like: Particles = chunks[0]
        log_weights = torch.cat([chunk.log_weights() for chunk in chunks])
        smoothed, _ = psis(log_weights)
        self.log_evidence = float(smoothed.logsumexp(-1)) - math.log(num_samples)
        latents = {
            name: torch.cat([chunk.latents()[name] for chunk in chunks])
            for name in self.like.latents()
        }
        # a guide that is there for its unconstrained space, and leaves nothing in the param store
        frame = AutoSplineFlow(model, num_transforms=1, hidden_dims=(1,), affine="diagonal")
        with store_of_model(self.like.model_trace), torch.enable_grad():
            self.frame = frame.setup(*args, **kwargs)
        self.density = LatentDensity(model, self.frame, args, kwargs)
        draws = pack(self.frame, latents)[0]
        draws = draws[draws.isfinite().all(-1)]
        self.mean = draws.mean(0)
        self.spread = draws.std(0).nan_to_num(nan=1.0).clamp(min=1e-3)

    def missed(self, gaussian: Gaussian, num_samples: int) -> tuple[float, float, str]:
        """The Gaussian's ELBO, the share of the posterior around it that the guide misses at least, and where."""
        noise = normal_draws(num_samples // 2, gaussian.loc, seed=5)
        points = gaussian.transform(noise)
        log_p = self.density(points).double().cpu()
        values, ladj = unpack(self.frame, points)
        log_q = log_guide(self.like, self.guide, values, self.args, self.kwargs)
        log_q = log_q + ladj.double().cpu()
        log_g = (-0.5 * noise.double().square().sum(-1)).cpu() - 0.5 * noise.shape[-1] * math.log(
            2 * math.pi
        )
        weights = log_p - log_g + float(gaussian.scale.double().log().sum())
        elbo = float(weights.mean())
        outside = (log_q < log_p - self.log_evidence - _RARE) & log_p.isfinite()
        count = int(outside.sum())
        if count < _MIN_IN_REGION:
            return elbo, 0.0, in_words(self.frame, gaussian.loc)
        inside = weights[outside]
        log_mass = math.log(count / len(weights)) + float(
            inside.mean() - 2 * inside.std() / math.sqrt(count)
        )
        share = 1.0 / (1.0 + math.exp(min(self.log_evidence - log_mass, 700.0)))
        return elbo, share, in_words(self.frame, points[outside.to(points.device)].mean(0))


def _start(region: _Region, model: Callable, index: int) -> Tensor:
    """An unconstrained point; those of different origins in turn."""
    kind = index % (1 + len(FACTORS))
    noise = torch.randn_like(region.mean)
    if kind:
        return region.mean + FACTORS[kind - 1] * region.spread * noise
    names = list(region.like.latents())
    try:
        with poutine.block():
            trace = poutine.trace(model).get_trace(*region.args, **region.kwargs)
        drawn, _ = pack(region.frame, {name: trace.nodes[name]["value"] for name in names})
    except (NotImplementedError, RuntimeError, ValueError):  # an improper prior
        return noise
    return drawn if bool(drawn.isfinite().all()) else noise


def _searched(density: LatentDensity, starts: Tensor, unit: Tensor) -> list[Gaussian]:
    """Diagonal Gaussians of a large ELBO, from all starts at once; the largest ELBO first.

    Args:
        density: of points ``(n, D)``.
        starts: shape ``(K, D)``.
        unit: standard deviations of the guide, shape ``(D,)``: those of the Gaussians at first, and the size of the
            last steps.
    """
    loc, log_scale = starts.clone().requires_grad_(), unit.log().repeat(len(starts), 1)
    log_scale.requires_grad_()
    reach = 0.1 * torch.maximum(starts.std(0).nan_to_num(nan=0.0), unit)
    average = [torch.zeros_like(loc), torch.zeros_like(loc)]
    square = [torch.zeros_like(loc), torch.zeros_like(loc)]
    elbos = torch.full((len(starts),), -torch.inf)
    for step in range(_STEPS):
        half = torch.randn(_PAIRS, *loc.shape).to(loc)
        noise = torch.cat([half, -half])
        with torch.enable_grad():
            points = loc + log_scale.exp() * noise
            log_p = density(points.reshape(-1, loc.shape[-1])).reshape(len(noise), -1)
            elbo = log_p.mean(0) + log_scale.sum(-1)
            gradients = torch.autograd.grad(elbo.sum(), (loc, log_scale))
        elbos = elbo.detach()
        rates = (reach * (0.1 * unit / reach) ** (step / _STEPS), torch.full_like(unit, 0.1))
        for i, (parameter, gradient) in enumerate(zip((loc, log_scale), gradients, strict=True)):
            gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            average[i] = 0.8 * average[i] + 0.2 * gradient
            square[i] = 0.95 * square[i] + 0.05 * gradient.square()
            bias = (1 - 0.8 ** (step + 1)) / (1 - 0.95 ** (step + 1)) ** 0.5
            parameter.data += rates[i] * average[i] / bias / (square[i].sqrt() + 1e-12)
    order = elbos.nan_to_num(nan=-torch.inf).argsort(descending=True).tolist()
    return [Gaussian(loc[i].detach(), log_scale[i].detach().exp()) for i in order]


def _refined(density: LatentDensity, gaussian: Gaussian, deadline: Deadline) -> Gaussian:
    draws = normal_draws(max(8, min(len(gaussian.loc), 32)), gaussian.loc, seed=3)
    return improved(density, gaussian, draws, _ITERATIONS, deadline)


def _is_near(first: Gaussian, second: Gaussian) -> bool:
    return bool(((first.loc - second.loc).abs() < first.scale + second.scale).all())
