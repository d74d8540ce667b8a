r"""Which latents of a VAE say something about the data, and which have collapsed onto the prior.

With the posterior q(z | x) of the guide, the prior p(z) and a mean over data x, for the directions of
all latents of a site together

    B = Cov_x E_q[z],   W = E_x Cov_q[z]
    variance explained   eigenvalues r of (B + W)^-1 B            active: > 0.01
    information          -1/2 log(1 - r)                           nats

and for one latent z_d, a coordinate, by itself

    mean variance        Var_x E_q[z_d]                            active: > 0.01 Var_p[z_d]
    variance explained   r = Var_x E_q[z_d] / (Var_x E_q[z_d] + E_x Var_q[z_d])
    information          -1/2 log(1 - r)                           nats
    KL                   E_x KL(q(z_d | x) || p(z_d))              nats

Collapse is judged by directions: a decoder may turn the latents, and then two directions that vary make
every coordinate vary (see ``directions``). Where the prior is that of the posteriors in the mean,
B + W is its covariance and both thresholds are that of Burda, Grosse and Salakhutdinov (2016), whose
prior has variance 1. The information is the mutual information of x and z where both are Gaussian,
otherwise an estimate of it.

Posteriors of any kind are known by draws. Means over draws are freed of their noise: a mean of S draws
varies by Var_q / S even where the posterior is the same for all data. What stays within three standard
errors of that noise is not called active.

A site of several, such as z1 of p(z2) p(z1 | z2), is seen as it is marginally, with the sites above it
drawn from the guide: its directions vary, too, where it merely follows those. The KL of the site,
E_q log q(z1 | z2, x) / p(z1 | z2), says what it adds; near zero it adds nothing.

The KL of a coordinate is there where posterior and prior have independent dimensions. Those of a flow or
of a full covariance have not: their KL belongs to the site.

Reference:
    Yuri Burda, Roger Grosse, Ruslan Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.collapse import collapse_verdict
from pyro_flowkit.diagnostics.directions import explained_by_direction, largest_of_noise
from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.latent_columns import LatentColumns
from pyro_flowkit.diagnostics.particles import Particles, draw_particles
from pyro_flowkit.diagnostics.pointwise import ROWS_AT_ONCE, batches, check_data, data_plate
from pyro_flowkit.diagnostics.schema import DIAGNOSTIC, ESTIMATE, schema_attrs
from pyro_flowkit.programs.sites import is_point_mass, scored_sites

ACTIVE = 0.01
"""Share of the variance that the means of an active latent or direction vary by, over data, at least.

Burda et al. (2016)."""

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
    """How much the latents say about the data: active directions, KL, posterior collapse.

    Args:
        model: a Pyro model with one plate over the data, such as a VAE.
        guide: its guide, inside of the same plate.
        data: a tensor whose first dimension is the datum, or a tuple of such tensors.
        args: further positional arguments of both.
        kwargs: keyword arguments of both.
        num_samples: draws per datum.
        batch_size: data per batch, 256 by default.
        plate: the name of the plate of the data, where another has the same size.
        vectorize: as in ``evidence_bounds``.
        seed: seed of the draws, without effect on the generator of the caller.

    Returns:
        A Dataset over ``direction``, named as ``z:0``, ``z:1``, ... by site, those of a site in falling
        order: ``direction_explained``, ``direction_information`` in nats and ``direction_active``. Over
        ``site``: ``active_directions``, ``num_directions`` and ``site_kl`` in nats (mean per datum,
        given the draws of other sites that it depends on; NaN where the guide has one density for
        several sites). Over ``latent``, the coordinates, named as
        ``z[0]``, ``z[1]``, ...: ``kl`` in nats (mean per datum; in closed form where there is one, NaN
        where the dimensions of posterior or prior depend on each other), ``mean_variance`` and
        ``prior_variance`` in squared units of the latent, ``variance_explained``, ``information`` in
        nats, ``active``. Over ``obs_id``: the KL of all latents, ``kl_total``. The attribute
        ``message`` is the verdict of ``diagnose``, ``active_threshold`` the share of the variance from
        which on a direction is active.

    Raises:
        ValueError: as ``pointwise_bounds``, for less than two data or draws, for so few of both that
            the covariance of draws is singular, and for a guide of point estimates alone
            (``Delta``), which has no KL.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import latent_usage
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8))
        >>> usage = latent_usage(model, guide, torch.randn(50), seed=0)
        >>> int(usage["active_directions"].sum()), int(usage["num_directions"].sum())
        (1, 1)
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
    within: dict[str, Tensor] = {}
    like: Particles | None = None
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
                like=like,
                ways=("plate",),  # the prior of a latent is drawn from, too
            ):
                # Settled by the first batch: a last batch of one row would fit any plate.
                plate, dim = data_plate(particles, len(rows[0]), plate)
                _check_random(particles)
                like = like or particles
                view = LatentColumns(particles, dim, len(rows[0]))
                for name, value in view.columns().items():
                    columns.setdefault(name, []).append(value)
            names = view.names()
            draws = {name: torch.cat(value) for name, value in columns.items()}
            _check_enough(num_data * (num_samples - 1), names)
            for site, covariance in _covariances(draws["posterior"], names).items():
                within[site] = within.get(site, 0.0) + covariance / num_data
            parts.append(_moments(draws))
    moments = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    usage = _dataset(moments, names, num_samples).merge(
        _by_direction(moments, within, names, num_samples)
    )
    return usage.assign_attrs(message=str(collapse_verdict(usage)))


