"""A variational fit as ArviZ data: an ``xarray.DataTree`` with the groups of ArviZ's schema.

xarray alone builds the tree, so it can be made, saved and opened without ArviZ, or with either of
its two generations; ``to_arviz`` is the only place that knows which one is installed. The groups are
flat, since ArviZ 0.23 drops nested ones. Groups that the schema has no name for begin with ``vi_``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.bounds import DEFAULT_PARTICLES, Pool, check_particles
from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.naming import Namer, constants, latent_sites, observed_sites
from pyro_flowkit.diagnostics.particles import Particles, draw_particles
from pyro_flowkit.diagnostics.point_estimates import of_a_point
from pyro_flowkit.diagnostics.predictive import (
    MAX_NUMBERS,
    count_predictions,
    posterior_predictive,
    prior_draws,
)
from pyro_flowkit.diagnostics.schema import arviz_generation, schema_attrs
from pyro_flowkit.ops.psis import psis
from pyro_flowkit.warning import warn

HISTORY_KEYS = ("elbo", "learning_rate", "grad_norm", "seconds")


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
    max_samples: int | None = None,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    log_likelihood: bool = True,
    predictions: bool | None = None,
    num_prior_samples: int = 500,
    pointwise: xr.Dataset | None = None,
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
        history: a ``FitResult``, or its ``history``: a dict of arrays of one length with ``step``
            and any of ``elbo``, ``learning_rate``, ``grad_norm``, ``seconds``.
        num_samples: draws of the guide.
        num_particles: the K of IWAE-K, see ``evidence_bounds``.
        exact_log_evidence: the true log evidence in nats, where it is known.
        max_samples: draws for ``vi_diagnostics`` at most, see ``evidence_bounds``. The other groups have
            ``num_samples``.
        coords: coordinate values by dimension name. Plates are dimensions of their own name.
        dims: names of the event dimensions by site; ``SITE_dim_0``, ... by default.
        log_likelihood: whether to keep the log density of every observation under every draw.
        predictions: whether to draw the observed sites from every draw of the guide. None does so
            unless that is more than 100 million numbers, and says it where it is.
        num_prior_samples: draws of the prior, and of the observed sites from it; 0 for none.
        pointwise: the result of ``pointwise_bounds`` or ``inference_gaps``, to be kept in the tree.
        chunk_size: draws that pass through the model at once; memory grows with it.
        vectorize: as in ``evidence_bounds``.
        seed: seed of the draws, without effect on the generator of the caller.

    Returns:
        A tree of the groups ``posterior`` (the latents of the model; chain, draw),
        ``sample_stats`` (``lp`` = log p(x, z), ``log_q``, ``log_weight``, ``log_weight_psis``, in
        nats, not normalised), ``log_likelihood``, ``log_prior`` (of every latent, in nats),
        ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``,
        ``constant_data`` (tensors among the arguments that are not observed), ``vi_trace`` (chain,
        step), ``vi_diagnostics`` (the variables of ``evidence_bounds``, from these draws, and more of them where the
        verdict of ``diagnose`` hangs on noise) and
        ``vi_pointwise`` (obs_id). Groups without content are left out.

        The draws are those of the **guide**, as they are: ``log_weight_psis`` says what the
        posterior would make of them, and R-hat or ESS of independent draws say nothing about the
        guide.

        A guide that puts all latents at a point (``AutoDelta``) has no weights and no bounds:
        ``sample_stats`` then has ``lp`` alone, and ``vi_diagnostics`` that ``log_joint`` of the
        point with the verdict of ``diagnose``.

    Raises:
        ValueError: as ``evidence_bounds``, and if ``dims`` or ``coords`` do not fit the sites.

    Warns:
        UserWarning: if predictions or the prior are left out.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import from_svi
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> tree = from_svi(model, guide, num_samples=1000, seed=0)
        >>> tree["posterior"]["mu"].shape  # chain, draw
        (1, 1000)
    """
    counts = check_particles(num_particles, num_samples)
    options = kwargs or {}
    pool = Pool(max_samples, num_samples)
    found = _Found()

    draw = partial(
        draw_particles,
        model,
        guide,
        args,
        options,
        chunk_size=chunk_size,
        whole_data=True,
        vectorize=vectorize,
    )
    with evaluation(model, guide, seed=seed):
        for chunk, particles in enumerate(draw(num_samples=num_samples)):
            if not particles.all_points:
                pool.add(particles)
            own_seed = None if seed is None else seed + 1 + chunk
            found.take_in(particles, log_likelihood=log_likelihood)
            if predictions is None:
                predictions = _are_few(particles, num_samples)
            if predictions:
                drawn = posterior_predictive(particles, model, args, options, own_seed)
                for name, value in drawn.items():
                    found.predicted.add(name, value)
        prior, prior_predictive = (
            prior_draws(particles, model, args, options, num_prior_samples, seed)
            if num_prior_samples
            else ({}, {})
        )
        bounds = (
            of_a_point(particles.points, float(particles.log_joint()[0]))
            if particles.all_points
            else pool.settled(draw, counts, exact_log_evidence)
        )

    namer = Namer(particles, dims or {}, coords or {})
    observed = dict(observed_sites(particles))
    groups = {
        "posterior": namer.dataset(found.draws.joined()),
        "sample_stats": namer.dataset(found.sample_stats(particles.all_points)),
        "log_likelihood": namer.dataset(found.likelihoods.joined(), events=False),
        "log_prior": namer.dataset(found.log_prior.joined(), events=False),
        "posterior_predictive": namer.dataset(found.predicted.joined()),
        "prior": namer.dataset(prior),
        "prior_predictive": namer.dataset(prior_predictive),
        "observed_data": namer.data({name: site["value"] for name, site in observed.items()}),
        "constant_data": namer.constants(constants(model, args, options, observed)),
        "vi_trace": _vi_trace(history),
        "vi_diagnostics": bounds,
        "vi_pointwise": pointwise,
    }
    return xr.DataTree.from_dict({name: group for name, group in groups.items() if group})


