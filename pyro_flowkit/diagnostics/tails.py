r"""What pareto k means for standard errors, and how well it is known itself.

Standard errors by the delta method take the variance of the weights to be finite and seen, which is
so below a pareto k of 0.5. Above, errors of PSIS estimates fall with the number S of draws only like
``S^(-rate / 2)`` (Vehtari, Simpson, Gelman, Yao and Gabry 2024, JMLR 25(72), appendix B),

    rate(k, S) = (2 (k - 1) S^(2k+1) + (1 - 2k) S^(2k) + S^2) / ((S - 1) (S - S^(2k))),

so that they are larger than the delta method says by ``S^((1 - rate) / 2)``: for 4,000 draws 1.02 at
k = 0.2, 1.6 at 0.5, 3.9 at 0.65.

Pareto k itself is fitted to the M largest weights (see `pyro_flowkit.ops.psis`), with a standard
error of about ``(1 + k) / sqrt(M)``, that of the maximum likelihood: 0.1 at 4,000 draws. A guide may
thus pass the threshold by luck, and the more so the farther it is from the posterior.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flowkit.ops.psis import pareto_k_threshold, psis

LARGE_GAP = 0.5
"""The gap in nats from which on a guide is called bad."""


def error_factor(pareto_k: Tensor, num_samples: int) -> Tensor:
    """How many times larger than by the delta method the errors of PSIS estimates are.

    Args:
        pareto_k: of the weights, any shape.
        num_samples: the number S of draws, at least 2.

    Returns:
        From 1 (k up to 0) to ``sqrt(S)`` (k from 1 on, where more draws do not help), float64, of
        the shape of ``pareto_k``.
    """
    s = float(num_samples)
    k = pareto_k.double().nan_to_num(nan=math.inf).clamp(0.0, 1.0)
    k = torch.where((k - 0.5).abs() < 1e-4, 0.5 - 1e-4, k)  # a removable singularity
    power = s ** (2 * k)
    rate = (2 * (k - 1) * s * power + (1 - 2 * k) * power + s**2) / ((s - 1) * (s - power))
    return s ** ((1 - rate.clamp(0.0, 1.0)) / 2)


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