def _check_random(particles: Particles) -> None:
    fns = [site["fn"] for _, site in scored_sites(particles.guide_trace)]
    if all(is_point_mass(fn) for fn in fns):
        raise ValueError(
            "Expected a guide with random latents, got point estimates (Delta) only: they have no KL"
        )


def _moments(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every datum, over draws."""
    posterior, prior = columns["posterior"], columns["prior"]
    return {
        "mean": posterior.mean(0),
        "variance": posterior.var(0),
        "prior_mean": prior.mean(0),
        "prior_square": prior.square().mean(0),
        "kl": columns["kl"].mean(0),
        "site_kl": columns["site_kl"].mean(0),
        "kl_total": columns["kl_total"].mean(0).squeeze(-1),
    }


def _covariances(posterior: Tensor, names: dict[str, list[str]]) -> dict[str, Tensor]:
    """Sums over data of the covariance of the draws of every site, from ``(draws, data, latents)``."""
    centered = (posterior - posterior.mean(0)).flatten(0, 1)
    parts = centered.split([len(own) for own in names.values()], -1)
    degrees = len(posterior) - 1
    return {site: part.T @ part / degrees for site, part in zip(names, parts, strict=True)}


def _check_enough(degrees: int, names: dict[str, list[str]]) -> None:
    for site, own in names.items():
        if degrees < len(own):
            raise ValueError(
                f"Expected data x (draws - 1) >= {len(own)}, the latents of site '{site}', so that their "
                f"covariance is known, got {degrees}"
            )


def _by_direction(
    moments: dict[str, Tensor],
    within: dict[str, Tensor],
    names: dict[str, list[str]],
    num_samples: int,
) -> xr.Dataset:
    """The variables over directions and sites."""
    counts = [len(own) for own in names.values()]
    means, variances = (moments[name].split(counts, -1) for name in ("mean", "variance"))
    explained, active = [], []
    for site, mean, variance in zip(names, means, variances, strict=True):
        explained.append(explained_by_direction(mean, within[site], num_samples))
        noise = largest_of_noise(variance, num_samples)
        active.append(explained[-1] > max(ACTIVE, noise))
    shares = torch.cat(explained)
    sizes = np.asarray(counts)
    by_direction = {
        "direction_explained": (shares, ESTIMATE, "1"),
        "direction_information": (-0.5 * (-shares).log1p(), ESTIMATE, "nats"),
        "direction_active": (torch.cat(active), DIAGNOSTIC, "1"),
    }
    by_site = {
        "active_directions": (torch.stack([own.sum() for own in active]), DIAGNOSTIC, "1"),
        "num_directions": (torch.as_tensor(sizes), DIAGNOSTIC, "1"),
        "site_kl": (moments["site_kl"].mean(0), ESTIMATE, "nats"),
    }
    variables = {
        name: (dim, value.numpy(), {"kind": kind, "units": units})
        for dim, group in (("direction", by_direction), ("site", by_site))
        for name, (value, kind, units) in group.items()
    }
    directions = [f"{site}:{i}" for site, own in names.items() for i in range(len(own))]
    coords = {
        "direction": np.asarray(directions),
        "direction_site": ("direction", np.repeat(list(names), sizes)),
        "site": np.asarray(list(names)),
    }
    return xr.Dataset(variables, coords)


def _dataset(
    moments: dict[str, Tensor], names: dict[str, list[str]], num_samples: int
) -> xr.Dataset:
    """The variables over latents and data."""
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
    return xr.Dataset(
        variables,
        {"latent": np.asarray(sum(names.values(), [])), "obs_id": np.arange(len(total))},
        schema_attrs(num_samples=num_samples, active_threshold=ACTIVE),
    )
