r"""Draws of a guide with their log weights: the raw material of every bound.

A particle is one draw ``z ~ q(z)`` of all latents of a model, with ``log p(x, z)`` and ``log
q(z)``; its log weight is ``log w = log p(x, z) - log q(z)``, and ``E_q[w] = p(x)`` whatever the
guide. Many particles at a time run under one more plate to the left of the program's own: the
guide, and the model by whichever way gives the densities of plain runs at every site
(:mod:`pyro_flowkit.programs.vectorized`). Where none does, they are run one by one and a warning
says so.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_flowkit.diagnostics.evaluation import owner
from pyro_flowkit.diagnostics.point_estimates import checked_points, no_bound
from pyro_flowkit.programs.pairs import NotVectorizable, vectorized
from pyro_flowkit.programs.sites import (
    PARTICLES,
    Site,
    guided_names,
    nesting_of,
    refuse_subsampling,
    scored_sites,
)
from pyro_flowkit.programs.vectorized import Vectorized, Way
from pyro_flowkit.warning import warn

# A plate needs no recording, which pays where a model runs thousands of times.
WAYS: tuple[Way, ...] = ("plate", "graph")


@dataclass(frozen=True)
class Particles:
    """Traces of ``size`` particles.

    ``nesting`` is the number of the model's own batch dimensions; the particles are in the
    dimension to the left of them, and ``program`` is the model for many of them, or there is one
    particle and no such dimension (``program`` is None). ``points`` are the latents that the guide
    puts at a point, ``all_points`` whether there are no others.
    """

    model_trace: Any
    guide_trace: Any
    size: int
    nesting: int
    program: Vectorized | None = None
    points: tuple[str, ...] = ()
    all_points: bool = False

    @property
    def stacked(self) -> bool:
        """Whether the particles have a dimension of their own."""
        return self.program is not None

    def latents(self) -> dict[str, Tensor]:
        """Values of the latents of each particle as in a plain run, ``(size, *batch, *event)``."""
        found = {}
        for name, site in scored_sites(self.model_trace):
            if not site["is_observed"]:
                own = self.program.latents[name] if self.program else len(site["fn"].batch_shape)
                value = self.view(site["value"], site["fn"].event_dim)
                found[name] = value.reshape(self.size, *value.shape[1 + self.nesting - own :])
        return found

    def runs_in_plate(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the model is written for a plate of particles, whatever way its densities take."""
        program = self.program
        return program is not None and program.agrees("plate", self.latents(), args, kwargs)

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

    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z) in nats, with shape ``(size,)``; ValueError if all latents are points."""
        if self.all_points:
            raise no_bound(self.points)
        return self.log_joint() - self.log_guide()

    def log_guide(self) -> Tensor:
        """log q(z) in nats, with shape ``(size,)``."""
        return self._total(self.guide_trace)

    def _total(self, trace: Any) -> Tensor:
        total = torch.zeros(self.size, dtype=torch.float64)
        for _, site in scored_sites(trace):
            total += (
                self.view(site["log_prob"])
                .reshape(self.size, -1)
                .sum(-1, dtype=torch.float64)
                .cpu()
            )
        return total


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
    like: Particles | None = None,
    ways: Sequence[Way] = WAYS,
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
        like: particles of this model and a guide like this one, for other data: what was found out
            about them is not found out again.
        ways: those to many particles at a time that are tried.

    Raises:
        ValueError: if a latent of the model has no site in the guide or the other way round, or
            if ``whole_data`` and a plate is subsampled.
    """
    if num_samples < 1 or chunk_size < 1:
        raise ValueError(
            f"Expected num_samples >= 1 and chunk_size >= 1, got {num_samples} and {chunk_size}"
        )
    if like is None:
        _check_programs(model, guide, args)
        like = _prototype(model, guide, args, kwargs)
        if vectorize is not False and num_samples > 1:
            program = _program(model, guide, args, kwargs, vectorize, num_samples, ways)
            like = dataclasses.replace(like, program=program)
    if whole_data:
        refuse_subsampling(like.model_trace)
    sizes = [min(chunk_size, num_samples - i) for i in range(0, num_samples, chunk_size)]
    for size in sizes if like.stacked else [1] * num_samples:
        yield from draw_again(like, model, guide, args, kwargs, size)


