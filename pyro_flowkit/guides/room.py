r"""What a guide has left to gain: an estimate of the gap between log evidence and ELBO, while it trains.

With log weights log w = log p(x, u) - log q(u) of S draws u of the guide

    gap = log p(x) - ELBO = KL(q || posterior) ~ log mean psis(w) - mean log w

Log evidence and ELBO come from the same draws, so that most of their noise cancels: near the posterior, where the gap
is half the variance of log w, a few thousand draws give it to a few per cent. Heavy tails hide a part of the evidence;
the error is larger then by the factor of PSIS estimates (:func:`~pyro_flowkit.ops.psis.error_factor`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flowkit.guides.draws import Draws
from pyro_flowkit.guides.latent_vector import LatentDensity
from pyro_flowkit.ops.psis import error_factor, gap_error, psis, unseen_share
from pyro_flowkit.seeds import fixed_seed

NUM_DRAWS = 2048


@dataclass(frozen=True)
class Gap:
    """An estimate of log evidence - ELBO.

    Attributes:
        nats: the estimate.
        error: its standard error, in nats.
        elbo: the ELBO by the same draws, in nats.
        unseen: the share of the evidence that may lie beyond the draws.
    """

    nats: float
    error: float
    elbo: float = math.nan
    unseen: float = 0.0

    @classmethod
    def of(cls, log_weights: Tensor) -> "Gap":
        """From the log weights of draws, ``(S,)``; infinite where one is NaN, or a tail has no end."""
        log_weights = log_weights.detach().double()
        if not bool(log_weights.isfinite().all()):
            return cls(math.inf, math.inf)
        smoothed, pareto_k = psis(log_weights)
        count = len(log_weights)
        log_evidence = smoothed.logsumexp(0) - math.log(count)
        factor = float(error_factor(pareto_k, count))
        largest = float((smoothed.max() - smoothed.logsumexp(0)).exp())
        return cls(
            float(log_evidence - log_weights.mean()),
            factor * float(gap_error(log_weights, smoothed)),
            float(log_weights.mean()),
            unseen_share(largest, float(pareto_k)),
        )

    @property
    def upper(self) -> float:
        """Two standard errors, and what tails like those that were seen may hide, above the estimate."""
        return self.nats + 2.0 * self.error + math.log1p(self.unseen)


class Room:
    """The room that a guide has left towards the posterior of its model.

    Args:
        guide: after its setup.
        density: of its model.
    """

    def __init__(self, guide: Draws, density: LatentDensity):
        self._guide, self._density = guide, density

    @torch.no_grad()
    def gap(self, seed: int, num_draws: int = NUM_DRAWS) -> Gap:
        """The gap of the guide as it is now, from draws of this seed; the generator of the caller stays as it is."""
        posterior = self._guide.get_posterior()
        with fixed_seed(self._guide.affine.loc.device, seed):
            latent = posterior.sample((num_draws,))
            log_prob = posterior.log_prob(latent)
        return Gap.of((self._density(latent) - log_prob).cpu())
