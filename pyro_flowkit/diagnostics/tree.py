"""A variational fit as ArviZ data: an ``xarray.DataTree`` with the groups of ArviZ's schema.

xarray alone builds the tree, so it can be made, saved and opened without ArviZ, or with either of
its two generations; `to_arviz` is the only place that knows which one is installed. The groups are
flat, since ArviZ 0.23 drops nested ones. Groups that the schema has no name for begin with ``vi_``.
"""

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.bounds import DEFAULT_PARTICLES, bounds_dataset, check_particles
from pyro_flowkit.diagnostics.particles import (
    Particles,
    draw_particles,
    evaluation,
    plates_of,
    sample_sites,
)
from pyro_flowkit.diagnostics.schema import schema_attrs
from pyro_flowkit.ops.psis import psis

HISTORY_KEYS = ("elbo", "learning_rate", "grad_norm", "seconds")

_DRAWS = ("chain", "draw")


def from_svi(
    model: Callable,
    guide: Callable,
    *,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    history: Any = None,
    num_samples: int = 4000,
    num_particles: Sequence[int] = DEFAULT_PARTICLES,
    exact_log_evidence: float | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    log_likelihood: bool = True,
    chunk_size: int = 1000,
    vectorize: bool | None = None,
    seed: int | None = None,
) -> xr.DataTree:
    """Draws of a guide, their importance weights and the course of the training, as one tree.

    Args:
        model: a Pyro model whose latents are all in the guide.
        guide: its trained guide.
        args: positional arguments of both: all data.
        kwargs: keyword arguments of both.
        history: a `FitResult`, or its ``history``: a dict of arrays of one length with ``step``
            and any of ``elbo``, ``learning_rate``, ``grad_norm``, ``seconds``.
        num_samples: draws of the guide.
        num_particles: the K of IWAE-K, see `evidence_bounds`.
        exact_log_evidence: the true log evidence in nats, where it is known.
        coords: coordinate values by dimension name. Plates are dimensions of their own name.
        dims: names of the event dimensions by site; ``SITE_dim_0``, ... by default.
        log_likelihood: whether to keep the log density of every observation under every draw.
        chunk_size: draws that pass through the model at once; memory grows with it.
        vectorize: as in `evidence_bounds`.
        seed: seed of the draws, without effect on the generator of the caller.

    Returns:
        A tree of the groups ``posterior`` (the latents of the model; chain, draw),
        ``sample_stats`` (``lp`` = log p(x, z), ``log_q``, ``log_weight``, ``log_weight_psis``, in
        nats, not normalised), ``log_likelihood``, ``observed_data``, ``constant_data`` (tensors
        among the arguments that are not observed), ``vi_trace`` (chain, step) and
        ``vi_diagnostics`` (the variables of `evidence_bounds`, from these draws). Groups without
        content are left out.

        The draws are those of the **guide**, as they are: ``log_weight_psis`` says what the
        posterior would make of them, and R-hat or ESS of independent draws say nothing about the
        guide.

    Raises:
        ValueError: as `evidence_bounds`, and if ``dims`` or ``coords`` do not fit the sites.
    """
    counts = check_particles(num_particles, num_samples)
    kwargs = kwargs or {}
    draws: dict[str, list[Tensor]] = {}
    likelihoods: dict[str, list[Tensor]] = {}
    stats: dict[str, list[Tensor]] = {"lp": [], "log_q": []}
    with evaluation(model, guide, seed=seed):
        for particles in draw_particles(
            model,
            guide,
            args,
            kwargs,
            num_samples=num_samples,
            chunk_size=chunk_size,
            whole_data=True,
            vectorize=vectorize,
        ):
            stats["lp"].append(particles.log_joint())
            stats["log_q"].append(particles.log_guide())
            for name, site in _latent_sites(particles):
                event_dim = site["fn"].event_dim
                draws.setdefault(name, []).append(particles.view(site["value"], event_dim).cpu())
            for name, site in _observed_sites(particles) if log_likelihood else ():
                likelihoods.setdefault(name, []).append(particles.view(site["log_prob"]).cpu())

    namer = _Namer(particles, dims or {}, coords or {})
    sample_stats = {name: torch.cat(parts) for name, parts in stats.items()}
    log_weight = sample_stats["lp"] - sample_stats["log_q"]
    sample_stats |= {"log_weight": log_weight, "log_weight_psis": psis(log_weight)[0]}
    observed = dict(_observed_sites(particles))
    groups = {
        "posterior": namer.dataset({n: torch.cat(parts) for n, parts in draws.items()}),
        "sample_stats": namer.dataset(sample_stats),
        "log_likelihood": namer.dataset(
            {n: torch.cat(parts) for n, parts in likelihoods.items()}, events=False
        ),
        "observed_data": namer.data({name: site["value"] for name, site in observed.items()}),
        "constant_data": namer.constants(_constants(model, args, kwargs, observed)),
        "vi_trace": _vi_trace(history),
        "vi_diagnostics": bounds_dataset(log_weight, counts, exact_log_evidence),
    }
    return xr.DataTree.from_dict({name: group for name, group in groups.items() if group})


def to_arviz(tree: xr.DataTree) -> Any:
    """The tree as the installed ArviZ wants it: itself on ArviZ 1, ``InferenceData`` on 0.23.

    Args:
        tree: the result of `from_svi`, or any DataTree with flat groups.

    Returns:
        ``tree`` unchanged, or an ``arviz.InferenceData`` with the same groups.
    """
    if int(importlib.metadata.version("arviz").split(".")[0]) >= 1:
        return tree
    import arviz

    groups: dict[str, Any] = {name: group.to_dataset() for name, group in tree.children.items()}
    return arviz.InferenceData(attrs=dict(tree.attrs), **groups)


class _Namer:
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
            variables[name] = ((*_DRAWS, *own), value.numpy())
        return self._build(variables, _DRAWS)

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


def _latent_sites(particles: Particles) -> list[tuple[str, Any]]:
    return [
        (name, site)
        for name, site in sample_sites(particles.model_trace)
        if not site["is_observed"]
    ]


def _observed_sites(particles: Particles) -> list[tuple[str, Any]]:
    """Observed sites with values: ``pyro.factor`` has none."""
    return [
        (name, site)
        for name, site in sample_sites(particles.model_trace)
        if site["is_observed"] and site["value"].numel() > 0
    ]


def _constants(
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


def history_arrays(history: Any) -> dict[str, np.ndarray]:
    """The history of a fit: a dict of 1-d arrays, or an object with such a ``history``."""
    history = getattr(history, "history", history)
    if not isinstance(history, Mapping) or "step" not in history:
        raise ValueError(
            "Expected a history with 'step' or a FitResult, got "
            f"{sorted(history) if isinstance(history, Mapping) else type(history).__name__}"
        )
    arrays = {key: np.asarray(value) for key, value in history.items()}
    shapes = {key: array.shape for key, array in arrays.items()}
    if any(shape != arrays["step"].shape or len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"Expected 1-d arrays of one length, got shapes {shapes}")
    return arrays


def _vi_trace(history: Any) -> xr.Dataset | None:
    if history is None:
        return None
    arrays = history_arrays(history)
    variables = {
        key: (("chain", "step"), arrays[key][None]) for key in HISTORY_KEYS if key in arrays
    }
    coords = {"chain": [0], "step": arrays["step"]}
    return xr.Dataset(variables, coords, schema_attrs(("chain", "step")))