def to_arviz(tree: xr.DataTree) -> Any:
    """The tree as the installed ArviZ wants it: itself on ArviZ 1, ``InferenceData`` on 0.23.

    Args:
        tree: the result of ``from_svi``, or any DataTree with flat groups.

    Returns:
        ``tree`` unchanged, or an ``arviz.InferenceData`` with the same groups.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import from_svi, to_arviz
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> data = to_arviz(from_svi(model, guide, num_samples=200, seed=0))
        >>> float(data["posterior"]["mu"].mean()) > 0
        True
    """
    if arviz_generation() >= 1:
        return tree
    import arviz

    groups: dict[str, Any] = {name: group.to_dataset() for name, group in tree.children.items()}
    return arviz.InferenceData(attrs=dict(tree.attrs), **groups)


class _Parts:
    """Tensors by name that come in pieces."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, name: str, part: Tensor) -> None:
        self._parts.setdefault(name, []).append(part.detach().cpu())

    def joined(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self._parts.items()}


class _Found:
    """What is kept of the particles of every chunk."""

    def __init__(self) -> None:
        self.stats, self.draws, self.log_prior = _Parts(), _Parts(), _Parts()
        self.likelihoods, self.predicted = _Parts(), _Parts()

    def take_in(self, particles: Particles, *, log_likelihood: bool) -> None:
        """Keep values and densities of a chunk."""
        self.stats.add("lp", particles.log_joint())
        self.stats.add("log_q", particles.log_guide())
        for name, site in latent_sites(particles):
            self.draws.add(name, particles.view(site["value"], site["fn"].event_dim))
            self.log_prior.add(name, particles.view(site["log_prob"]))
        for name, site in observed_sites(particles) if log_likelihood else ():
            self.likelihoods.add(name, particles.view(site["log_prob"]))

    def sample_stats(self, all_points: bool) -> dict[str, Tensor]:
        """log p and, for a guide that is no point, log q and the log weights of all particles."""
        stats = self.stats.joined()
        if all_points:
            del stats["log_q"]
            return stats
        log_weight = stats["lp"] - stats["log_q"]
        return stats | {"log_weight": log_weight, "log_weight_psis": psis(log_weight)[0]}


def _are_few(particles: Particles, num_samples: int) -> bool:
    count = count_predictions(particles, num_samples)
    if count > MAX_NUMBERS:
        warn(
            f"The draws of the observed sites would be {count:,} numbers: the tree has no group "
            "posterior_predictive. Take fewer draws, or say predictions=True or predictions=False"
        )
    return count <= MAX_NUMBERS


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
