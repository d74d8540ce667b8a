r"""ELBO, IWAE and evidence of one model and guide, each with its Monte-Carlo standard error.

With log weights ``log w = log p(x, z) - log q(z)``, ``z ~ q`` (all in nats),

    ELBO   = E[log w]                                <=  IWAE-K  <=  log p(x),
    IWAE-K = E[log (1/K) sum_k w_k]                      (Burda, Grosse and Salakhutdinov 2016),
    log p(x) ~ log (1/S) sum_s psis(w)_s                 (an estimate, not a bound).

All come from one pool of ``S`` draws. IWAE-K is the mean over the ``floor(S / K)`` disjoint blocks
of ``K`` draws, an unbiased estimate of the bound. Its standard error is that of a mean over
independent blocks. Fewer than 10 blocks say too little about their own spread: then it is the
larger one of that and of the delta method inside the blocks, ``sqrt((K / (K - 1) (K sum_k p_k^2 -
1)) / (K B))`` with ``p_k = w_k / sum_j w_j`` averaged over the ``B`` blocks. Both are optimistic
where pareto k is above 0.7: the largest weights have then not been seen. ``diagnose`` widens the range
of the gap by what may be there.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_flowkit.diagnostics.errors import log_ess_error, pareto_k_spread
from pyro_flowkit.diagnostics.evaluation import evaluation
from pyro_flowkit.diagnostics.marginals import Columns, moved
from pyro_flowkit.diagnostics.particles import Particles, draw_particles
from pyro_flowkit.diagnostics.reading import numbers_of
from pyro_flowkit.diagnostics.schema import (
    DIAGNOSTIC,
    ESTIMATE,
    EXACT,
    LOWER_BOUND,
    STANDARD_ERROR,
    schema_attrs,
)
from pyro_flowkit.ops.psis import gap_error, log_mean_error, pareto_k_threshold, psis

DEFAULT_PARTICLES = (1, 10, 100, 1000)

_FEW_BLOCKS = 10
_MOST = 16  # times as many draws, where a verdict hangs on noise
_MAX_NUMBERS = 20_000_000
_MAX_SECONDS = 30.0

KINDS = {
    "elbo": LOWER_BOUND,
    "elbo_se": STANDARD_ERROR,
    "iwae": LOWER_BOUND,
    "iwae_se": STANDARD_ERROR,
    "log_evidence": ESTIMATE,
    "log_evidence_se": STANDARD_ERROR,
    "pareto_k": DIAGNOSTIC,
    "pareto_k_sd": DIAGNOSTIC,
    "ess": DIAGNOSTIC,
    "log_ess_se": STANDARD_ERROR,
    "largest_weight": DIAGNOSTIC,
    "num_draws": DIAGNOSTIC,
    "gap_se": STANDARD_ERROR,
    "shift": ESTIMATE,
    "shift_se": STANDARD_ERROR,
    "scale_ratio": ESTIMATE,
    "scale_ratio_se": STANDARD_ERROR,
    "exact_log_evidence": EXACT,
    "gap": ESTIMATE,
}

_IN_NATS = ("elbo", "iwae", "log_evidence", "gap", "exact_log_evidence")


def evidence_bounds(
    model: Callable,
    guide: Callable,
    *,
    args: tuple = (),
    kwargs: dict[str, Any] | None = None,
    num_samples: int = 4000,
    num_particles: Sequence[int] = DEFAULT_PARTICLES,
    exact_log_evidence: float | None = None,
    max_samples: int | None = None,
    chunk_size: int = 1000,
    vectorize: bool | None = None,
    seed: int | None = None,
) -> xr.Dataset:
    """Bounds and an estimate of the log evidence ``log p(x)`` of all data in ``args``.

    Args:
        model: a Pyro model whose latents are all in the guide.
        guide: its guide.
        args: positional arguments of both: all data, since a minibatch has no evidence.
        kwargs: keyword arguments of both.
        num_samples: draws of the guide; all numbers come from one pool.
        num_particles: the K of IWAE-K. The default leaves out what exceeds ``num_samples``.
        exact_log_evidence: the true log evidence in nats, where it is known.
        max_samples: where the verdict of ``diagnose`` hangs on noise, draws are added to the pool, up to so many: 16
            times ``num_samples`` by default, or what fits into 20 million numbers and 30 seconds, and none for a model
            that runs one particle at a time. ``num_samples`` adds none.
        chunk_size: draws that pass through the model at once; memory grows with it.
        vectorize: True demands particles that run at once (in a plate, or by a recording of the
            model), False runs them one by one, None tries the first and falls back to the second with a
            warning.
        seed: seed of the draws, without effect on the generator of the caller.

    Returns:
        A Dataset in nats with ``elbo``, ``elbo_se``, ``iwae`` and ``iwae_se`` (dim
        ``n_particles``), ``log_evidence`` (PSIS), ``log_evidence_se``, ``pareto_k``,
        ``pareto_k_sd``, ``ess``, ``log_ess_se`` (of its log), ``largest_weight`` (of the normalised ones),
        ``num_draws`` (in the pool), ``gap_se`` (of the gap between the evidence, exact where it is given, and the
        ELBO), and with ``exact_log_evidence`` given that and
        ``gap = exact_log_evidence - elbo``, which is KL(guide || posterior). Along ``latent``, the elements of the
        latents (2,000 at most, evenly spaced): ``shift`` of the guide against the weighted draws in standard
        deviations, ``scale_ratio`` of the guide's scale to theirs, and ``shift_se``, ``scale_ratio_se`` (of its log).
        ``pareto_k_sd`` is NaN below 200 draws. Weights are smoothed for all of these, but where pareto k is above 1
        for the estimate of the evidence alone. The attribute ``kind`` of each variable, and ``kind_NAME`` of the
        Dataset, say whether it is exact, a lower bound, an estimate, a standard error or a
        diagnostic. Where some of the latents are points, as with an ``AutoDelta`` in an
        ``AutoGuideList``, the attribute ``point_estimates`` names them, and the numbers are those
        of log p(x, point) in the place of log p(x).

    Raises:
        ValueError: if model and guide differ in their latents, a plate is subsampled, a log
            weight is NaN, ``num_particles`` exceeds ``num_samples``, or all latents are points
            (``AutoDelta``): there is no bound then.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro_flowkit.diagnostics import evidence_bounds
        >>> def model():
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        ...     pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("mu", dist.Normal(0.8, 0.8**0.5))
        >>> bounds = evidence_bounds(model, guide, num_samples=1000, seed=0)  # an exact posterior
        >>> round(float(bounds["elbo"]), 3), round(float(bounds["log_evidence"]), 3)
        (-1.824, -1.824)
    """
    counts, options = check_particles(num_particles, num_samples), kwargs or {}
    pool = Pool(max_samples, num_samples)

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
        for particles in draw(num_samples=num_samples):
            pool.add(particles)
        return pool.settled(draw, counts, exact_log_evidence)


class Pool:
    """Draws of a guide for one verdict, and more of them while that hangs on noise.

    Args:
        max_samples: as for ``evidence_bounds``.
        num_samples: draws that a caller asks for.
    """

    def __init__(self, max_samples: int | None, num_samples: int) -> None:
        if max_samples is not None and max_samples < num_samples:
            raise ValueError(
                f"Expected max_samples >= num_samples = {num_samples}, got {max_samples}"
            )
        self._given, self._start = max_samples, time.monotonic()
        self._log_weights: list[Tensor] = []
        self._columns = Columns()
        self._like: Particles | None = None

    def add(self, particles: Particles) -> None:
        self._like = particles
        self._log_weights.append(particles.log_weights())
        latents = particles.latents()
        self._columns.add({n: value for n, value in latents.items() if n not in particles.points})

    def settled(
        self,
        draw: Callable[..., Iterable[Particles]],
        num_particles: Sequence[int],
        exact_log_evidence: float | None,
    ) -> xr.Dataset:
        """The numbers of the pool, after it has grown as far as the verdict needs and the limits allow.

        Args:
            draw: gives ``num_samples`` more particles, ``like`` given ones.
            num_particles: the K of IWAE-K.
            exact_log_evidence: as for ``evidence_bounds``.
        """
        points = ", ".join(self._like.points) if self._like else ""
        if points and exact_log_evidence is not None:
            raise ValueError(
                f"Expected no exact_log_evidence for a guide with point estimates (Delta) of {points}: its numbers are "
                "those of the joint density of the data and that point"
            )
        bounds, limit = self._bounds(num_particles, exact_log_evidence), self._limit()
        while numbers_of(bounds).hangs_on_noise:
            size = int(bounds["num_draws"])
            more = min(4 * size, limit) - size
            seconds = (time.monotonic() - self._start) * more / size
            if more < 1 or (self._given is None and seconds > _MAX_SECONDS):
                break
            for particles in draw(num_samples=more, like=self._like):
                self.add(particles)
            bounds = self._bounds(num_particles, exact_log_evidence)
        return bounds.assign_attrs(point_estimates=points) if points else bounds

    def _limit(self) -> int:
        if self._given is not None:
            return self._given
        size = sum(map(len, self._log_weights))
        if self._like is None or not self._like.stacked:
            return size
        return min(_MOST * size, max(size, _MAX_NUMBERS // max(1, len(self._columns.labels))))

    def _bounds(self, num_particles: Sequence[int], exact_log_evidence: Any) -> xr.Dataset:
        log_weights = torch.cat(self._log_weights)
        return bounds_dataset(log_weights, num_particles, exact_log_evidence, self._columns)


def check_particles(num_particles: Sequence[int], num_samples: int) -> list[int]:
    """The K to compute: increasing, distinct, and none above ``num_samples``."""
    counts = sorted(set(num_particles))
    if num_particles is DEFAULT_PARTICLES:
        counts = [count for count in counts if count <= num_samples]
    if not counts or counts[0] < 1 or counts[-1] > num_samples:
        raise ValueError(
            f"Expected num_particles between 1 and num_samples = {num_samples}, "
            f"got {tuple(num_particles)}"
        )
    return counts


def as_exact(log_evidence: Any, shape: Sequence[int]) -> Tensor:
    """The exact log evidence that a caller gives, of this shape, in float64."""
    exact = torch.as_tensor(log_evidence, dtype=torch.float64).detach().cpu()
    if exact.shape != torch.Size(shape):
        raise ValueError(
            f"Expected exact_log_evidence of shape {tuple(shape)}, got {tuple(exact.shape)}"
        )
    return exact


def bounds_dataset(
    log_weights: Tensor,
    num_particles: Sequence[int],
    exact_log_evidence: Any = None,
    columns: Columns | None = None,
    **attrs: Any,
) -> xr.Dataset:
    """All numbers of ``evidence_bounds`` from log weights ``(S,)``, or per datum from ``(N, S)``.

    Those along ``latent`` are there with ``columns``, the latents of the draws.
    """
    num_samples = log_weights.shape[-1]
    dims = ("obs_id",) if log_weights.dim() == 2 else ()
    elbo, elbo_se = importance_weighted_bound(log_weights, 1)
    ladder = [importance_weighted_bound(log_weights, count) for count in num_particles]
    smoothed, pareto_k = psis(log_weights)
    log_evidence = smoothed.logsumexp(-1) - math.log(num_samples)
    # a fitted tail without a mean is cut off at the largest weight, and would have many as large
    kept = torch.where(pareto_k.unsqueeze(-1) > 1.0, log_weights, smoothed)
    values: dict[str, Tensor] = {
        "elbo": elbo,
        "elbo_se": elbo_se,
        "iwae": torch.stack([bound for bound, _ in ladder], -1),
        "iwae_se": torch.stack([error for _, error in ladder], -1),
        "log_evidence": log_evidence,
        "log_evidence_se": log_mean_error(smoothed, log_evidence),
        "pareto_k": pareto_k,
        "pareto_k_sd": pareto_k_spread(log_weights),
        "ess": torch.exp(2 * kept.logsumexp(-1) - (2 * kept).logsumexp(-1)),
        "largest_weight": (kept.max(-1).values - kept.logsumexp(-1)).exp(),
        "log_ess_se": log_ess_error(kept),
        "num_draws": torch.full_like(elbo, num_samples, dtype=torch.int64),
        "gap_se": gap_error(log_weights, kept),
    }
    if exact_log_evidence is not None:
        exact = as_exact(exact_log_evidence, elbo.shape)
        values |= {"exact_log_evidence": exact, "gap": exact - elbo, "gap_se": elbo_se}
    coords: dict[str, Any] = {"n_particles": np.asarray(num_particles)}
    marginals = {}
    if columns is not None and columns.labels:
        marginals = moved(columns.values(), kept)
        coords["latent"] = np.asarray(columns.labels)
    values |= marginals
    variables = {
        name: (
            (*dims, "n_particles")
            if name.startswith("iwae")
            else (*dims, "latent")
            if name in marginals
            else dims,
            value.numpy(),
            {"kind": KINDS[name]}
            | ({"units": "nats"} if name.removesuffix("_se") in _IN_NATS else {}),
        )
        for name, value in values.items()
    }
    if dims:
        coords["obs_id"] = np.arange(log_weights.shape[0])
    kinds = {f"kind_{name}": KINDS[name] for name in values}
    return xr.Dataset(
        variables,
        coords,
        schema_attrs(
            num_samples=num_samples,
            pareto_k_threshold=pareto_k_threshold(num_samples),
            **kinds,
            **attrs,
        ),
    )


def importance_weighted_bound(log_weights: Tensor, num_particles: int) -> tuple[Tensor, Tensor]:
    """IWAE-K and its standard error, see the module's equations.

    Args:
        log_weights: shape ``(*batch, S)``, float64, in nats.
        num_particles: K, between 1 and S. ``S mod K`` draws at the end are left out.

    Returns:
        The bound and its Monte-Carlo standard error, each ``(*batch,)`` in nats; the error is
        ``inf`` where the bound is ``-inf`` and NaN where there is a single draw.
    """
    num_blocks = log_weights.shape[-1] // num_particles
    blocks = log_weights[..., : num_blocks * num_particles].unflatten(
        -1, (num_blocks, num_particles)
    )
    bounds = blocks.logsumexp(-1) - math.log(num_particles)
    bound = bounds.mean(-1)
    error = torch.full_like(bound, math.nan)
    if num_blocks > 1:
        error = bounds.std(-1) / math.sqrt(num_blocks)
    if num_blocks < _FEW_BLOCKS and num_particles > 1:
        inside = log_mean_error(blocks, bounds).square().mean(-1).div(num_blocks).sqrt()
        error = torch.fmax(error, inside)
    return bound, error.masked_fill(bound == -math.inf, math.inf)
