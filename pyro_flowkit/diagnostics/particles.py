r"""Draws of a guide with their log weights: the raw material of every bound.

A particle is one draw ``z ~ q(z)`` of all latents of a model, with ``log p(x, z)`` and ``log
q(z)``; its log weight is ``log w = log p(x, z) - log q(z)``, and ``E_q[w] = p(x)`` whatever the
guide. Model and guide run under one more plate to the left of their own, many particles at a time.
A model that mixes particles under that plate (``z.mean()``, ``float(z)``) gives wrong numbers
without any error, so the first particle of each run is computed a second time by itself and must
agree. Where that fails, the particles are run one by one and a warning says so.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

Site = dict[str, Any]


@dataclass(frozen=True)
class Particles:
    """Traces of ``size`` particles.

    ``nesting`` is the number of the model's own batch dimensions; the particles are in the
    dimension to the left of them, or there is one particle and no such dimension (``stacked`` is
    False).
    """

    model_trace: Any
    guide_trace: Any
    size: int
    nesting: int
    stacked: bool

    def view(self, value: Tensor, event_dim: int = 0) -> Tensor:
        """``value`` with shape ``(size, *nesting dimensions, *event)``."""
        batch, event = (
            value.shape[: value.dim() - event_dim],
            value.shape[value.dim() - event_dim :],
        )
        own = self.nesting + (1 if self.stacked else 0)
        if len(batch) > own:
            raise ValueError(f"Expected at most {own} batch dimensions, got shape {tuple(batch)}")
        batch = (1,) * (self.nesting + 1 - len(batch)) + batch
        return value.reshape(batch + event).expand(self.size, *batch[1:], *event)

    def log_joint(self) -> Tensor:
        """log p(x, z) in nats, with shape ``(size,)``."""
        return self._total(self.model_trace)

    def log_guide(self) -> Tensor:
        """log q(z) in nats, with shape ``(size,)``."""
        return self._total(self.guide_trace)

    def _total(self, trace: Any) -> Tensor:
        total = torch.zeros(self.size, dtype=torch.float64)
        for _, site in sample_sites(trace):
            total += (
                self.view(site["log_prob"])
                .reshape(self.size, -1)
                .sum(-1, dtype=torch.float64)
                .cpu()
            )
        return total


def sample_sites(trace: Any) -> Iterator[tuple[str, Site]]:
    """The sample sites of a trace that carry a density: no ``pyro.deterministic``."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield name, site


def unscaled_log_prob(site: Site) -> Tensor:
    """The log density of a site with its mask, without the scale of a subsampled plate."""
    return scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])


def plates_of(site: Site) -> dict[int, Any]:
    """The vectorised plates of a site by their (negative) dimension, particles left out."""
    frames = (frame for frame in site["cond_indep_stack"] if frame.vectorized)
    return {frame.dim: frame for frame in frames if frame.name != _PARTICLES}


@contextlib.contextmanager
def evaluation(*programs: Any, seed: int | None = None) -> Iterator[None]:
    """No gradients, modules in eval mode, and a seed of its own, all undone afterwards."""
    owners = map(_owner, programs)
    modules = [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]
    modes = [module.training for module in modules]
    devices = range(torch.cuda.device_count()) if seed is not None else ()
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


def draw_particles(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    num_samples: int,
    chunk_size: int,
    whole_data: bool,
    vectorize: bool | None = None,
) -> Iterator[Particles]:
    """Yields particles in chunks of at most ``chunk_size``, ``num_samples`` in all.

    Args:
        model: a Pyro model.
        guide: its guide, with a site for every latent of the model.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_samples: the number of particles.
        chunk_size: the most particles that pass through the model at once.
        whole_data: refuse a subsampled plate, whose scaled weights say nothing about the evidence.
        vectorize: True runs a chunk at once, False one by one; None tries the first and falls back
            to the second with a warning.

    Raises:
        ValueError: if a latent of the model has no site in the guide or the other way round, or
            if ``whole_data`` and a plate is subsampled.
    """
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(
            f"Expected num_samples >= 1 and chunk_size >= 1, got {num_samples} and {chunk_size}"
        )
    prototype = _prototype(model, guide, args, kwargs)
    if whole_data:
        _refuse_subsampling(prototype.model_trace)
    sizes = [min(chunk_size, num_samples - i) for i in range(0, num_samples, chunk_size)]
    first = None
    if vectorize is not False and num_samples > 1:
        try:
            first = _stacked(model, guide, args, kwargs, prototype.nesting, sizes[0])
            _check_first_particle(model, guide, args, kwargs, prototype, first)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if vectorize:
                raise
            first = None
            warnings.warn(
                f"The model and the guide cannot be vectorised over particles "
                f"({str(error).splitlines()[0]}); "
                f"running {num_samples} particles one by one",
                stacklevel=4,
            )
    if first is None:
        for _ in range(num_samples):
            yield from draw_again(prototype, model, guide, args, kwargs, 1)
        return
    yield first
    for size in sizes[1:]:
        yield from draw_again(first, model, guide, args, kwargs, size)


