r"""Simulation-based calibration: does the guide cover the truth as often as it says?

One simulation draws latents and data from the model, ``theta* ~ p(theta)``, ``x ~ p(x | theta*)``,
fits or calls the guide on ``x``, and takes, for every latent by itself, the probability integral
transform of the truth,

    u = P_q(theta < theta*) = (number of the S draws below theta* + v) / (S + 1),   v ~ U(0, 1).

If ``q(theta | x)`` is the posterior, then truth and draws have one distribution given ``x``, so that
``u`` is uniform exactly, for every S. A guide that lies too low piles it up at 1, one that is too
narrow at both ends. ``v`` spreads ties (discrete latents) and the grid of S + 1 ranks.

What it cannot see: a guide that ignores the data and draws from the prior is calibrated, too, and
so is one whose errors are in the dependence between latents only. ``evidence_bounds`` sees both.

References:
    Sean Talts, Michael Betancourt, Daniel Simpson, Aki Vehtari, Andrew Gelman. Validating Bayesian
    Inference Algorithms with Simulation-Based Calibration. arXiv:1804.06788, 2018.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.particles import Particles, draw_particles
from pyro_flowkit.diagnostics.schema import schema_attrs
from pyro_flowkit.diagnostics.uniformity import DEFAULT_LEVEL, calibration_tests
from pyro_flowkit.programs.sites import plates_of, scored_sites

Observations = dict[str, Tensor]
Arguments = tuple[tuple, dict[str, Any]]


def simulation_based_calibration(
    model: Callable,
    guide: Callable | None = None,
    *,
    make_guide: Callable[..., Callable] | None = None,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    as_args: Callable[[Observations], Arguments] | None = None,
    num_simulations: int = 200,
    num_samples: int = 1000,
    chunk_size: int = 1000,
    vectorize: bool | None = None,
    level: float = DEFAULT_LEVEL,
    seed: int | None = None,
) -> xr.DataTree:
    """Simulates data from the model and compares the guide's draws with the latents behind them.

    Either the guide is amortised (an ``AmortizedSplineFlow``, the guide of a VAE, any function of the
    data) and is called with each simulated data set::

        tree = simulation_based_calibration(model, guide, args=(data,))

    or it is trained anew on each of them::

        def make_guide(data):
            guide = AutoSplineFlow(model)
            fit(model, guide, args=(data,), progress=False)
            return guide

        tree = simulation_based_calibration(model, make_guide=make_guide, args=(data,))

    Args:
        model: a Pyro model with proper priors, whose observations are ``pyro.sample(..., obs=...)``.
            They are simulated by running it with ``args`` and ``kwargs`` and without its
            observations.
        guide: an amortised guide with a site for every latent.
        make_guide: called with the model's arguments, simulated data in place, returns a trained
            guide. It finds a param store with the model's parameters alone, and should train none
            of them; if it does, they are set back after each simulation.
        args: positional arguments of the model. Observations among them give the shape of the
            simulated ones, their values do not matter; covariates are used as they are.
        kwargs: keyword arguments of the model.
        as_args: turns the simulated observations, a dict by the name of the site, into the
            ``(args, kwargs)`` of model and guide. None puts each observation in the place of the
            one tensor among ``args`` and ``kwargs`` that the model observed at that site.
        num_simulations: number of simulated data sets.
        num_samples: draws of the guide for each. The test holds for any number; 100 spare time where
            the model cannot be vectorised.
        chunk_size: draws that pass through the model at once; memory grows with it.
        vectorize: as in ``evidence_bounds``.
        level: the false alarm rate of the verdict, see ``calibration_tests``.
        seed: seed of the simulations, the training and the draws, without effect on the generator
            of the caller.

    Returns:
        A tree with the groups ``prior_sbc`` (the PIT values ``u`` of every latent, with dims chain
        of length 1, draw = simulation, plates and event dimensions: what
        ``arviz_plots.plot_ecdf_pit`` of ArviZ 1 plots by default), ``prior`` (the simulated latents)
        and ``vi_calibration`` (the result of ``calibration_tests``; ``diagnose`` reads the verdict).

    Raises:
        ValueError: if there is not one of ``guide`` and ``make_guide``, if the model has no
            observation or a ``pyro.factor``, whose data cannot be simulated, if the place of an
            observation is not clear without ``as_args``, if the latents of model and guide differ,
            if a plate is subsampled, or if the guide draws NaN.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import diagnose, simulation_based_calibration
        >>> def model(y=torch.tensor(0.0)):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def guide(y=torch.tensor(0.0)):  # the exact posterior
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.5**0.5))
        >>> sbc = simulation_based_calibration(model, guide, args=(torch.tensor(0.0),), num_simulations=40, seed=0)
        >>> bool(diagnose(sbc))
        True
    """
    if (guide is None) == (make_guide is None):
        raise ValueError("Expected either guide or make_guide, got both or neither of them")
    if num_simulations < 2 or num_samples < 1:
        raise ValueError(
            "Expected num_simulations >= 2 and num_samples >= 1, "
            f"got {num_simulations} and {num_samples}"
        )
    kwargs = kwargs or {}
    simulations = []
    for own_seed in _seeds(num_simulations, seed):
        with evaluation(model, seed=own_seed):
            truth = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        observations = _observations(truth)
        if as_args is None:
            new_args, new_kwargs = _replace(truth, observations, args, kwargs)
        else:
            new_args, new_kwargs = as_args(observations)
        with contextlib.ExitStack() as stack:
            trained: Any = guide
            if make_guide is not None:
                stack.enter_context(store_of_model(truth))
                trained = _train(make_guide, new_args, new_kwargs, own_seed + 1)
            stack.enter_context(evaluation(model, trained, seed=own_seed + 2))
            ranks = _Ranks(truth, observations)
            for particles in draw_particles(
                model,
                trained,
                new_args,
                new_kwargs,
                num_samples=num_samples,
                chunk_size=chunk_size,
                whole_data=True,
                vectorize=vectorize,
            ):
                ranks.count(particles)
            simulations.append((ranks.pits(), ranks.truths))
    pits, truths = zip(*simulations, strict=True)
    prior_sbc = _dataset(pits, ranks.dims)
    return xr.DataTree.from_dict(
        {
            "prior_sbc": prior_sbc,
            "prior": _dataset(truths, ranks.dims),
            "vi_calibration": calibration_tests(prior_sbc, level=level),
        }
    )


class _Ranks:
    """Counts the draws below the truth, for every element of every latent of one simulation."""

    def __init__(self, truth: Any, observations: Observations) -> None:
        self.truth = truth
        self.observations = observations
        self.truths: dict[str, Tensor] = {}
        self.dims: dict[str, list[str]] = {}
        self.below: dict[str, Tensor] = {}
        self.equal: dict[str, Tensor] = {}
        self.size = 0

    def count(self, particles: Particles) -> None:
        """Adds a chunk of draws."""
        self._check_observed(particles)
        self.size += particles.size
        simulated = Particles(self.truth, self.truth, 1, particles.nesting)
        for name, site in scored_sites(particles.model_trace):
            if site["is_observed"]:
                continue
            plates, event_dim = plates_of(site), site["fn"].event_dim
            draws = particles.view(site["value"], event_dim)
            value = simulated.view(self.truth.nodes[name]["value"], event_dim)
            if value.shape[1:] != draws.shape[1:]:
                raise ValueError(
                    f"Expected draws of '{name}' of the simulated shape {tuple(value.shape[1:])}, "
                    f"got {tuple(draws.shape[1:])}"
                )
            if torch.isnan(draws).any():
                raise ValueError(f"Expected draws of '{name}' without NaN, got some from the guide")
            shape = [plates[dim].size for dim in sorted(plates)]
            shape += draws.shape[draws.dim() - event_dim :]
            self.truths[name] = value.reshape(shape).cpu()
            self.dims[name] = [plates[dim].name for dim in sorted(plates)]
            self.dims[name] += [f"{name}_dim_{i}" for i in range(event_dim)]
            for counts, hits in ((self.below, draws < value), (self.equal, draws == value)):
                hit = hits.sum(0).reshape(shape).cpu()
                counts[name] = counts.get(name, torch.zeros_like(hit)) + hit

    def pits(self) -> Observations:
        """The PIT values, uniform on (0, 1) if the guide is the posterior."""
        return {
            name: (below + torch.rand(below.shape, dtype=torch.float64) * (self.equal[name] + 1))
            / (self.size + 1)
            for name, below in self.below.items()
        }

    def _check_observed(self, particles: Particles) -> None:
        for name, value in self.observations.items():
            site = particles.model_trace.nodes.get(name)
            if (
                site is None
                or not site["is_observed"]
                or site["value"].shape != value.shape
                or not torch.equal(site["value"], value)
            ):
                raise ValueError(
                    f"Expected the model to observe the simulated values of '{name}', of shape "
                    f"{tuple(value.shape)}, got others: as_args has to return arguments with which "
                    "it does"
                )


def _seeds(num_simulations: int, seed: int | None) -> list[int]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randint(2**48, (num_simulations,), generator=generator).tolist()


def _train(make_guide: Callable[..., Callable], args: tuple, kwargs: dict, seed: int) -> Callable:
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return make_guide(*args, **kwargs)


def _observations(trace: Any) -> Observations:
    """What an unconditioned model simulated in the place of its observations."""
    found = {}
    for name, site in scored_sites(trace):
        if isinstance(site["fn"], Unit):
            raise ValueError(
                f"Expected a model that simulates its data, got pyro.factor at '{name}', which "
                "gives data a density but cannot draw them"
            )
        if site["infer"].get("was_observed"):
            found[name] = site["value"]
    if not found:
        raise ValueError("Expected a model with observations, got latents only")
    return found


def _replace(
    trace: Any, observations: Observations, args: tuple, kwargs: dict[str, Any]
) -> Arguments:
    """The arguments with simulated data in the place of the observed tensors."""
    places: dict[Any, Any] = dict(enumerate(args)) | kwargs
    replaced = dict(places)
    for name, value in observations.items():
        old = trace.nodes[name]["infer"]["obs"]
        equal = [key for key, place in places.items() if _same(place, old)]
        same = [key for key in equal if places[key] is old]
        found = same if len(same) == 1 else equal
        if len(found) != 1 or replaced[found[0]] is not places[found[0]]:
            raise ValueError(
                f"Expected one argument to be the observation of '{name}', got {found}: say with "
                "as_args where the simulated data belong"
            )
        if value.shape != old.shape:
            raise ValueError(
                f"Expected the model to simulate '{name}' in the observed shape "
                f"{tuple(old.shape)}, got {tuple(value.shape)}: declare its dimensions by plates"
            )
        replaced[found[0]] = value
    return tuple(replaced[i] for i in range(len(args))), {key: replaced[key] for key in kwargs}


def _same(place: Any, old: Tensor) -> bool:
    return place is old or (
        isinstance(place, Tensor)
        and place.dtype == old.dtype
        and place.shape == old.shape
        and torch.equal(place, old)
    )


@contextlib.contextmanager
def store_of_model(trace: Any) -> Iterator[None]:
    """A param store with nothing but the traced model's parameters, which keep their values."""
    names = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    state: Any = {
        part: {name: value for name, value in entries.items() if name in names}
        for part, entries in pyro.get_param_store().get_state().items()
    }
    before = [(param, param.detach().clone()) for param in state["params"].values()]
    try:
        with pyro.get_param_store().scope(state):
            yield
    finally:
        with torch.no_grad():
            for param, value in before:
                param.copy_(value)


def _dataset(
    simulations: Sequence[Mapping[str, Tensor]], dims: Mapping[str, Sequence[str]]
) -> xr.Dataset:
    """One value of every latent for each simulation, as (chain, draw, ...)."""
    variables = {
        name: (
            ("chain", "draw", *dims[name]),
            torch.stack([simulation[name] for simulation in simulations])[None].numpy(),
        )
        for name in dims
    }
    dataset = xr.Dataset(variables, attrs=schema_attrs(("chain", "draw")))
    return dataset.assign_coords({dim: np.arange(n) for dim, n in dataset.sizes.items()})
