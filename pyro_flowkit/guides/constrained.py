"""An ``AutoContinuous`` that maps onto supports by :mod:`pyro_flowkit.guides.supports`, not by PyTorch's registry."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from torch import Tensor

from pyro_flowkit._pyro import StoreModule
from pyro_flowkit.guides.lazy import LazyGuide
from pyro_flowkit.guides.supports import (
    Edges,
    bijection_of,
    bijection_to,
    refuse_changing_supports,
)
from pyro_flowkit.ops.eager import is_transformed


class ConstrainedLatents(LazyGuide, AutoContinuous, StoreModule):
    """Those methods of ``AutoContinuous`` that go from one space to the other."""

    _given: tuple[Any, bool]
    sample_latent: Callable[..., Tensor]
    _unpack_latent: Callable[[Tensor], Iterator[tuple[Any, Tensor]]]
    _edges: Edges
    # (site, unconstrained, value): -log|det dvalue/dunconstrained| in nats, shape (*batch,)
    _log_density: Callable[[Any, Tensor, Tensor], Tensor]
    # (name, value): the draws of a latent that may be at the edge of its support, NaN elsewhere
    _counted: Callable[[str, Tensor], Tensor]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        AutoGuide._setup_prototype(self, *args, **kwargs)
        self._edges = Edges()
        self._unconstrained_shapes = {}
        self._cond_indep_stacks = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            self._unconstrained_shapes[name] = bijection_of(site).inv(site["value"]).shape
            self._cond_indep_stacks[name] = site["cond_indep_stack"]
        self.latent_dim = sum(math.prod(shape) for shape in self._unconstrained_shapes.values())
        if self.latent_dim == 0:
            raise RuntimeError(
                f"{type(self).__name__} found no latent variables; use an empty guide instead."
            )
        refuse_changing_supports(self.prototype_trace, self._given[0], args, kwargs)

    def _init_loc(self) -> Tensor:
        parts = []
        for _, site in self.prototype_trace.iter_stochastic_nodes():
            unconstrained = bijection_to(site["fn"].support).inv(site["value"].detach())
            parts.append(unconstrained.reshape(-1))
        return torch.cat(parts)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for site, unconstrained in self._unpack_latent(latent):
            name, fn = site["name"], site["fn"]
            value = bijection_to(fn.support)(unconstrained)
            log_density: Tensor | float = 0.0
            if poutine.get_mask() is not False:
                log_density = self._log_density(site, unconstrained, value)
            if not is_transformed():
                counted = self._counted(name, value)
                self._edges.note(name, fn.support, counted, site["value"].numel())
            with ExitStack() as stack:
                for frame in self._cond_indep_stacks[name]:
                    stack.enter_context(plates[frame.name])
                delta = dist.Delta(value, log_density=log_density, event_dim=fn.event_dim)
                result[name] = pyro.sample(name, delta)
        self._edges.check()
        return result
