"""Draws of the observed sites: from the prior, and from the latents that a guide has drawn.

A model is run without its observations, as a whole: a site whose distribution depends on another
observed site reads the draw of that site.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flowkit.diagnostics.naming import latent_sites, observed_sites
from pyro_flowkit.diagnostics.particles import Particles, evaluation, trace_again

MAX_NUMBERS = 10**8
"""Predictions that are more numbers than this are kept on demand only."""


def count_predictions(particles: Particles, num_samples: int) -> int:
    """Numbers in ``num_samples`` predictions of all observed sites."""
    shapes = [
        particles.view(site["value"], site["fn"].event_dim).shape[1:]
        for _, site in observed_sites(particles)
    ]
    return num_samples * sum(shape.numel() for shape in shapes)


def posterior_predictive(
    particles: Particles, model: Callable, args: tuple, kwargs: dict[str, Any], seed: int | None
) -> dict[str, Tensor]:
    """A draw of every observed site for each particle, ``(particles, *nesting, *event)``."""
    sites = [name for name, _ in observed_sites(particles)]
    with evaluation(seed=seed), _Unobserve(sites), poutine.replay(trace=particles.guide_trace):
        drawn = trace_again(particles, model, args, kwargs, particles.size)
    return _values(drawn, sites)


def prior_draws(
    particles: Particles,
    model: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    num_samples: int,
    seed: int | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws of all latents from the prior, and of the observed sites with them.

    Both are empty, with a warning that says why, where the prior cannot be drawn from.
    """
    latent = [name for name, _ in latent_sites(particles)]
    observed = [name for name, _ in observed_sites(particles)]
    found: tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]] = ({}, {})
    size = num_samples if particles.stacked else 1
    with evaluation(seed=seed), _Unobserve(observed):
        try:
            for _ in range(num_samples // size):
                drawn = trace_again(particles, model, args, kwargs, size)
                for group, names in zip(found, (latent, observed), strict=True):
                    for name, value in _values(drawn, names).items():
                        group.setdefault(name, []).append(value)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            warnings.warn(
                f"The prior cannot be drawn from ({str(error).splitlines()[0]}): the tree has no groups "
                "prior and prior_predictive; num_prior_samples=0 says so, too",
                stacklevel=3,
            )
            return {}, {}
    prior, predictions = (
        {name: torch.cat(values) for name, values in group.items()} for group in found
    )
    return prior, predictions


class _Unobserve(Messenger):
    """Makes random sites of observed ones. ``poutine.uncondition`` would take ``pyro.deterministic`` along."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._names and msg["is_observed"]:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


def _values(drawn: Particles, names: list[str]) -> dict[str, Tensor]:
    sites = ((name, drawn.model_trace.nodes[name]) for name in names)
    return {name: drawn.view(site["value"], site["fn"].event_dim).cpu() for name, site in sites}
