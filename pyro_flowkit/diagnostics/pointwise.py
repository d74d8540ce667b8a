r"""Bounds and exact values per datum: what a VAE and a density say about the same row.

For a model of independent data with a local latent each (a VAE), the log weight of a particle is a
sum over data, ``log w = sum_i (log p(x_i, z_i) - log q(z_i | x_i))``, so every datum has a pool of
weights of its own and with it an ELBO, IWAE-K, evidence and pareto k of its own. A latent that is
shared by all data has no share in any of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pyro_flowkit.diagnostics.bounds import DEFAULT_PARTICLES, bounds_dataset, check_particles
from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.particles import Particles, draw_particles
from pyro_flowkit.diagnostics.point_estimates import no_bound
from pyro_flowkit.diagnostics.schema import ESTIMATE, EXACT, schema_attrs
from pyro_flowkit.programs.sites import plates_of, scored_sites, unscaled_log_prob

ROWS_AT_ONCE = 16_384
ERROR_ROWS = 256


def pointwise_bounds(
    model: Callable,
    guide: Callable,
    data: Tensor | tuple[Tensor, ...],
    *,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 1000,
    num_particles: Sequence[int] = DEFAULT_PARTICLES,
    batch_size: int | None = None,
    chunk_size: int | None = None,
    plate: str | None = None,
    exact_log_evidence: Tensor | np.ndarray | None = None,
    vectorize: bool | None = None,
    seed: int | None = None,
) -> xr.Dataset:
    """ELBO, IWAE-K and evidence of every datum by itself.

    Batches of ``data`` are the leading positional arguments of model and guide, as in training.
    Every sample site of both must be inside of the plate of the data. The scale of that plate
    (subsampling) and of ``poutine.scale`` is left out, so that the numbers are those of one datum
    each; masks count.

    Memory: at most ``batch_size * chunk_size`` rows pass through the networks at once (16,384 by
    default), beside ``len(data) * num_samples`` float64 log weights. For 1,000 binary images of 784
    pixels, 1,000 draws each and a VAE of 256 x 256 hidden units that is below 400 MiB, and
    under a minute on one core (``python -m benchmarks.diagnostics``).

    Args:
        model: a Pyro model with one plate over the data, such as a VAE. Its modules run in eval
            mode: those that it is or belongs to, and those that it registers by ``pyro.module``.
        guide: its guide, inside of the same plate.
        data: a tensor whose first dimension is the datum, or a tuple of such tensors.
        args: further positional arguments of both.
        kwargs: keyword arguments of both.
        num_samples: draws of the guide per datum.
        num_particles: the K of IWAE-K. The default leaves out what exceeds ``num_samples``.
        batch_size: data per batch, 256 by default.
        chunk_size: draws that pass through the model at once.
        plate: the name of the plate of the data, where another has the same size.
        exact_log_evidence: exact ``log p(x_i)`` of shape ``(N,)``, where it is known.
        vectorize: as in ``evidence_bounds``.
        seed: seed of the draws, without effect on the generator of the caller.

    Returns:
        The variables of ``evidence_bounds``, each with the dimension ``obs_id``, in nats per datum.
        The attribute ``event_size`` is the number of observed values per datum.

    Raises:
        ValueError: if the data are empty, of unequal length or not finite, if all latents are
            points (``AutoDelta``), if a site is outside
            of the plate of the data (named), or if no plate or several could be that plate.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import pointwise_bounds
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> pointwise_bounds(model, guide, torch.randn(4), num_samples=100, seed=0)["elbo"].dims
        ('obs_id',)
    """
    counts = check_particles(num_particles, num_samples)
    tensors = check_data(data)
    batch_size = batch_size or 256
    chunk_size = chunk_size or max(1, ROWS_AT_ONCE // min(batch_size, len(tensors[0])))
    pools: list[DatumPool] = []
    with evaluation(model, guide, seed=seed):
        for batch in batches(tensors, batch_size):
            # Settled by the first batch: a last batch of one row would fit any plate.
            settled = pools[0] if pools else None
            pools.append(
                draw_pool(
                    model,
                    guide,
                    batch,
                    args,
                    kwargs or {},
                    num_samples=num_samples,
                    chunk_size=chunk_size,
                    plate=settled.plate if settled else plate,
                    vectorize=vectorize,
                    like=settled.like if settled else None,
                )
            )
    log_weights = torch.cat([pool.log_weights for pool in pools])
    return bounds_dataset(log_weights, counts, exact_log_evidence, event_size=pools[0].event_size)


def heldout_log_prob(
    flow: Any, data: Tensor, *, context: Tensor | None = None, batch_size: int = 4096
) -> xr.Dataset:
    """Exact log density of every datum under a flow or any distribution over rows.

    Args:
        flow: has ``log_prob(x)``, or ``log_prob(x, context)`` where a context is given, with one
            value in nats per row.
        data: shape ``(N, *event)``.
        context: shape ``(N, context_dim)``.
        batch_size: rows that pass through the flow at once.

    Returns:
        A Dataset with ``log_prob`` (dim ``obs_id``) in nats, exact: it has no Monte-Carlo error.
        The attribute ``event_size`` is the number of values per datum. Of a flow that solves an equation (a
        ``ContinuousFlow``) the attribute ``solver_error`` is how far its solver is off, the mean over the first 256
        rows at most; with Hutchinson's trace the kind of the values is "estimate".

    Raises:
        ValueError: if data or context are empty, of unequal length or not finite, or if the flow
            returns a wrong shape or NaN.

    Example:
        >>> import torch
        >>> from pyro_flowkit import SplineFlow
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> from pyro_flowkit.diagnostics import heldout_log_prob
        >>> heldout_log_prob(SplineFlow(2), x)["log_prob"].shape
        (200,)
    """
    tensors = check_data(data if context is None else (data, context))
    values = []
    with evaluation(*([flow] if isinstance(flow, nn.Module) else [])):
        for batch in batches(tensors, batch_size):
            log_prob = flow.log_prob(*batch)
            if log_prob.shape != batch[0].shape[:1]:
                raise ValueError(
                    f"Expected one log_prob per row, shape ({len(batch[0])},), "
                    f"got {tuple(log_prob.shape)}"
                )
            values.append(log_prob.double().cpu())
        extra: dict[str, Any] = {}
        if hasattr(flow, "solver_error"):
            rows = flow.solver_error(*(tensor[:ERROR_ROWS] for tensor in tensors))
            extra["solver_error"] = float(rows.double().mean())
    log_prob = torch.cat(values)
    if log_prob.isnan().any():
        raise ValueError(f"Expected finite log_prob, got NaN in {int(log_prob.isnan().sum())} rows")
    kind = ESTIMATE if getattr(flow, "is_estimate", False) else EXACT
    return xr.Dataset(
        {"log_prob": ("obs_id", log_prob.numpy(), {"kind": kind, "units": "nats"})},
        {"obs_id": np.arange(len(log_prob))},
        schema_attrs(kind_log_prob=kind, event_size=math.prod(data.shape[1:]), **extra),
    )


@dataclass(frozen=True)
class DatumPool:
    """Draws of a batch.

    Attributes:
        log_weights: of every datum by itself, shape ``(data, draws)``, float64, in nats.
        plate: the name of the plate of the data.
        like: some of the draws, for :func:`draw_particles`.
        event_size: observed values per datum.
    """

    log_weights: Tensor
    plate: str
    like: Particles
    event_size: int


def draw_pool(
    model: Callable,
    guide: Callable,
    batch: tuple[Tensor, ...],
    args: tuple,
    kwargs: dict[str, Any],
    *,
    num_samples: int,
    chunk_size: int,
    plate: str | None,
    vectorize: bool | None = None,
    like: Particles | None = None,
) -> DatumPool:
    """Log weights of the data of one batch; see ``pointwise_bounds`` for arguments and errors."""
    size, chunks = len(batch[0]), []
    for particles in draw_particles(
        model,
        guide,
        (*batch, *args),
        kwargs,
        num_samples=num_samples,
        chunk_size=chunk_size,
        whole_data=False,
        vectorize=vectorize,
        like=like,
    ):
        if particles.all_points:
            raise no_bound(particles.points)
        plate, dim = data_plate(particles, size, plate)
        chunks.append(datum_log_weights(particles, dim, size))
    event_size = sum(
        site["value"].numel() // size
        for _, site in scored_sites(particles.model_trace)
        if site["is_observed"]
    )
    return DatumPool(torch.cat(chunks).T, str(plate), like or particles, event_size)


def check_data(data: Any) -> tuple[Tensor, ...]:
    tensors = data if isinstance(data, tuple) else (data,)
    if not tensors or not all(isinstance(t, Tensor) and t.dim() > 0 for t in tensors):
        raise ValueError(
            "Expected data to be a tensor with a leading dimension or a tuple of such tensors, got "
            f"{[tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tensors]}"
        )
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"Expected tensors of one length >= 1, got lengths {lengths}")
    for tensor in tensors:
        bad = int((~tensor.isfinite()).reshape(lengths[0], -1).any(-1).sum())
        if bad:
            raise ValueError(f"Expected finite data, got NaN or inf in {bad} of {lengths[0]} rows")
    return tensors


def batches(tensors: tuple[Tensor, ...], batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(batch_size) for tensor in tensors), strict=True)


def _sites(particles: Particles) -> Iterator[tuple[str, str, Any]]:
    for program, trace in (("model", particles.model_trace), ("guide", particles.guide_trace)):
        for name, site in scored_sites(trace):
            yield program, name, site


def data_plate(particles: Particles, batch_size: int, plate: str | None) -> tuple[str, int]:
    """Name and dimension of the data plate, which all sites of model and guide are inside of."""
    sites = list(_sites(particles))
    candidates = {
        (frame.name, dim)
        for _, _, site in sites
        for dim, frame in plates_of(site).items()
        if frame.size == batch_size and plate in (None, frame.name)
    }
    shared = {c for c in candidates if all(_inside(site, c) for _, _, site in sites)}
    if len(shared) == 1:
        return shared.pop()
    if len(shared) > 1:
        raise ValueError(
            f"Expected one plate of size {batch_size} around all sites, got "
            f"{sorted(name for name, _ in shared)}: choose with plate="
        )
    wanted = f"of size {batch_size}" + ("" if plate is None else f" named '{plate}'")
    if not candidates:
        raise ValueError(f"Expected a plate over the data {wanted}, got none in model and guide")
    outside = [
        f"'{name}' of the {program}"
        for program, name, site in sites
        if not any(_inside(site, candidate) for candidate in candidates)
    ]
    names = sorted(name for name, _ in candidates)
    raise ValueError(
        f"Expected every site inside of the plate over the data {wanted} ({names}), got "
        f"{', '.join(outside) or 'sites in different ones'} outside: the share of a global latent "
        "cannot be attributed to a datum; use evidence_bounds"
    )


def _inside(site: Any, candidate: tuple[str, int]) -> bool:
    frame = plates_of(site).get(candidate[1])
    return frame is not None and frame.name == candidate[0]


def datum_log_weights(particles: Particles, dim: int, batch_size: int) -> Tensor:
    """Log weights of shape ``(particles, data)``."""
    total = torch.zeros(particles.size, batch_size, dtype=torch.float64)
    for program, _, site in _sites(particles):
        log_prob = particles.view(unscaled_log_prob(site)).movedim(dim, 1)
        log_prob = log_prob.reshape(particles.size, log_prob.shape[1], -1).sum(
            -1, dtype=torch.float64
        )
        total += log_prob.cpu() if program == "model" else -log_prob.cpu()
    return total
