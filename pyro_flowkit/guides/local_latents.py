"""How latents make a vector: the local ones of a datum, and the global ones.

A latent is local if it lies inside the data's plate, and global otherwise. The values of a datum, in unconstrained
space and over whatever further plates they lie in, are one vector; a batch of them has the shape that the plates of the
guide and the particles give it.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from pyro.distributions.util import detach
from torch import Tensor
from torch.distributions import constraints

from pyro_flowkit.guides.supports import bijection_of, bijection_to
from pyro_flowkit.ops.shapes import broadcast_shapes


@dataclass(frozen=True)
class Site:
    """A latent as the prototype has it.

    Attributes:
        support: of its values.
        batch_shape: with 1 in the place of the data's plate, if it is local.
        event_dim: of its values.
        unconstrained_event_shape: of their unconstrained counterparts.
        plates: names of the plates around it.
    """

    name: str
    support: constraints.Constraint
    batch_shape: tuple[int, ...]
    event_dim: int
    unconstrained_event_shape: tuple[int, ...]
    plates: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of unconstrained values, of one datum if the site is local."""
        return math.prod(self.batch_shape) * math.prod(self.unconstrained_event_shape)

    @property
    def unconstrained_event_dim(self) -> int:
        return len(self.unconstrained_event_shape)


class Latents:
    """Latents of a model, laid out in one vector.

    Args:
        nodes: sample sites of a prototype.
        dim: of the data's plate for local latents, None for global ones.
    """

    def __init__(self, nodes: list[dict[str, Any]], dim: int | None = None):
        self.dim = dim
        self.sites = [_site(node, dim) for node in nodes]
        self.size = sum(site.size for site in self.sites)

    @property
    def names(self) -> list[str]:
        """Names of the latents, sorted."""
        return sorted(site.name for site in self.sites)

    def unpack(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Sites and their unconstrained values, of local latents of shape ``(*batch, size)``."""
        batch_shape = latent.shape[:-1]
        start = 0
        for site in self.sites:
            values = latent[..., start : start + site.size]
            start += site.size
            yield site, _spread(values, batch_shape, site)

    def unpack_rows(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """The same for rows without plates, shape ``(*sample_shape, rows, size)``: values as the model has them."""
        dim = cast(int, self.dim)
        nesting = max(len(site.batch_shape) for site in self.sites)
        before, after = (1,) * (nesting + dim), (1,) * (-1 - dim)
        *sample_shape, rows, size = latent.shape
        latent = latent.reshape(*sample_shape, *before, rows, *after, size)
        for site, values in self.unpack(latent):
            own = values.shape[len(sample_shape) + nesting - len(site.batch_shape) :]
            yield site, values.reshape(*sample_shape, *own)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vector of global latents, shape ``(*batch, size)``, from constrained values; particles to the left."""
        parts = []
        for site in self.sites:
            value = bijection_to(site.support).inv(values[site.name])
            rank = value.dim() - site.unconstrained_event_dim
            left = value.shape[: rank - len(site.batch_shape)]
            parts.append(value.reshape(*left, *(1 for _ in site.batch_shape), site.size))
        batch_shape = broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch_shape, -1) for part in parts], dim=-1)

    def initial(self, nodes: Mapping[str, dict[str, Any]]) -> Tensor:
        """Mean over the rows of the prototype of the unconstrained values, shape ``(size,)``."""
        parts = []
        for site in self.sites:
            value = bijection_to(site.support).inv(nodes[site.name]["value"].detach())
            rows = cast(int, self.dim) - site.unconstrained_event_dim
            parts.append(value.mean(rows).reshape(-1))
        return torch.cat(parts)


def _site(node: dict[str, Any], dim: int | None) -> Site:
    fn, value = node["fn"], node["value"]
    unconstrained = bijection_of(node).inv(value)
    batch_shape = list(value.shape[: value.dim() - fn.event_dim])
    event_shape = tuple(unconstrained.shape[len(batch_shape) :])
    if dim is not None:
        batch_shape[dim] = 1
    plates = tuple(frame.name for frame in node["cond_indep_stack"])
    support = detach(fn.support)
    if dim is not None:
        support = _support_of_one_row(support, dim - fn.event_dim, node["name"])
    return Site(node["name"], support, tuple(batch_shape), fn.event_dim, event_shape, plates)


def _support_of_one_row(support: Any, dim: int, name: str) -> Any:
    """The support without the rows of the prototype: they are other rows at the next call."""
    if isinstance(support, Tensor):
        if support.dim() < -dim or support.shape[dim] == 1:
            return support
        row = support.narrow(dim, 0, 1)
        if not bool((support == row).all()):
            raise ValueError(
                f"Expected one support for all rows of {name!r}, got bounds that differ from row to row: sample it on "
                "a fixed interval, and scale it in the model."
            )
        return row
    if isinstance(support, list | tuple):
        return type(support)(_support_of_one_row(part, dim, name) for part in support)
    if isinstance(support, constraints.Constraint):
        support = copy.copy(support)
        for key, part in vars(support).items():
            vars(support)[key] = _support_of_one_row(part, dim, name)
    return support


def _spread(values: Tensor, batch_shape: torch.Size, site: Site) -> Tensor:
    """From ``(*batch, size)`` to the shape of the site: its own plates beside that of the data."""
    event_shape = site.unconstrained_event_shape
    own = site.batch_shape
    if math.prod(own) == 1:
        return values.reshape(*batch_shape, *event_shape)
    missing = max(0, len(own) - len(batch_shape))
    batch = (*(1 for _ in range(missing)), *batch_shape)
    left = len(batch) - len(own)
    values = values.reshape(*batch, *own, *event_shape)
    pairs = [i for k in range(len(own)) for i in (left + k, len(batch) + k)]
    events = range(len(batch) + len(own), values.dim())
    values = values.permute(*range(left), *pairs, *events)
    both = (batch[left + k] * own[k] for k in range(len(own)))
    return values.reshape(*batch[:left], *both, *event_shape)
