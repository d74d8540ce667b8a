"""Latents that a guide gives no density: what is a point is no draw, and has no importance weight.

For a guide whose latents are all points, ``log p(x, z)`` there is a density, which depends on the units of the
latents and may be above or below ``log p(x)``: it is no bound. With some latents at a point ``a`` and a density for
the others, the weights are those of ``log p(x, a)``, the joint density of data and point; ``a`` may be a function of
the others.

A Delta with a density gets it from auxiliary sites, as those of an ``AutoContinuous`` do. More numbers than these have
lie on a surface, which has none.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import xarray as xr
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowkit.diagnostics.schema import EXACT, schema_attrs
from pyro_flowkit.diagnostics.verdict import Verdict, with_verdict
from pyro_flowkit.programs.sites import Site, is_auxiliary, is_point_mass, scored_sites

if TYPE_CHECKING:
    from pyro_flowkit.diagnostics.particles import Particles

_REMEDY = (
    "A normal around the point has one: AutoLaplaceApproximation(model), trained in the same way, and its "
    "laplace_approximation(); or train AutoNormal or AutoSplineFlow"
)


def point_estimates(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, again: poutine.Trace
) -> tuple[str, ...]:
    """Continuous latents that a guide puts at one point, by name.

    Args:
        model_trace: of a run with the guide's draws.
        guide_trace: of the guide.
        again: another one, with other auxiliary sites and the same other latents.
    """
    return tuple(
        name
        for name, site in scored_sites(model_trace)
        if not site["is_observed"]
        and not is_point_mass(site["fn"])
        and not site["fn"].support.is_discrete
        and is_point_mass(guide_trace.nodes[name]["fn"])
        and _is_fixed(site, guide_trace.nodes[name]["value"], again.nodes[name]["value"])
    )


def _is_fixed(site: Site, value: Tensor, other: Tensor) -> bool:
    """Whether two runs of a guide agree wherever the model looks."""
    if value.shape != other.shape:
        return False
    same = value == other
    event_dim = site["fn"].event_dim
    if event_dim:
        same = same.flatten(-event_dim).all(-1)
    mask = site["mask"]
    if mask is None or mask is True:
        return bool(same.all())
    looked_at = torch.as_tensor(mask, device=same.device).expand(same.shape)
    return bool(looked_at.any()) and bool(same[looked_at].all())


def check_density(
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
    again: poutine.Trace,
    points: Sequence[str],
) -> None:
    """Raise a ValueError unless the Deltas that move have as many auxiliary numbers behind them.

    Args:
        model_trace, guide_trace, again: as for :func:`point_estimates`.
        points: what that gave.
    """
    moved, names = 0, []
    for name, site in scored_sites(model_trace):
        if site["is_observed"] or name in points or site["fn"].support.is_discrete:
            continue
        if not is_point_mass(guide_trace.nodes[name]["fn"]) or is_point_mass(site["fn"]):
            continue
        value, other = guide_trace.nodes[name]["value"], again.nodes[name]["value"]
        try:
            free = biject_to(site["fn"].support).inverse_shape(value.shape).numel()
        except NotImplementedError:  # a support that only the guide knows a map to
            return
        changed = (value != other).sum() if value.shape == other.shape else value.numel()
        moved += min(free, int(changed))
        names.append(name)
    behind = sum(
        site["value"].numel()
        for _, site in scored_sites(guide_trace)
        if is_auxiliary(site)
        and not is_point_mass(site["fn"])
        and not site["fn"].support.is_discrete
    )
    if moved > behind:
        raise ValueError(
            f"Expected a guide with a density, got {moved} numbers in Delta sites, {names}, that follow from "
            f"{behind} of auxiliary sites: they have none. Draw each from a distribution, or from as many auxiliary "
            "numbers (infer={'is_auxiliary': True}), with the map's log_density in the Delta"
        )


def no_bound(names: tuple[str, ...]) -> ValueError:
    """The error for who asks for a bound."""
    return ValueError(
        f"Expected a guide with a density, got a point estimate (Delta) of all latents, {list(names)}: it has no "
        f"bound on the evidence. {_REMEDY}"
    )


def of_a_point(particles: "Particles") -> xr.Dataset:
    """What there is to say of a guide that is a point: the density there, and the verdict."""
    names = ", ".join(particles.points)
    verdict = Verdict(
        "bad",
        f"the guide is a point estimate (Delta) of all latents, {names}, and no distribution: there is "
        "no bound on the evidence, and the draws are one point",
        f"{_REMEDY}.",
    )
    log_joint = float(particles.log_joint()[0])
    dataset = xr.Dataset(
        {"log_joint": ((), log_joint, {"kind": EXACT, "units": "nats"})},
        attrs=schema_attrs(point_estimates=names),
    )
    return with_verdict(dataset, verdict)


def with_points(verdict: Verdict, names: str) -> Verdict:
    """A verdict on the latents that have a density, beside those at a point."""
    return Verdict(
        "usable" if verdict else verdict.level,
        f"{names} is at a point estimate (Delta), and the numbers are those of the joint density of the data and "
        f"that point, no bound on the evidence; for the other latents, given it, {verdict.reason}",
        f"{verdict.advice} The draws leave out how uncertain {names} is: give it a density "
        "(AutoLaplaceApproximation, AutoNormal, AutoSplineFlow) where that counts.",
        verdict.limits,
    )
