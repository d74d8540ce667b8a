"""Latents that a guide gives no density: what is a point is no draw, and has no importance weight.

For a guide whose latents are all points, ``log p(x, z)`` there is a density, which depends on the units of the
latents and may be above or below ``log p(x)``: it is no bound. With some latents at a point ``a`` and a density for
the others, the weights are those of ``log p(x, a)``, the joint density of data and point; ``a`` may be a function of
the others.

A Delta with a density gets it from auxiliary sites, as those of an ``AutoContinuous`` do. More numbers than these have
lie on a surface, which has none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import xarray as xr
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowkit.diagnostics.schema import EXACT, schema_attrs
from pyro_flowkit.diagnostics.verdict import Verdict, with_verdict
from pyro_flowkit.programs.sites import Site, is_auxiliary, is_point_mass, scored_sites

MOST_NUMBERS = 64
SAME = 0.01  # nats, for each number

_REMEDY = (
    "A normal around the point has one: AutoLaplaceApproximation(model), trained in the same way, and its "
    "laplace_approximation(); or train AutoNormal or AutoSplineFlow"
)


def checked_points(
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
    guide: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    is_known: bool,
) -> tuple[str, ...]:
    """The latents that a guide puts at a point, by name, after a look at its other Deltas.

    Args:
        model_trace: of a run with the guide's draws.
        guide_trace: of the guide.
        guide: the guide, which runs again; the random numbers of the caller are left alone.
        args, kwargs: of it.
        is_known: whether it is one of Pyro's or ours, which count their maps.

    Raises:
        ValueError: if Deltas have no density, or not the one that they say.
    """

    def run(given: poutine.Trace) -> poutine.Trace:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.rand(1)
            return poutine.trace(poutine.replay(guide, trace=given)).get_trace(*args, **kwargs)

    given = guide_trace.copy()
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and (is_auxiliary(site) or is_point_mass(site["fn"])):
            given.remove_node(name)
    again = run(given)
    points = point_estimates(model_trace, guide_trace, again)
    check_density(model_trace, guide_trace, again, points)
    if not is_known:
        check_log_density(model_trace, guide_trace, points, run)
    return points


def point_estimates(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, again: poutine.Trace
) -> tuple[str, ...]:
    """Continuous latents that a guide puts at one point, by name.

    Args:
        model_trace: of a run with the guide's draws.
        guide_trace: of the guide.
        again: another one, with other auxiliary sites and the same other latents. A Delta that follows from other
            latents is then where it was.
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
        values = [trace.nodes[name]["value"] for trace in (guide_trace, again)]
        try:  # freed of the support: the last share of a simplex is no number of its own
            value, other = (biject_to(site["fn"].support).inv(found) for found in values)
        except NotImplementedError:  # a support that only the guide knows a map to
            return
        moved += int((value != other).sum()) if value.shape == other.shape else value.numel()
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


def check_log_density(
    model_trace: poutine.Trace,
    guide_trace: poutine.Trace,
    points: Sequence[str],
    run: Callable[[poutine.Trace], poutine.Trace],
) -> None:
    """Raise a ValueError where Deltas say another log_density than the map from auxiliary sites to them has.

    Of as many numbers as the auxiliary sites have, at most 64: others are not looked at.

    Args:
        model_trace, guide_trace, points: as for :func:`check_density`.
        run: of the guide, with the values of a trace.
    """
    given = guide_trace.copy()
    leaves = []
    for name, site in guide_trace.nodes.items():
        if site["type"] == "sample" and is_point_mass(site["fn"]):
            given.remove_node(name)
        elif site["type"] == "sample" and is_auxiliary(site):
            leaves.append(site["value"].detach().clone())
            given.nodes[name] = {**site, "value": leaves[-1]}
    count = sum(leaf.numel() for leaf in leaves)
    if not 0 < count <= MOST_NUMBERS or not all(leaf.is_floating_point() for leaf in leaves):
        return
    with torch.enable_grad():
        for leaf in leaves:
            leaf.requires_grad_()
        trace = run(given)
        sites = {
            name: site
            for name, site in scored_sites(trace)
            if is_point_mass(site["fn"]) and name in model_trace.nodes and name not in points
        }
        outputs = [value for site in sites.values() for value in site["value"].flatten()]
        plain = all(site["mask"] is None and site["scale"] == 1.0 for site in sites.values())
        if len(outputs) != count or not plain or not all(out.requires_grad for out in outputs):
            return
        rows = [
            torch.autograd.grad(
                out, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for out in outputs
        ]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    right = -float(torch.linalg.slogdet(jacobian.double())[1])
    said = float(sum(site["fn"].log_prob(site["value"]).sum() for site in sites.values()))
    if not abs(said - right) <= SAME * count:
        raise ValueError(
            f"Expected log_density = {right:.4g} in all of the Delta sites {list(sites)}, minus the log-det of the map "
            f"from the auxiliary sites, got {said:.4g}: without it the guide's density is another one"
        )


def no_bound(names: tuple[str, ...]) -> ValueError:
    """The error for who asks for a bound."""
    return ValueError(
        f"Expected a guide with a density, got a point estimate (Delta) of all latents, {list(names)}: it has no "
        f"bound on the evidence. {_REMEDY}"
    )


def of_a_point(points: Sequence[str], log_joint: float) -> xr.Dataset:
    """What there is to say of a guide that is a point: the density there, and the verdict."""
    names = ", ".join(points)
    verdict = Verdict(
        "bad",
        f"the guide is a point estimate (Delta) of all latents, {names}, and no distribution: there is "
        "no bound on the evidence, and the draws are one point",
        f"{_REMEDY}.",
    )
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
