"""Which sites of a trace count, and as what: the one place where that is decided."""

from collections.abc import Iterator
from typing import Any

from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

Site = Any  # a node of a trace, or the message of a statement

PARTICLES = (
    "num_particles_vectorized"  # the name that Pyro's own ELBOs give to the plate of particles
)


def is_scored(site: Site) -> bool:
    """Whether a site has a density that counts: no deterministic value, and not the rows of a plate."""
    infer = site.get("infer") or {}
    return (
        site["type"] == "sample"
        and not infer.get("_deterministic")
        and not infer.get("_do_not_score")
        and not site_is_subsample(site)
    )


def is_deterministic(site: Site) -> bool:
    """Whether a site is a ``pyro.deterministic``."""
    return site["type"] == "sample" and bool((site.get("infer") or {}).get("_deterministic"))


def is_auxiliary(site: Site) -> bool:
    """Whether a site is a guide's own, with no latent of the model behind it."""
    return bool((site.get("infer") or {}).get("is_auxiliary"))


def scored_sites(trace: poutine.Trace) -> Iterator[tuple[str, Site]]:
    """Names and sites of a trace whose densities count."""
    for name, site in trace.nodes.items():
        if is_scored(site):
            yield name, site


def enumerated_names(trace: poutine.Trace) -> list[str]:
    """Sites that are to be enumerated."""
    return [name for name, site in scored_sites(trace) if (site["infer"] or {}).get("enumerate")]


def latent_names(trace: poutine.Trace) -> list[str]:
    """Latent sites of a model that a guide has to cover (not those to be enumerated)."""
    enumerated = set(enumerated_names(trace))
    return [
        name
        for name, site in scored_sites(trace)
        if not site["is_observed"] and name not in enumerated
    ]


def guided_names(trace: poutine.Trace) -> list[str]:
    """Latents that a guide covers."""
    return [
        name
        for name, site in scored_sites(trace)
        if not site["is_observed"] and not is_auxiliary(site)
    ]


def unscaled_log_prob(site: Site) -> Tensor:
    """The log density of a site with its mask, without the scale of a subsampled plate."""
    return scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])


def plates_of(site: Site) -> dict[int, Any]:
    """The vectorised plates of a site by their (negative) dimension, particles left out."""
    frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
    return {frame.dim: frame for frame in frames if frame.name != PARTICLES}


def nesting_of(*traces: poutine.Trace) -> int:
    """How many batch dimensions the plates of these programs take."""
    dims = [dim for trace in traces for _, site in scored_sites(trace) for dim in plates_of(site)]
    return -min(dims, default=0)


def subsampled_frame(site: Site) -> Any:
    """The first plate of a site that has only some of its rows, or None."""
    for frame in site["cond_indep_stack"]:
        if frame.full_size is not None and frame.full_size != frame.size:
            return frame
    return None


def refuse_subsampling(trace: poutine.Trace) -> None:
    """Raise a ValueError for a site in a plate that has only some of its rows."""
    for name, site in scored_sites(trace):
        frame = subsampled_frame(site)
        if frame is not None:
            raise ValueError(
                f"Expected all {frame.full_size} data in plate {frame.name!r} of site {name!r}, got a subsample of "
                f"{frame.size}: the weights of a minibatch say nothing about the evidence; pass the whole data."
            )


def innermost(fn: Any) -> Any:
    """The distribution inside of ``to_event``, ``mask``, transforms and the like."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution is a ``Delta``, whatever it is wrapped in."""
    return isinstance(innermost(fn), Delta)


def gives_points(guide_trace: poutine.Trace) -> bool:
    """Whether all that a guide has are values without a density (``AutoDelta``, or Delta by hand), at one point."""
    sites = [site for _, site in scored_sites(guide_trace) if not site["is_observed"]]
    return bool(sites) and all(is_point_mass(site["fn"]) for site in sites)
