r"""Masked local latents of an amortised guide: which rows and elements have a density, at every call anew.

With u_i all local values of row i, in unconstrained space, of which the model masks some and keeps others,

    all masked (a padded row):   no log p, no log q
    some masked:                 log q(u_i) - sum over the masked elements of log r(u),    r normal at the guide's start

Both leave the ELBO a bound. The first is exact, since rows are independent given the global latents. In the second the
model is extended by the density r for what it does not have one for; the bound is as tight as without if the flow
makes those elements independent of the others and leaves them as they were, which the encoder, that should see the
mask, can tell it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from torch import Tensor

from pyro_flowkit.guides.local_latents import Latents, Site
from pyro_flowkit.guides.masked import (
    elementwise_ladj,
    flat_elements,
    kept_elements,
    only,
    read_masks,
)
from pyro_flowkit.guides.supports import bijection_to


@dataclass(frozen=True)
class RowMasks:
    """What a call of the model keeps of the local latents.

    Attributes:
        elements: for each masked site, those that are kept, shape ``(*batch, *reinterpreted)``.
        rows: those of which anything is kept, with the data's plate in its place, shape ``(rows, 1, ...)``; None is
            all of them.
        reference: for each masked site, the density r of its unconstrained values.
    """

    elements: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    reference: Mapping[str, dist.Distribution] = field(default_factory=dict)

    def around(self) -> AbstractContextManager[Any]:
        """What takes the other rows out of log q."""
        return nullcontext() if self.rows is None else poutine.mask(mask=self.rows)

    def log_density(self, site: Site, unconstrained: Tensor, value: Tensor) -> Tensor:
        """What a site adds to log q (nats), in the place of minus the log-det to its values, shape of its batch."""
        batch_dim = value.dim() - site.event_dim
        transform = bijection_to(site.support)
        if site.name not in self.elements:
            ladj = transform.log_abs_det_jacobian(unconstrained, value)
            return -sum_rightmost(ladj, ladj.dim() - batch_dim)
        kept = self.elements[site.name]
        dim = batch_dim + kept.dim() - len(site.batch_shape)
        ladj = elementwise_ladj(transform, unconstrained, value, dim)
        log_r = self.reference[site.name].log_prob(unconstrained)
        log_r = sum_rightmost(log_r, log_r.dim() - dim)
        log_density = -torch.where(kept, ladj, log_r)
        return sum_rightmost(log_density, dim - batch_dim)

    def counted(self, site: Site, value: Tensor) -> Tensor:
        """The draws of a site that are kept, NaN elsewhere."""
        if site.name not in self.elements:
            return value
        kept = self.elements[site.name]
        return only(kept, value, site.event_dim - kept.dim() + len(site.batch_shape))


class MaskedRows:
    """The masks of a model's local latents.

    Args:
        model: the model.
        prototype: a trace of it.
        latents: its local latents.
        args: the model's arguments.
        kwargs: the model's keyword arguments.

    Raises:
        ValueError: see :func:`~pyro_flowkit.guides.masked.flat_elements`; for a site of which some masked elements are
            flat, and others are not.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        prototype: Any,
        latents: Latents,
        args: tuple,
        kwargs: dict,
    ):
        self._latents = latents
        kept = {site.name: kept_elements(prototype.nodes[site.name]) for site in latents.sites}
        flat = flat_elements(model, prototype, kept, args, kwargs)
        for name, elements in flat.items():
            masked = ~kept[name]  # type: ignore[operator]
            if bool(elements.any()) and not bool(elements[masked].all()):
                raise ValueError(
                    f"Expected the model to depend on all of the masked elements of {name!r}, or on none, got "
                    f"{int(elements.sum())} of {int(masked.sum())}: make these two latents."
                )
        self.names = [
            name
            for name, mask in kept.items()
            if mask is not None and not (name in flat and bool(flat[name].any()))
        ]

    def read(
        self,
        model: Callable[..., Any] | None,
        values: Mapping[str, Tensor],
        args: tuple,
        kwargs: dict,
        *,
        reference: tuple[Tensor, float],
        init_loc_fn: Callable[[Any], Tensor],
    ) -> RowMasks:
        """The masks for these arguments.

        Args:
            model: the model.
            values: of the global latents, and the rows of the data's plate.
            args: the model's arguments.
            kwargs: the model's keyword arguments.
            reference: location ``(D,)`` and scale of r.
            init_loc_fn: gives values of the local latents, which the model may need to come to the next one.

        Raises:
            RuntimeError: without a model.
        """
        if model is None:
            raise RuntimeError(
                f"Expected a guide for masked latents ({', '.join(self.names)}) to know its model, got one that was "
                "unpickled: load its state_dict into a guide made with the model."
            )
        dim: Any = self._latents.dim
        loc, scale = reference
        found = read_masks(
            model, self.names, values, args, kwargs, device=loc.device, init_loc_fn=init_loc_fn
        )
        elements = {name: m.to(loc.device) for name, m in found.items() if m is not None}
        parts = {
            site.name: dist.Normal(values, scale, validate_args=False)
            for site, values in self._latents.unpack(loc.reshape(*(1,) * -dim, -1))
        }
        return RowMasks(elements, self._rows(elements), parts)

    def _rows(self, elements: Mapping[str, Tensor]) -> Tensor | None:
        if any(site.name not in elements for site in self._latents.sites):
            return None
        dim: Any = self._latents.dim
        rows: Any = False
        for site in self._latents.sites:
            mask = elements[site.name]
            mask = (
                mask.movedim(dim + len(site.batch_shape), 0).flatten(1)
                if mask.dim() > 1
                else mask[:, None]
            )
            rows = mask.any(-1) | rows
        return rows.reshape(-1, *(1,) * (-1 - dim))
