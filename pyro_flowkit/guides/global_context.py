"""What local latents are told of the draws of global ones: how far they are from the centre of the global guide.

With t the unconstrained global draws, m and s location and scale of the global guide, as they are at the time,

    context = (t - m) / max(s, 1).

- Raw draws would not do: with many data the posterior of a global latent is narrow, 1.30 +- 0.01 say, and a network
  that reads 1.30 learns nothing of the 0.01.
- Nor would whitened draws, (t - m) / s: where s is small the local latents depend little on t, and the noise of
  training moves a network that reads numbers of unit size further than that.
- No gradient passes through m and s. To move m is the same as to move the constants of the local guide, so that this
  changes nothing at the optimum; on the way there local latents move with t, as in the posterior, not with t - m.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous, AutoNormal
from torch import Tensor

from pyro_flowkit.guides.auto_spline_flow import AutoSplineFlow
from pyro_flowkit.guides.local_latents import Latents
from pyro_flowkit.guides.without_masked import all_values


def centred(guide: Any, latents: Latents, values: Mapping[str, Tensor]) -> Tensor:
    """Global draws as a context, shape ``(*batch, size)``.

    Args:
        guide: the global guide, after its setup. Guides that have no location and scale leave the unconstrained draws
            as they are.
        latents: the global latents.
        values: their values.
    """
    draws = latents.pack(values)
    with torch.no_grad():
        loc, scale = _loc_scale(guide, latents, draws)
    return (draws - loc) / scale.clamp(min=1.0)


def _loc_scale(guide: Any, latents: Latents, draws: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(guide, AutoSplineFlow):
        if guide.num_components > 1:
            loc, scale = guide._loc_scale()
        else:
            unit = torch.eye(guide.latent_dim, dtype=draws.dtype, device=draws.device)
            loc, _ = guide.affine.call_and_ladj(torch.zeros_like(unit[0]))
            columns, _ = guide.affine.call_and_ladj(unit)
            scale = (columns - loc).square().sum(0).sqrt()
        if guide.idle is not None:
            loc, scale = (
                all_values(guide, loc),
                guide.idle.all_of(scale, torch.ones_like(guide.idle.fixed)),
            )
        return loc, scale
    if isinstance(guide, AutoNormal):
        pairs = [guide._get_loc_and_scale(site.name) for site in latents.sites]
        loc, scale = (
            torch.cat([part.reshape(-1) for part in parts]) for parts in zip(*pairs, strict=True)
        )
        return loc, scale
    if isinstance(guide, AutoContinuous):
        try:
            return guide._loc_scale()
        except NotImplementedError:  # flows of Pyro's
            pass
    return torch.zeros_like(draws[..., :1]), torch.ones_like(draws[..., :1])