def _program(
    model: Callable,
    guide: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    vectorize: bool | None,
    num_samples: int,
    ways: Sequence[Way],
) -> Vectorized | None:
    """The model for many particles; None where there is none that is faster than one by one."""
    try:
        return vectorized(model, guide, args, kwargs, with_deterministic=True, ways=ways)
    except NotVectorizable as error:
        reason = error
    if vectorize:
        raise ValueError(
            f"Expected a model and a guide that can be vectorised over particles, got {reason}"
        )
    warn(
        f"The model and the guide cannot be vectorised over particles ({reason}); "
        f"running {num_samples} particles one by one"
    )
    return None


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
    if like.program is not None:
        with pyro.plate(PARTICLES, size, dim=-like.nesting - 1):
            guide_trace, model_trace = _run(like.program, guide, args, kwargs)
        return [
            dataclasses.replace(like, model_trace=model_trace, guide_trace=guide_trace, size=size)
        ]
    drawn = []
    for _ in range(size):
        guide_trace, model_trace = _run(model, guide, args, kwargs)
        drawn.append(
            dataclasses.replace(like, model_trace=model_trace, guide_trace=guide_trace, size=1)
        )
    return drawn


def draws_again(
    like: Particles,
    program: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    names: Sequence[str],
    size: int,
    latents: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What a program draws at some sites, ``(size, *nesting, *event)``, under the plates of ``like``.

    Args:
        like: particles of the program with its observations.
        program: the program, without them.
        args: its arguments.
        kwargs: its keyword arguments.
        names: of the sites.
        size: number of draws.
        latents: values ``(size, *batch, *event)``; without them the latents are drawn, too.
    """
    if like.program is not None and like.runs_in_plate(args, kwargs):
        wide = {
            name: like.program.padded(name, value, args, kwargs)
            for name, value in (latents or {}).items()
        }
        with poutine.condition(data=wide), pyro.plate(PARTICLES, size, dim=-like.nesting - 1):
            trace = poutine.trace(program).get_trace(*args, **kwargs)
        drawn = dataclasses.replace(like, size=size)
        return {name: _drawn(drawn, trace.nodes[name]) for name in names}
    one = Particles(like.model_trace, like.guide_trace, 1, like.nesting)
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in range(size):
        values = {name: value[row] for name, value in (latents or {}).items()}
        with poutine.condition(data=values):
            trace = poutine.trace(program).get_trace(*args, **kwargs)
        for name in names:
            found[name].append(_drawn(one, trace.nodes[name]))
    return {name: torch.cat(rows) for name, rows in found.items()}


def _drawn(particles: Particles, site: Site) -> Tensor:
    return particles.view(site["value"], site["fn"].event_dim).cpu()


def _run(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Guide and model traces of one run, with their log-probs."""
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
    guide_trace, model_trace = map(prune_subsample_sites, (guide_trace, model_trace))
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return guide_trace, model_trace


def _check_programs(model: Any, guide: Any, args: Any) -> None:
    for name, program in (("model", model), ("guide", guide)):
        is_bare = isinstance(program, nn.Module) and type(program).forward is nn.Module.forward
        if is_bare or not callable(program):
            raise TypeError(
                f"Expected a {name} that can be called, got {type(program).__name__}: pass the method of a module that "
                f"has none of its own (vae.{name}), and not what a {name} returns"
            )
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"Expected args to be a tuple of arguments, got {type(args).__name__}: args=(x,)"
        )
    if isinstance(model, AutoGuide):
        raise ValueError(
            f"Expected the model first, then the guide, got a guide, {type(model).__name__}, for the model"
        )


def _prototype(model: Callable, guide: Callable, args: tuple, kwargs: dict[str, Any]) -> Particles:
    """One plain run: sets up a lazy guide, shows the plates, and is checked for its latents."""
    guide_trace, model_trace = _run(model, guide, args, kwargs)
    observed = [
        [name for name, site in scored_sites(trace) if site["is_observed"]]
        for trace in (model_trace, guide_trace)
    ]
    if observed[1] and not observed[0]:
        raise ValueError(
            f"Expected the observed sites in the model, got {observed[1]} in the guide: the model comes first"
        )
    latents = {name for name, site in scored_sites(model_trace) if not site["is_observed"]}
    guided = set(guided_names(guide_trace))
    if latents != guided:
        raise ValueError(
            "Expected the same latents in model and guide, got "
            f"{sorted(latents - guided)} in the model only and {sorted(guided - latents)} in the "
            "guide only (a latent that is enumerated, not guided, must be summed out in the model)"
        )
    is_known = isinstance(owner(guide), AutoGuide)
    points = checked_points(model_trace, guide_trace, guide, args, kwargs, is_known=is_known)
    nesting = nesting_of(model_trace, guide_trace)
    return Particles(
        model_trace, guide_trace, 1, nesting, points=points, all_points=latents == set(points)
    )
