"""A model and its guide at many draws at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_flowkit.programs.agreement import disagreement
from pyro_flowkit.programs.runs import Program, Values, in_plate, own_values
from pyro_flowkit.programs.sites import (
    guided_names,
    is_point_mass,
    is_scored,
    latent_names,
    nesting_of,
    scored_sites,
)
from pyro_flowkit.programs.vectorized import WAYS, Vectorized, Way


class NotVectorizable(Exception):
    """A pair that cannot be run for many draws at a time; the message is a clause that says why."""


def set_up(guide: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Have an autoguide that was never called build its parameters; whether it did."""
    if not isinstance(guide, AutoGuide) or guide.prototype_trace is not None:
        return False
    getattr(guide, "setup", guide)(*args, **kwargs)
    return True


def trace_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict
) -> tuple[poutine.Trace, poutine.Trace]:
    """Runs the guide, then the model against it, without gradients; returns traces of model and guide."""
    with torch.no_grad(), poutine.block(hide_types=["sample"]):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(
            *args, **kwargs
        )
    return model_trace, guide_trace


def vectorized(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    with_deterministic: bool = False,
    ways: Sequence[Way] = WAYS,
    num_varying: int = 0,
) -> Vectorized:
    """The model at many draws of the guide.

    Args:
        model: a Pyro model.
        guide: its guide, with a site for every latent of the model; run in a plate of draws.
        args: of both.
        kwargs: of both.
        with_deterministic: whether the values of deterministic sites are wanted, too.
        ways: those to try, the last of them "rows" where one draw after the other is a way as well.
        num_varying: how many of the first arguments are other tensors from call to call.

    Raises:
        ValueError: where Pyro validates, for data outside of the support of their distribution.
        NotVectorizable: if the guide fails in a plate, or has other densities there, or none of the ways gives those
            of the model.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
        # Recordings take data as they are, so a value outside of its support is said here, where Pyro validates.
        model_trace.compute_log_prob(lambda name, site: is_scored(site) and site["is_observed"])
        nesting = nesting_of(model_trace, guide_trace)
        latents = latent_names(model_trace)
        if not set(latents) <= set(guided_names(guide_trace)):
            raise NotVectorizable("the guide has no site for some latents")
        try:
            draws = poutine.trace(in_plate(guide, 2, nesting)).get_trace(*args, **kwargs)
            draws.compute_log_prob()
            reason = _guide_difference(guide, guide_trace, draws, nesting, args, kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a guide may raise that is not written for a plate
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if reason is not None:
            raise NotVectorizable(f"the guide is not written for a plate of draws: {reason}")
        batch_dims = {name: len(model_trace.nodes[name]["fn"].batch_shape) for name in latents}
        values = {
            name: own_values(draws.nodes[name]["value"], model_trace.nodes[name]["fn"], 2, nesting)
            for name in latents
        }
    program = Vectorized(
        model,
        lambda program, args, kwargs: trace_pair(program, guide, args, kwargs)[0],
        batch_dims,
        nesting,
        with_deterministic=with_deterministic,
        num_varying=num_varying,
    )
    if program.settle(values, args, kwargs, ways) not in ways:
        raise NotVectorizable(program.complaint())
    return program


def _guide_difference(
    guide: Program,
    alone: poutine.Trace,
    draws: poutine.Trace,
    nesting: int,
    args: tuple,
    kwargs: dict[str, Any],
) -> str | None:
    """Where the guide has another density for a draw beside another one, as a clause."""
    for row in (0, 1):
        latents: Values = {}
        got: Values = {}
        for name, site in scored_sites(alone):
            if name not in draws.nodes:
                return f"site {name!r} is missing"
            wide = draws.nodes[name]
            log_prob = wide["log_prob"]
            if log_prob.dim() < nesting + 1 or log_prob.shape[-1 - nesting] != 2:
                return f"site {name!r} has one density for all draws"
            got[name] = log_prob.select(log_prob.dim() - 1 - nesting, row).reshape(
                site["fn"].batch_shape
            )
            # a point mass follows from the other sites: given, a last digit would cost all of its density
            if not site["is_observed"] and not is_point_mass(site["fn"]):
                latents[name] = own_values(wide["value"], site["fn"], 2, nesting)[row]

        def density(values: Values) -> dict[str, Tensor]:
            given = alone.copy()
            for name, _ in list(scored_sites(alone)):
                if name in values:
                    given.nodes[name] = {**given.nodes[name], "value": values[name]}
                else:
                    given.remove_node(name)
            trace = poutine.trace(poutine.replay(guide, trace=given)).get_trace(*args, **kwargs)
            trace.compute_log_prob()
            return {name: site["log_prob"] for name, site in scored_sites(trace)}

        reason = disagreement(density(latents), got, density, latents)
        if reason is not None:
            return reason
    return None
