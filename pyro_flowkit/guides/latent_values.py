"""The vector of all latents in unconstrained space, and their values: from one to the other, with log-dets."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from pyro_flowkit.guides.supports import bijection_to
from pyro_flowkit.guides.without_masked import all_values, ladj_of, vector_of


def unpack(
    guide: AutoContinuous, latent: Tensor, *, nesting: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Values of all latents of a guide, and the log-det of getting there.

    Args:
        guide: a guide after its setup.
        latent: unconstrained, shape ``(*sample_shape, D)``.
        nesting: number of batch dims that every value has between ``sample_shape`` and its event; None is each site's
            own.

    Returns:
        ``{site: value}`` of shape ``(*sample_shape, *batch, *event)``, and log|det dvalue/dlatent| in nats, shape
        ``(*sample_shape,)``.
    """
    sample_shape = latent.shape[:-1]
    values: dict[str, Tensor] = {}
    total = latent.new_zeros(sample_shape)
    latent = all_values(guide, latent)
    start = 0
    for name, site in _sites(guide).items():
        shape = tuple(guide._unconstrained_shapes[name])
        size = math.prod(shape)
        own = len(site["fn"].batch_shape)
        padding = (1,) * (0 if nesting is None else nesting - own)
        unconstrained = latent[..., start : start + size].reshape((*sample_shape, *padding, *shape))
        start += size
        transform = bijection_to(site["fn"].support)
        values[name] = transform(unconstrained)
        total = total + ladj_of(guide, name, unconstrained, values[name], len(sample_shape))
    return values, total


def pack(guide: AutoContinuous, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`unpack`.

    Args:
        guide: a guide after its setup.
        values: ``{site: value}`` for every latent, shapes ``(*sample_shape, *batch, *event)``.

    Returns:
        Unconstrained latents ``(*sample_shape, D)``, and log|det dvalue/dlatent| in nats, shape ``(*sample_shape,)``.

    Raises:
        ValueError: for a latent without a value, a value without a latent, or shapes that do not fit.
    """
    sites = _sites(guide)
    if set(values) != set(sites):
        raise ValueError(
            f"Expected a value for each of the latents {sorted(sites)}, got {sorted(values)}."
        )
    sample_shapes = {name: _sample_shape(site, values[name]) for name, site in sites.items()}
    sample_shape = torch.broadcast_shapes(*sample_shapes.values())
    parts, total = [], torch.zeros(())
    for name, site in sites.items():
        transform = bijection_to(site["fn"].support)
        unconstrained = transform.inv(values[name])
        ladj = ladj_of(guide, name, unconstrained, values[name], len(sample_shapes[name]))
        total = total.to(ladj) + ladj
        part = unconstrained.reshape((*sample_shapes[name], -1))
        parts.append(part.expand(*sample_shape, -1))
    return vector_of(guide, torch.cat(parts, dim=-1)), total.expand(sample_shape)


def _sites(guide: AutoContinuous) -> dict[str, Any]:
    return dict(guide.prototype_trace.iter_stochastic_nodes())


def _sample_shape(site: dict[str, Any], value: Tensor) -> tuple[int, ...]:
    shape = tuple(site["value"].shape)
    left = value.dim() - len(shape)
    if left < 0 or tuple(value.shape[left:]) != shape:
        raise ValueError(
            f"Expected a value of shape (*sample_shape, {', '.join(map(str, shape))}) for {site['name']!r}, got "
            f"{tuple(value.shape)}."
        )
    return tuple(value.shape[:left])


def in_words(guide: AutoContinuous, latent: Tensor) -> str:
    """The values of the first latents at a point ``(D,)`` of unconstrained space."""
    values, _ = unpack(guide, latent)
    return ", ".join(f"{name} = {_rounded(value)}" for name, value in list(values.items())[:4])


def _rounded(value: Tensor) -> str:
    numbers = [f"{number:.3g}" for number in value.flatten()[:4].tolist()]
    more = ", ..." if value.numel() > 4 else ""
    return numbers[0] if value.numel() == 1 else f"[{', '.join(numbers)}{more}]"
