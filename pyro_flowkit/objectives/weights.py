r"""Log weights of particles, one per datum where the program allows it.

    log w_ki = sum over the model's sites of log p  -  sum over the guide's sites of log q,    particle k, datum i

The data are the plates around *all* sites of model and guide; inside of them everything is summed, and outside of them
is nothing. Without such a plate there is one weight per particle. What all sites have as a common scale, the N / B of
a subsampled plate and a ``poutine.scale`` around model and guide (a number, or one for each datum: weighted data),
multiplies the bound of a datum and not its log weight: N / B data like this one have N / B times its bound, whereas the
power ``w^(N / B)`` is no weight of anything. What only some sites have as a scale, as in annealing, stays inside of the
weight (see :mod:`pyro_flowkit.objectives.scales`).

A plate with local latents and a latent outside of it has one weight per particle. If it is subsampled, that weight is
an estimate, and a bound through its logarithm is no bound: that is refused.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_flowkit.objectives.draws import Draw, Gated
from pyro_flowkit.objectives.scales import (
    Scale,
    are_same,
    is_per_datum,
    quotient,
    shared_by_all,
)
from pyro_flowkit.programs.sites import PARTICLES, Site, is_scored
from pyro_flowkit.warning import warn

Plate = tuple[str, int]  # name and dimension


class Run(NamedTuple):
    """Traces of one particle, or of all of them in one plate.

    Attributes:
        model_trace: of the model, with log-densities.
        guide_trace: of the guide.
        handler: what was around the guide.
        model_scales: ``poutine.scale`` around each site of the model.
        guide_scales: the same of the guide.
    """

    model_trace: Any
    guide_trace: Any
    handler: Messenger
    model_scales: Mapping[str, Sequence[Scale]]
    guide_scales: Mapping[str, Sequence[Scale]]

    @property
    def draws(self) -> Sequence[Draw]:
        """The gated draws of the guide."""
        return self.handler.draws if isinstance(self.handler, Gated) else ()


class LogWeights(NamedTuple):
    """Log densities of shape ``(particles, *data)``, in nats; 0.0 where there is no site.

    Attributes:
        log_p: of the model's sites.
        log_q_gated: of the guide's gated draws.
        log_q_others: of the guide's other sites.
        scale: what the bound of a datum counts.
        stacked: whether one run holds all particles.
    """

    log_p: Tensor
    log_q_gated: Tensor | float
    log_q_others: Tensor | float
    scale: Tensor | float
    stacked: bool

    @property
    def log_w(self) -> Tensor:
        """Log weights, shape ``(particles, *data)``."""
        return self.log_p - self.log_q

    @property
    def log_q(self) -> Tensor | float:
        """Log density of the guide, shape ``(particles, *data)``."""
        return self.log_q_gated + self.log_q_others

    def of_draw(self, values: Tensor, run: int, draw: Draw) -> Tensor:
        """Of one value per particle and datum those of a run, in line with the dimensions of a draw."""
        own = values if self.stacked else values[run]
        return own.reshape(own.shape + (1,) * draw.event_dim)

    def counts_once(self, site: Site) -> bool:
        """Whether a site's log-density is in the log weight as it is."""
        return are_same(site["scale"], self.scale)

    def share_of_log_q(self, run: Run, draw: Draw) -> Tensor | float:
        """How much of a draw's log q is in the log weight: 1, unless it is scaled or masked."""
        site = run.guide_trace.nodes[draw.name]
        scale, mask = quotient(site["scale"], self.scale), site["mask"]
        share = scale if mask is None else scale * mask
        return share[(..., *(None,) * draw.event_dim)] if isinstance(share, Tensor) else share


def log_weights(
    runs: Sequence[Run],
    *,
    particle_dim: int | None = None,
    plate: str | None = None,
    linear: bool = False,
) -> LogWeights:
    """Sums the sites of each particle per datum.

    Args:
        runs: one per particle, or one of all particles.
        particle_dim: the negative dimension of the particles where one run has them all, otherwise None.
        plate: name of the plate over the data; None takes all plates that are around all sites.
        linear: whether the objective is linear in the log weights, so that estimates of them do no harm.

    Raises:
        ValueError: if the model has no site, a latent has no site in the guide, ``plate`` is not around all sites, or a
            plate inside of the weights is subsampled.
    """
    first = runs[0]
    _check_latents(first)
    data = _data_plates(first, plate)
    if not linear:
        _check_subsampling(first, data)
        _warn_of_sequential_plates(first, data)
    scale = _common_scale(first, data, linear)
    keep = {dim for _, dim in data} | (set() if particle_dim is None else {particle_dim})
    sums: dict[str, list[Tensor | float]] = {"model": [], "gated": [], "guide": []}
    for run in runs:
        gated = {draw.name for draw in run.draws}
        total: dict[str, Tensor | float] = dict.fromkeys(sums, 0.0)
        for program, name, site in _sites(run):
            inside = quotient(site["scale"], scale)
            log_prob = scale_and_mask(site["unscaled_log_prob"], inside, site["mask"])
            part = "gated" if program == "guide" and name in gated else program
            total[part] = total[part] + _sum_to(keep, log_prob)
        for part, values in sums.items():
            values.append(total[part])
    stacked = particle_dim is not None
    log_p, log_q_gated, log_q_others = (_particles(values, stacked) for values in sums.values())
    if not isinstance(log_p, Tensor):
        raise ValueError("Expected at least one sample site in the model, got none.")
    return LogWeights(log_p, log_q_gated, log_q_others, scale, stacked)


