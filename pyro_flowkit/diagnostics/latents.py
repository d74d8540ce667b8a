r"""Which latents of a VAE say something about the data, and which have collapsed onto the prior.

With the posterior q(z | x) of the guide, the prior p(z) and a mean over data x, for one latent z_d,

    mean variance        Var_x E_q[z_d]                            active: > 0.01 Var_p[z_d]
    variance explained   r = Var_x E_q[z_d] / (Var_x E_q[z_d] + E_x Var_q[z_d])
    information          -1/2 log(1 - r)                           nats
    KL                   E_x KL(q(z_d | x) || p(z_d))              nats

The first is the measure of Burda, Grosse and Salakhutdinov (2016), whose prior has variance 1. The
information is the mutual information of x and z_d where both are Gaussian, otherwise an estimate of
it. The KL is a sum over latents where posterior and prior have independent dimensions. Those of a
flow or of a full covariance have not: their KL belongs to all together, and only the other measures,
which look at one latent at a time, are there for each. Means over draws are freed of their noise: a
mean of S draws varies by Var_q / S even where the posterior is the same for all data. What stays within
three standard errors of that noise is not called active.

Reference:
    Yuri Burda, Roger Grosse, Ruslan Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_flowkit.diagnostics.naming import latent_sites
from pyro_flowkit.diagnostics.particles import (
    Particles,
    draw_particles,
    evaluation,
    is_point_mass,
    sample_sites,
    unscaled_log_prob,
)
from pyro_flowkit.diagnostics.pointwise import ROWS_AT_ONCE, batches, check_data, data_plate
from pyro_flowkit.diagnostics.schema import DIAGNOSTIC, ESTIMATE, schema_attrs
from pyro_flowkit.diagnostics.verdict import Verdict

ACTIVE = 0.01
"""Burda et al. (2016): a latent is active if its mean varies by more than this, over data."""

_NAMED = 8  # latents that a verdict names one by one
_NO_KL = 0.1  # nats
_CLEAR = 3.0  # standard errors


def latent_usage(
    model: Callable,
    guide: Callable,
    data: Tensor | tuple[Tensor, ...],
    *,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 100,
    batch_size: int | None = None,
    plate: str | None = None,
    vectorize: bool | None = None,
    seed: int | None = None,
) -> xr.Dataset:
    """How much every latent says about the data: KL, active units, posterior collapse.

    Args:
        model: a Pyro model with one plate over the data, such as a VAE.
        guide: its guide, inside of the same plate.
        data: a tensor whose first dimension is the datum, or a tuple of such tensors.
        args: further positional arguments of both.
        kwargs: keyword arguments of both.
        num_samples: draws per datum.
        batch_size: data per batch, 256 by default.
        plate: the name of the plate of the data, where another has the same size.
        vectorize: as in `evidence_bounds`.
        seed: seed of the draws, without effect on the generator of the caller.

    Returns:
        A Dataset over ``latent``, named as ``z[0]``, ``z[1]``, ... by site: ``kl`` in nats (mean
        per datum; in closed form where there is one, NaN where the dimensions of posterior or prior
        depend on each other), ``mean_variance`` and ``prior_variance`` in squared units of the
        latent, ``variance_explained``, ``information`` in nats, ``active``; and over ``obs_id`` the
        KL of all latents, ``kl_total``. The attribute ``message`` is the `latent_verdict`.

    Raises:
        ValueError: as `pointwise_bounds`, for less than two data or draws, and for a guide of point
            estimates alone (``Delta``), which has no KL.
    """
    tensors = check_data(data)
    num_data = len(tensors[0])
    if num_data < 2 or num_samples < 2:
        raise ValueError(
            "Expected at least 2 data and 2 draws, between which something can vary, got "
            f"{num_data} and {num_samples}"
        )
    batch_size = min(batch_size or 256, num_data)
    parts: list[dict[str, Tensor]] = []
    with evaluation(model, guide, seed=seed):
        for rows in batches(tensors, batch_size):
            columns: dict[str, list[Tensor]] = {}
            for particles in draw_particles(
                model,
                guide,
                (*rows, *args),
                kwargs or {},
                num_samples=num_samples,
                chunk_size=max(1, ROWS_AT_ONCE // batch_size),
                whole_data=False,
                vectorize=vectorize,
            ):
                # Settled by the first batch: a last batch of one row would fit any plate.
                plate, dim = data_plate(particles, len(rows[0]), plate)
                _check_random(particles)
                vectorize = particles.stacked
                view = _View(particles, dim, len(rows[0]))
                for name, value in view.columns().items():
                    columns.setdefault(name, []).append(value)
            names = view.names()
            parts.append(_moments({name: torch.cat(value) for name, value in columns.items()}))
    return _dataset(
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, names, num_samples
    )


def latent_verdict(usage: xr.Dataset) -> Verdict:
    """Names posterior collapse in words.

    Args:
        usage: the result of `latent_usage`.

    Returns:
        "good" where every latent is active, "bad" where none is, otherwise "usable".

    Raises:
        ValueError: if the Dataset has no ``active``.
    """
    if "active" not in usage:
        raise ValueError(f"Expected a variable active, got {sorted(map(str, usage.data_vars))}")
    active = usage["active"].to_numpy().astype(bool)
    count, collapsed = len(active), usage["latent"].to_numpy()[~active]
    total = f"the KL of all latents is {float(usage['kl_total'].mean()):.2f} nats per datum"
    if not len(collapsed):
        return Verdict(
            "good",
            f"no posterior collapse: the posterior means of all {count} latents vary with the data "
            f"({total})",
            "Nothing to do.",
        )
    named = ", ".join(collapsed[:_NAMED]) + (", ..." if len(collapsed) > _NAMED else "")
    idle = int((usage["kl"].to_numpy()[~active] > _NO_KL).sum())
    unused = f", although the KL of {idle} of these is above {_NO_KL} nats" if idle else ""
    reason = (
        f"posterior collapse of {len(collapsed)} of {count} latents ({named}): their posterior mean "
        f"is the same for all data{unused} ({total})"
    )
    if len(collapsed) == count:
        return Verdict(
            "bad",
            reason,
            "The decoder does without the latents: raise the weight of the KL slowly while training, "
            "give the decoder less to work with, or train longer.",
        )
    return Verdict(
        "usable",
        reason,
        f"The number of latents in use is {count - len(collapsed)}: that many suffice, or raise the "
        "weight of the KL slowly while training, so that more are found.",
    )


class _View:
    """The latents of some particles, as columns of shape ``(particles, data, latents)``."""

    def __init__(self, particles: Particles, dim: int, size: int):
        self.particles, self.dim, self.size = particles, dim, size
        self.sites = dict(latent_sites(particles))

    def names(self) -> list[str]:
        """Of the latents, in the order of the columns."""
        names = []
        for name, site in self.sites.items():
            value = self.particles.view(site["value"], site["fn"].event_dim)
            shape = [size for size in self._first(value).shape[2:] if size > 1]
            indices = [",".join(map(str, index)) for index in np.ndindex(*shape)]
            names += [f"{name}[{index}]" if index else name for index in indices]
        return names

    def columns(self) -> dict[str, Tensor]:
        """Draws of posterior and prior, KL of every latent, and of all together, ``(.., 1)``."""
        found: dict[str, list[Tensor]] = {"posterior": [], "prior": [], "kl": []}
        for name, site in self.sites.items():
            event_dim = site["fn"].event_dim
            value = self._flat(site["value"], event_dim)
            found["posterior"].append(value)
            found["prior"].append(self._flat(site["fn"].sample(), event_dim))
            kl = _kl_by_dimension(self.particles.guide_trace.nodes[name], site)
            found["kl"].append(
                torch.full_like(value, torch.nan) if kl is None else self._flat(kl, event_dim)
            )
        columns = {name: torch.cat(values, -1) for name, values in found.items()}
        total = sum(sign * self._flat(unscaled_log_prob(s)).sum(-1) for s, sign in self._all())
        exact = columns["kl"].sum(-1)
        columns["kl_total"] = torch.where(exact.isnan(), total, exact).unsqueeze(-1)
        return columns

    def _all(self) -> Iterator[tuple[Any, int]]:
        for _, site in sample_sites(self.particles.guide_trace):
            yield site, 1
        for site in self.sites.values():
            yield site, -1

    def _first(self, value: Tensor) -> Tensor:
        return value.movedim(self.dim - (value.dim() - 1 - self.particles.nesting), 1)

    def _flat(self, value: Tensor, event_dim: int = 0) -> Tensor:
        value = self._first(self.particles.view(value, event_dim))
        value = value.expand(-1, self.size, *value.shape[2:])
        return value.reshape(self.particles.size, self.size, -1).double().cpu()


def _check_random(particles: Particles) -> None:
    fns = [site["fn"] for _, site in sample_sites(particles.guide_trace)]
    if all(is_point_mass(fn) for fn in fns):
        raise ValueError(
            "Expected a guide with random latents, got point estimates (Delta) only: they have no KL"
        )


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


def _moments(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every datum, over draws."""
    posterior, prior = columns["posterior"], columns["prior"]
    return {
        "mean": posterior.mean(0),
        "variance": posterior.var(0),
        "prior_mean": prior.mean(0),
        "prior_square": prior.square().mean(0),
        "kl": columns["kl"].mean(0),
        "kl_total": columns["kl_total"].mean(0).squeeze(-1),
    }


