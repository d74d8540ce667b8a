"""Draws of the observed sites: from the prior, and from the latents that a guide has drawn.

A model is run without its observations, as a whole: a site whose distribution depends on another
observed site reads the draw of that site.
"""

from collections.abc import Callable
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.naming import latent_sites, observed_sites
from pyro_flowkit.diagnostics.particles import Particles, draws_again
from pyro_flowkit.warning import warn

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
    with evaluation(seed=seed), _Unobserve(sites):
        return draws_again(
            particles, model, args, kwargs, sites, particles.size, particles.latents()
        )


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
    with evaluation(seed=seed), _Unobserve(observed):
        try:
            drawn = draws_again(particles, model, args, kwargs, [*latent, *observed], num_samples)
        except (NotImplementedError, ValueError, RuntimeError) as error:
            warn(
                f"The prior cannot be drawn from ({str(error).splitlines()[0]}): the tree has no groups "
                "prior and prior_predictive; num_prior_samples=0 says so, too"
            )
            return {}, {}
    return {name: drawn[name] for name in latent}, {name: drawn[name] for name in observed}


class _Unobserve(Messenger):
    """Makes random sites of observed ones. ``poutine.uncondition`` would take ``pyro.deterministic`` along."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self._names and msg["is_observed"]:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False