def _sites(run: Run) -> Iterator[tuple[str, str, Site]]:
    """Program, name and site of whatever has a density."""
    for program, trace in (("model", run.model_trace), ("guide", run.guide_trace)):
        for name, site in trace.nodes.items():
            if is_scored(site):
                yield program, name, site


def _plates_of(site: Site) -> set[Plate]:
    frames = site["cond_indep_stack"]
    return {(f.name, f.dim) for f in frames if f.vectorized and f.name != PARTICLES}


def _check_latents(run: Run) -> None:
    missing = [
        name
        for program, name, site in _sites(run)
        if program == "model" and not site["is_observed"] and name not in run.guide_trace.nodes
    ]
    if missing:
        raise ValueError(
            f"Expected a site in the guide for every latent of the model, got none for {missing}: weights of latents "
            "that are drawn from the prior or enumerated are not supported."
        )


def _data_plates(run: Run, plate: str | None) -> set[Plate]:
    sites = [
        (f"{name!r} of the {program}", _plates_of(site)) for program, name, site in _sites(run)
    ]
    if plate is None:
        return set.intersection(*(plates for _, plates in sites)) if sites else set()
    outside = [where for where, plates in sites if plate not in {name for name, _ in plates}]
    if outside:
        raise ValueError(
            f"Expected all sites of model and guide inside of the plate {plate!r}, got {', '.join(outside)} outside: "
            "what the data share has no part in the weight of one datum. plate=None then takes one weight per particle."
        )
    return {(name, dim) for name, dim in sites[0][1] if name == plate}


def _check_subsampling(run: Run, data: set[Plate]) -> None:
    for program, name, site in _sites(run):
        for frame in site["cond_indep_stack"]:
            if (frame.name, frame.dim) in data or frame.full_size in (None, frame.size):
                continue
            raise ValueError(
                f"Expected plate {frame.name!r} in full, or around all sites of model and guide, got a subsample of "
                f"{frame.size} out of {frame.full_size} at site {name!r} of the {program}: not all sites are inside of "
                "the plate, so the weight of a particle would be a product over all of its data, of which a subsample "
                "gives an estimate, and a bound through its logarithm is no bound. Use Trace_ELBO, or the whole plate."
            )


def _warn_of_sequential_plates(run: Run, data: set[Plate]) -> None:
    """In a loop over data that nothing else is around, the data share the weight of a particle."""
    sites = [site["cond_indep_stack"] for _, _, site in _sites(run)]
    loops = [{frame.name for frame in frames if not frame.vectorized} for frames in sites]
    common = set.intersection(*loops) if loops else set()
    if common and not data:
        warn(
            f"The plate {min(common)!r} is sequential (a for loop), so that all of its data have one weight per "
            "particle in common, and the bound is looser than with one for each datum. A vectorised plate, "
            f"with pyro.plate({min(common)!r}, size):, gives each its own."
        )


def _common_scale(run: Run, data: set[Plate], linear: bool) -> Scale:
    """What multiplies the bound: what the scales of all sites have in common, and the subsampled data plates."""
    sites = list(_sites(run))
    if not sites:
        return 1.0
    _, first_name, first = sites[0]
    dims = {dim for _, dim in data}
    if all(are_same(site["scale"], first["scale"]) for _, _, site in sites):
        if is_per_datum(first["scale"], dims):
            return first["scale"]
        if not linear:
            raise ValueError(
                f"Expected a scale around model and guide that is a number, or one for each datum, got shape "
                f"{tuple(first['scale'].shape)} at {first_name!r}, which varies inside of a weight: as a power of "
                "model and guide it leaves no importance weight. Put all sites into the plate of the data, or scale "
                "the likelihood alone."
            )
    own = {"model": run.model_scales, "guide": run.guide_scales}
    common = shared_by_all([own[program].get(name, ()) for program, name, _ in sites])
    by_hand = math.prod((scale for scale in common if is_per_datum(scale, dims)), start=1.0)
    frames = first["cond_indep_stack"]
    plates = ((f.full_size or f.size) / f.size for f in frames if (f.name, f.dim) in data)
    return by_hand * math.prod(plates)


def _sum_to(keep: Collection[int], log_prob: Tensor) -> Tensor:
    """Sums all dimensions but those to keep; as many dimensions as the leftmost of these needs."""
    drop = [dim for dim in range(-log_prob.dim(), 0) if dim not in keep]
    if drop:
        log_prob = log_prob.sum(drop, keepdim=True)
    width = -min(keep, default=0)
    shape = (1,) * (width - log_prob.dim()) + log_prob.shape
    return log_prob.reshape(shape[len(shape) - width :])


def _particles(values: list[Tensor | float], stacked: bool) -> Tensor | float:
    if stacked or not isinstance(values[0], Tensor):
        return values[0]
    return torch.stack([torch.as_tensor(value) for value in values])