def _dataset(moments: dict[str, Tensor], names: list[str], num_samples: int) -> xr.Dataset:
    inside = moments["variance"].mean(0)
    between = (moments["mean"].var(0) - inside / num_samples).clamp(min=0.0)
    noise = inside / num_samples * math.sqrt(2.0 / (len(moments["mean"]) - 1))
    prior_variance = moments["prior_square"].mean(0) - moments["prior_mean"].mean(0).square()
    explained = (between / (between + inside)).nan_to_num(0.0)  # 0 / 0: the same for all data
    active = between > torch.maximum(ACTIVE * prior_variance, _CLEAR * noise)
    values = {
        "kl": (moments["kl"].mean(0), ESTIMATE, "nats"),
        "mean_variance": (between, ESTIMATE, "squared units of the latent"),
        "prior_variance": (prior_variance, ESTIMATE, "squared units of the latent"),
        "variance_explained": (explained, ESTIMATE, "1"),
        "information": (-0.5 * (-explained).log1p(), ESTIMATE, "nats"),
        "active": (active, DIAGNOSTIC, "1"),
    }
    variables = {
        name: ("latent", value.numpy(), {"kind": kind, "units": units})
        for name, (value, kind, units) in values.items()
    }
    total = moments["kl_total"].numpy()
    variables["kl_total"] = ("obs_id", total, {"kind": ESTIMATE, "units": "nats"})
    usage = xr.Dataset(
        variables,
        {"latent": np.asarray(names), "obs_id": np.arange(len(total))},
        schema_attrs(num_samples=num_samples),
    )
    return usage.assign_attrs(message=str(latent_verdict(usage)))
