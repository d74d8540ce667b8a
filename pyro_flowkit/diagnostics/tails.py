"""How well pareto k is known, and what it is trusted for.

Pareto k is fitted to the M largest weights (see `pyro_flowkit.ops.psis`), with a standard
error of about ``(1 + k) / sqrt(M)``, that of the maximum likelihood: 0.1 at 4,000 draws. A guide may
thus pass the threshold by luck, and the more so the farther it is from the posterior.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_flowkit.ops.psis import pareto_k_threshold, psis

LARGE_GAP = 0.5
"""The gap in nats from which on a guide is called bad."""


@dataclass(frozen=True)
class Tail:
    """The tail of one set of weights.

    Attributes:
        num_samples: the number of draws.
        pareto_k: of the weights; ``inf`` where it is unknown.
        gap: log of the mean of the smoothed weights minus the mean of the log weights: the PSIS
            estimate of the gap between log evidence and ELBO, in nats.
    """

    num_samples: int
    pareto_k: float
    gap: float

    @staticmethod
    def of(log_weights: Tensor) -> tuple[Tensor, "Tail"]:
        """The smoothed weights, and the tail, of ``log_weights`` of shape ``(draws,)``."""
        smoothed, pareto_k = psis(log_weights)
        log_mean = smoothed.logsumexp(-1) - math.log(len(log_weights))
        gap = float(log_mean - log_weights.mean())
        return smoothed, Tail(len(log_weights), float(pareto_k), gap)

    @property
    def error(self) -> float:
        """Standard error of pareto k; 0 where it is not positive (no heavy tail)."""
        if not self.pareto_k > 0:
            return 0.0
        length = max(1, math.floor(min(self.num_samples / 5, 3 * math.sqrt(self.num_samples))))
        return (1 + self.pareto_k) / math.sqrt(length)

    @property
    def threshold(self) -> float:
        """The pareto k up to which estimates from as many draws can be trusted."""
        return pareto_k_threshold(self.num_samples)

    @property
    def is_light(self) -> bool:
        """Whether pareto k is surely below the threshold.

        By one standard error, or by three where the gap is above 0.5 nats: guides that far from
        the posterior mostly do have a heavy tail.
        """
        caution = 3 if not self.gap <= LARGE_GAP else 1
        return self.pareto_k + caution * self.error <= self.threshold
