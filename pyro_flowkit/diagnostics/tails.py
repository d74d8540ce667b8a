"""How well pareto k is known, and what it is trusted for.

Pareto k is fitted to the M largest weights (see ``pyro_flowkit.ops.psis``), with a standard
error of about ``(1 + k) / sqrt(M)``, that of the maximum likelihood: 0.1 at 4,000 draws. A guide may
thus pass the threshold by luck, and the more so the farther it is from the posterior.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_flowkit.ops.psis import pareto_k_threshold, psis, unseen_share

LARGE_GAP = 0.5
"""The gap in nats from which on a guide is called bad."""

MUCH_UNSEEN = 0.03
"""The share of the evidence that may be unseen from which on a guide is not called good."""

_HOPELESS_K = 1.0


def pareto_k_error(pareto_k: float, num_samples: int) -> float:
    """Standard error of pareto k; 0 where it is not positive (no heavy tail)."""
    if not pareto_k > 0:
        return 0.0
    length = max(1, math.floor(min(num_samples / 5, 3 * math.sqrt(num_samples))))
    return (1 + pareto_k) / math.sqrt(length)


@dataclass(frozen=True)
class Tail:
    """The tail of one set of weights.

    Attributes:
        num_samples: the number of draws.
        pareto_k: of the weights; ``inf`` where it is unknown.
        gap: log of the mean of the smoothed weights minus the mean of the log weights: the PSIS
            estimate of the gap between log evidence and ELBO, in nats.
        largest_weight: of the normalised, smoothed weights.
    """

    num_samples: int
    pareto_k: float
    gap: float
    largest_weight: float = 1.0

    @staticmethod
    def of(log_weights: Tensor) -> tuple[Tensor, "Tail"]:
        """The smoothed weights, and the tail, of ``log_weights`` of shape ``(draws,)``."""
        smoothed, pareto_k = psis(log_weights)
        log_mean = smoothed.logsumexp(-1) - math.log(len(log_weights))
        gap = float(log_mean - log_weights.mean())
        largest = float((smoothed.max() - smoothed.logsumexp(-1)).exp())
        return smoothed, Tail(len(log_weights), float(pareto_k), gap, largest)

    @property
    def error(self) -> float:
        """Standard error of pareto k."""
        return pareto_k_error(self.pareto_k, self.num_samples)

    @property
    def threshold(self) -> float:
        """The pareto k up to which estimates from as many draws can be trusted."""
        return pareto_k_threshold(self.num_samples)

    @property
    def is_light(self) -> bool:
        """Whether pareto k is surely below the threshold, or whatever it is hides nothing.

        By one standard error, or by three where the gap is above 0.5 nats: guides that far from
        the posterior mostly do have a heavy tail.
        """
        if self.hides_nothing:
            return True
        caution = 3 if not self.gap <= LARGE_GAP else 1
        return self.pareto_k + caution * self.error <= self.threshold

    @property
    def hides_nothing(self) -> bool:
        """Whether the largest weight is so small that the heaviest tail would add next to nothing."""
        return unseen_share(self.largest_weight, math.inf) <= MUCH_UNSEEN

    @property
    def is_hopeless(self) -> bool:
        """Whether weights with such a tail cannot be used at all."""
        return not self.pareto_k <= _HOPELESS_K and not self.hides_nothing
