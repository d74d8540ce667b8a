"""Which tensor of a trace becomes which variable of a group, and what its dimensions are called.

Plates are dimensions of their own name; event dimensions are ``SITE_dim_0``, ... or what the caller
says.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.particles import Particles
from pyro_flowkit.diagnostics.schema import DRAWS, schema_attrs
from pyro_flowkit.programs.sites import plates_of, scored_sites


class Namer:
    """Gives the dimensions of tensors their names: draws, plates, events."""

    def __init__(
        self, particles: Particles, dims: Mapping[str, Sequence[str]], coords: Mapping[str, Any]
    ) -> None:
        self.nesting = particles.nesting
        self.dims, self.coords = dims, coords
        self.sites = particles.model_trace.nodes
        unknown = sorted(set(dims) - set(self.sites))
        if unknown:
            raise ValueError(f"Expected dims for sites {sorted(self.sites)}, got {unknown}")

    def dataset(self, values: Mapping[str, Tensor], events: bool = True) -> xr.Dataset | None:
        """Variables of shape ``(draws, *nesting, *event)``, as (chain, draw, *plates, *event)."""
        variables = {}
        for name, value in values.items():
            value = value.unsqueeze(0)
            own: list[str] = []
            if name in self.sites:
                plates, event = self._split(name, value[0, 0], events)
                value = value.reshape(*value.shape[:2], *plates.values(), *event.values())
                own = [*plates, *event]
            variables[name] = ((*DRAWS, *own), value.numpy())
        return self._build(variables, DRAWS)

    def data(self, values: Mapping[str, Tensor]) -> xr.Dataset | None:
        """Observed values, without draws."""
        variables = {}
        for name, value in values.items():
            event_dim = self.sites[name]["fn"].event_dim
            event_shape = value.shape[value.dim() - event_dim :]
            batch = value.shape[: value.dim() - event_dim][-self.nesting or value.dim() :]
            value = value.reshape((1,) * (self.nesting - len(batch)) + batch + event_shape)
            plates, event = self._split(name, value, True)
            value = value.expand([*self._batch(name), *event_shape])
            value = value.reshape([*plates.values(), *event.values()])
            variables[name] = ((*plates, *event), value.cpu().numpy())
        return self._build(variables, ())

    def constants(self, values: Mapping[str, Tensor]) -> xr.Dataset | None:
        """Tensors that are no sites: every dimension has the name of the tensor."""
        variables = {
            name: ([f"{name}_dim_{i}" for i in range(value.dim())], value.cpu().numpy())
            for name, value in values.items()
        }
        return self._build(variables, ())

    def _batch(self, name: str) -> list[int]:
        plates = plates_of(self.sites[name])
        return [plates[dim].size if dim in plates else 1 for dim in range(-self.nesting, 0)]

    def _split(
        self, name: str, value: Tensor, events: bool
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Plates and event dimensions, with sizes, of a value of shape ``(*nesting, *event)``."""
        plates = plates_of(self.sites[name])
        named = {plates[dim].name: plates[dim].size for dim in sorted(plates)}
        shape = value.shape[self.nesting :] if events else ()
        default = [f"{name}_dim_{i}" for i in range(len(shape))]
        names = list(self.dims.get(name, default)) if events else []
        if len(names) != len(shape):
            raise ValueError(
                f"Expected {len(shape)} event dimensions for site '{name}' of event shape "
                f"{tuple(shape)}, got dims {names}"
            )
        return named, dict(zip(names, shape, strict=True))

    def _build(self, variables: dict[str, Any], sample_dims: Sequence[str]) -> xr.Dataset | None:
        if not variables:
            return None
        sizes = {
            dim: size
            for names, value in variables.values()
            for dim, size in zip(names, value.shape, strict=True)
        }
        coords = {dim: np.asarray(self.coords.get(dim, np.arange(n))) for dim, n in sizes.items()}
        for dim, size in sizes.items():
            if coords[dim].shape != (size,):
                raise ValueError(
                    f"Expected {size} coordinate values for dimension '{dim}', "
                    f"got shape {coords[dim].shape}"
                )
        return xr.Dataset(variables, coords, schema_attrs(sample_dims))


def latent_sites(particles: Particles) -> list[tuple[str, Any]]:
    return [
        (name, site)
        for name, site in scored_sites(particles.model_trace)
        if not site["is_observed"]
    ]


def observed_sites(particles: Particles) -> list[tuple[str, Any]]:
    """Observed sites with values: ``pyro.factor`` has none."""
    return [
        (name, site)
        for name, site in scored_sites(particles.model_trace)
        if site["is_observed"] and site["value"].numel() > 0
    ]


def constants(
    model: Callable, args: tuple, kwargs: dict[str, Any], observed: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tensor arguments that are not observed, by the names that the model gives to them."""
    program = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        bound = inspect.signature(program).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature to read, such as a wrapped builtin
        return {}
    values = [site["value"] for site in observed.values()]
    return {
        name: value
        for name, value in bound.items()
        if isinstance(value, Tensor)
        and not any(value.shape == v.shape and torch.equal(value, v) for v in values)
    }