def draw_again(
    like: Particles,
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    size: int,
) -> list[Particles]:
    """``size`` more particles of a model and a guide with the plates of ``like``, unchecked.

    They are stacked where those are, otherwise one by one. Gradients are followed where they are
    enabled.
    """
    if like.stacked:
        return [_stacked(model, guide, args, kwargs, like.nesting, size)]
    drawn = []
    for _ in range(size):
        guide_trace, model_trace = _run(model, guide, args, kwargs)
        drawn.append(Particles(model_trace, guide_trace, 1, like.nesting, False))
    return drawn


def trace_again(
    like: Particles, program: Callable, args: tuple, kwargs: dict[str, Any], size: int
) -> Particles:
    """One run of a program by itself, under the plates of ``like`` and without densities.

    It stands for model and guide alike; ``size`` is 1 where ``like`` is not stacked.
    """
    plate = pyro.plate(_PARTICLES, size, dim=-like.nesting - 1) if like.stacked else None
    with plate or contextlib.nullcontext():
        trace = poutine.trace(program).get_trace(*args, **kwargs)
    return Particles(trace, trace, size, like.nesting, like.stacked)


_PARTICLES = "num_particles_vectorized"  # the name that Pyro's own ELBOs give to this plate


def _owner(program: Any) -> Any:
    """The module that a program is, or is a method of."""
    while isinstance(program, functools.partial):
        program = program.func
    return getattr(program, "__self__", program)


def _run(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Guide and model traces of one run, with their log-probs."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    guide_trace, model_trace = map(prune_subsample_sites, (guide_trace, model_trace))
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return guide_trace, model_trace


def _prototype(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Particles:
    """One plain run: sets up a lazy guide, shows the plates, and is checked for its latents."""
    guide_trace, model_trace = _run(model, guide, args, kwargs)
    latents = {name for name, site in sample_sites(model_trace) if not site["is_observed"]}
    guided = {
        name
        for name, site in sample_sites(guide_trace)
        if not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }
    if latents != guided:
        raise ValueError(
            "Expected the same latents in model and guide, got "
            f"{sorted(latents - guided)} in the model only and {sorted(guided - latents)} in the "
            "guide only (a latent that is enumerated, not guided, must be summed out in the model)"
        )
    dims = [
        dim
        for trace in (model_trace, guide_trace)
        for _, site in sample_sites(trace)
        for dim in plates_of(site)
    ]
    return Particles(model_trace, guide_trace, 1, -min(dims, default=0), False)


def _stacked(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    nesting: int,
    size: int,
) -> Particles:
    dim = -nesting - 1
    with pyro.plate(_PARTICLES, size, dim=dim):
        guide_trace, model_trace = _run(model, guide, args, kwargs)
    for trace in (guide_trace, model_trace):
        for name, site in sample_sites(trace):
            shape = tuple(site["log_prob"].shape)
            if len(shape) < -dim or shape[dim] != size:
                raise ValueError(
                    f"expected site '{name}' to have {size} particles in dimension {dim}, got "
                    f"a log_prob of shape {shape}"
                )
    return Particles(model_trace, guide_trace, size, nesting, True)


def _check_first_particle(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    prototype: Particles,
    particles: Particles,
) -> None:
    """Raises ValueError unless the first particle run by itself has the same log densities."""
    alone = prototype.guide_trace.copy()
    for name, site in list(sample_sites(alone)):
        if is_point_mass(site["fn"]):
            # Follows from the other sites; replayed, a last digit would cost all of its density.
            alone.remove_node(name)
            continue
        stacked = particles.guide_trace.nodes[name]["value"]
        value = particles.view(stacked, site["fn"].event_dim)[0].reshape(site["value"].shape)
        alone.nodes[name] = {**site, "value": value}
    guide_trace, model_trace = _run(model, poutine.replay(guide, trace=alone), args, kwargs)
    single = Particles(model_trace, guide_trace, 1, prototype.nesting, False)
    site_log_probs = [site["log_prob"] for _, site in sample_sites(model_trace)]
    coarsest = max(torch.finfo(log_prob.dtype).eps for log_prob in site_log_probs)
    size = sum(float(lp[lp.isfinite()].abs().sum()) for lp in site_log_probs)
    tolerance = 1e3 * coarsest * (1.0 + size)
    for what, expected, got in (
        ("log p", single.log_joint()[0], particles.log_joint()[0]),
        ("log q", single.log_guide()[0], particles.log_guide()[0]),
    ):
        if not torch.isclose(expected, got, rtol=0.0, atol=tolerance, equal_nan=True):
            raise ValueError(
                f"expected {what} = {float(expected):.6g} for a particle run by itself, got "
                f"{float(got):.6g} beside {particles.size - 1} others"
            )


def _refuse_subsampling(model_trace: Any) -> None:
    for name, site in sample_sites(model_trace):
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ValueError(
                    f"Expected all {frame.full_size} data in plate '{frame.name}' of site "
                    f"'{name}', got a subsample of {frame.size}: the weights of a minibatch say "
                    "nothing about the evidence; pass the whole data"
                )


def is_point_mass(fn: Any) -> bool:
    """Whether a distribution is a ``Delta``, whatever it is wrapped in."""
    return isinstance(innermost(fn), Delta)


def innermost(fn: Any) -> Any:
    """The distribution inside of ``to_event``, ``mask``, transforms and the like."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
