"""The Gaussian that one of Pyro's guides has learned, for another guide to start from."""

import math
from typing import Any

import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from pyro_flowkit.guides.gaussian import Gaussian


@torch.no_grad()
def gaussian_of(guide: Any) -> tuple[dict[str, int], Gaussian]:
    """Sizes of the latents of a trained guide, ``{site: number of unconstrained values}``, and its Gaussian.

    The Gaussian's scale is triangular where the guide correlates latents, else a diagonal.

    Raises:
        ValueError: for another guide, or one that was never called.
    """
    if isinstance(guide, AutoNormal):
        _require_call(guide)
        pairs = {name: guide._get_loc_and_scale(name) for name in _latents(guide)}
        loc, scale = (
            torch.cat([pair[i].detach().reshape(-1) for pair in pairs.values()]) for i in (0, 1)
        )
        return {name: pair[0].numel() for name, pair in pairs.items()}, Gaussian(loc, scale)
    kinds = (AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal)
    if isinstance(guide, kinds):
        _require_call(guide)
        posterior: Any = guide.get_posterior()
        diagonal = isinstance(guide, AutoDiagonalNormal)
        scale = posterior.stddev if diagonal else posterior.scale_tril
        sizes = {name: math.prod(guide._unconstrained_shapes[name]) for name in _latents(guide)}
        return sizes, Gaussian(posterior.mean.detach().clone(), scale.detach().clone())
    raise ValueError(
        "Expected a trained AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal or AutoLowRankMultivariateNormal, "
        f"got {type(guide).__name__}."
    )


def _require_call(guide: AutoNormal | AutoContinuous) -> None:
    if guide.prototype_trace is None:
        raise ValueError(f"Expected a trained {type(guide).__name__}, got one never called.")


def _latents(guide: AutoNormal | AutoContinuous) -> list[str]:
    trace: Any = guide.prototype_trace
    return [name for name, _ in trace.iter_stochastic_nodes()]
