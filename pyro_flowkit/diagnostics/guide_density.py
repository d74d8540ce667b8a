"""log q of a guide at values that it did not draw."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowkit.diagnostics.particles import Particles
from pyro_flowkit.guides.protocols import DensityGuide
from pyro_flowkit.programs.sites import PARTICLES, is_auxiliary, is_point_mass, scored_sites

_UNCONSTRAINED = "_unconstrained"


def log_guide(
    like: Particles,
    guide: Callable,
    latents: Mapping[str, Tensor],
    args: tuple,
    kwargs: dict[str, Any],
) -> Tensor:
    """log q in nats, shape ``(n,)``, float64; -inf outside of the guide's support.

    Args:
        like: particles of the model and this guide.
        guide: one that says its ``log_prob``, one of Pyro's guides with a Gaussian in unconstrained space, or any
            program that samples the latents themselves.
        latents: values of all latents, ``(n, *batch, *event)``.
        args: of the guide.
        kwargs: of the guide.

    Raises:
        ValueError: if the guide's density cannot be had at given values.
    """
    if isinstance(guide, DensityGuide):
        return guide.log_prob(latents, *args, **kwargs).double().cpu()
    size = len(next(iter(latents.values())))
    with pyro.validation_enabled(
        False
    ):  # values outside of the guide's support are what is asked for
        if like.program is None:
            rows = [{name: value[i] for name, value in latents.items()} for i in range(size)]
            traces = [_conditioned(like, guide, row, args, kwargs, 0) for row in rows]
            found = [_log_prob(like, trace, 1) for trace in traces]
            return torch.cat(found)
        wide = {n: like.program.padded(n, value, args, kwargs) for n, value in latents.items()}
        with pyro.plate(PARTICLES, size, dim=-like.nesting - 1):
            trace = _conditioned(like, guide, wide, args, kwargs, size)
        return _log_prob(like, trace, size)


def _conditioned(
    like: Particles,
    guide: Callable,
    latents: Mapping[str, Tensor],
    args: tuple,
    kwargs: dict[str, Any],
    size: int,
) -> poutine.Trace:
    """The trace of a guide that takes these values, with its log-probs."""
    given = _given(like, guide, latents, size)
    trace = poutine.trace(poutine.condition(guide, data=given)).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    for name, value in latents.items():
        got = trace.nodes[name]["value"] if name in trace.nodes else None
        taken = got is not None and torch.allclose(
            got.expand(value.shape).double(), value.double(), rtol=1e-3, atol=1e-5, equal_nan=True
        )
        if not taken or (name in given and is_point_mass(trace.nodes[name]["fn"])):
            raise ValueError(
                "Expected a guide whose density can be had at any values (an AutoSplineFlow, AutoNormal, an "
                f"AutoContinuous guide, or a program that samples the latents), got another way to {name!r}"
            )
    return trace


def _given(
    like: Particles, guide: Callable, latents: Mapping[str, Tensor], size: int
) -> dict[str, Tensor]:
    """Values of the guide's sites: latents, or what they are made from."""

    def unconstrained(name: str) -> Tensor:
        return biject_to(like.model_trace.nodes[name]["fn"].support).inv(latents[name])

    auxiliary = [name for name, site in scored_sites(like.guide_trace) if is_auxiliary(site)]
    given = dict(latents)
    for name in auxiliary:
        site = name.removesuffix(_UNCONSTRAINED)
        if site != name and site in latents:
            given[name] = unconstrained(site)
            del given[site]
        elif isinstance(guide, AutoContinuous) and len(auxiliary) == 1:
            order = [own for own, _ in guide.prototype_trace.iter_stochastic_nodes()]
            lead = (size,) if size else ()
            vector = torch.cat([unconstrained(own).reshape(*lead, -1) for own in order], -1)
            shape = (*lead, *((1,) * like.nesting if size else ()), vector.shape[-1])
            return {name: vector.reshape(shape)}
    return given


def _log_prob(like: Particles, trace: poutine.Trace, size: int) -> Tensor:
    """log q of each particle; -inf where a site has a value outside of its support."""
    drawn = dataclasses.replace(like, guide_trace=trace, size=size)
    total = drawn.log_guide()
    for _, site in scored_sites(trace):
        inside = site["fn"].support.check(site["value"])
        inside = drawn.view(inside.expand(site["log_prob"].shape).double())
        total = total.masked_fill(inside.reshape(size, -1).amin(-1).cpu() == 0, -torch.inf)
    return total.nan_to_num(nan=-torch.inf)
